"""Pictures of layers for loggers that take images, at each update."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_muws.errors import SettingError
from lightning_muws.structure.grid import is_whole
from lightning_muws.structure.sharded import whole
from lightning_muws.training.checks import refuse
from lightning_muws.training.run import CompressionRun

# (name, weight, grid, kinds, history, caption) -> pixels (height, width, 3) uint8
Drawer = Callable[..., Any]


def check_number(name: str, value: object) -> None:
    """Check that the setting ``name`` is a number of layers.

    Raises:
        SettingError: It is no whole number >= 0.
    """
    if not is_whole(value) or value < 0:  # type: ignore[operator]
        raise refuse(name, value, "give the number of layers to draw, such as 8, or 0 for none")


def prepare(trainer: Any, most: int) -> None:
    """Check before training that pictures can be drawn, if there are to be any; warn if no logger takes them.

    Raises:
        SettingError: matplotlib is not installed.
    """
    if not most:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise SettingError(f"log_pictures={most} needs matplotlib: pip install 'lightning-muws[plots]', or give 0")
    if not loggers(trainer):
        rank_zero_warn(
            f"log_pictures={most} has no effect: none of the Trainer's loggers takes images; give it a "
            "TensorBoardLogger, a WandbLogger, an MLFlowLogger, or another logger with "
            "log_image(key, images, step)"
        )


def loggers(trainer: Any) -> list[Any]:
    """Return the Trainer's loggers that take images."""
    return [
        one
        for one in trainer.loggers
        if hasattr(one, "log_image") or hasattr(one.experiment, "add_image") or _is_mlflow(one)
    ]


def _is_mlflow(logger: Any) -> bool:
    return hasattr(logger, "run_id") and hasattr(logger.experiment, "log_image")


def log(trainer: Any, run: CompressionRun, drawer: Drawer, most: int, caption: str) -> None:
    """Draw the largest layers as they are now, and hand the pictures to the loggers. A collective for sharded weights.

    A block has the kind that its structure would choose now, or has chosen.

    Args:
        trainer: The Trainer.
        run: Its run, in or after the phase of its method.
        drawer: Makes the pixels of one layer.
        most: How many layers.
        caption: When it is, such as ``admm, epoch 3``.
    """
    takers, supports = loggers(trainer) if trainer.is_global_zero else [], run.supports
    for name in _largest(run, most):
        weight, entry = whole(run.weights[name].detach()), run.entries[name]
        if not takers:
            continue
        support = supports.get(name) or entry.structure.nearest(weight, entry.grid, name)[0]
        pixels = drawer(name, weight, entry.grid, support.kinds, tuple(run.history), caption)
        for logger in takers:
            _send(logger, name, pixels, weight, trainer.global_step)


def _largest(run: CompressionRun, most: int) -> Sequence[str]:
    """Return the names of the largest weights, in the order of the model."""
    ordered = sorted(run.entries, key=lambda name: -run.weights[name].numel())[:most]
    return [name for name in run.entries if name in ordered]


def _send(logger: Any, name: str, pixels: Any, weight: Any, step: int) -> None:
    if hasattr(logger, "log_image"):
        logger.log_image(key=f"muws/{name}", images=[pixels], step=step)
        return
    if _is_mlflow(logger):
        logger.experiment.log_image(logger.run_id, pixels, key=f"muws/{name}", step=step)
        return
    logger.experiment.add_image(f"muws/{name}", pixels, step, dataformats="HWC")
    if hasattr(logger.experiment, "add_histogram"):
        magnitudes = weight.float().abs().cpu().numpy()
        logger.experiment.add_histogram(f"muws/magnitudes/{name}", magnitudes, step)
