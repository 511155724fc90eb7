"""What benchmarks that train share: a quiet fit, the customary rules, and a mean with its spread."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from statistics import mean, stdev

import lightning as L
from example_data import Images

from lightning_muws import LayerRule

RULES = (LayerRule("features.0.*", skip=True), LayerRule("classifier.2.*", skip=True))  # as is customary


def be_quiet() -> None:
    """Leave the terminal to progress and tables."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def train(module: L.LightningModule, data: Images, epochs: int, *callbacks: L.Callback) -> float:
    """Fit without a word and return the test accuracy."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", limit_val_batches=0, **quiet)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.fit(module, data)
        return trainer.test(module, data, verbose=False)[0]["test_accuracy"]


def spread(values: list[float]) -> str:
    """Return the mean and the standard deviation in percent, and each value."""
    each = " ".join(f"{100 * value:.2f}" for value in values)
    return f"{100 * mean(values):.2f} +- {100 * (stdev(values) if len(values) > 1 else 0):.2f} ({each})"
