"""`muws sensitivity`: the loss with each layer of a network compressed alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from lightning_muws.artifact.load import load_compressed
from lightning_muws.artifact.source import read_state
from lightning_muws.commands.code import build, explained, find
from lightning_muws.commands.output import DONE, progress, say, say_json
from lightning_muws.errors import SettingError
from lightning_muws.plots import plot_sensitivity
from lightning_muws.structure.sensitivity import RATIOS, sensitivity

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross_entropy": cross_entropy, "mse_loss": mse_loss}
CODE = "PACKAGE.MODULE:FUNCTION"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add ``sensitivity`` to the subcommands; its option ``run`` is :func:`run`."""
    does = "measure how much the loss grows when one layer alone is compressed"
    parser = commands.add_parser("sensitivity", help=does, description=f"{does[0].upper()}{does[1:]}.")
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="PACKAGE.MODULE:CLASS", help="class or function that builds the network")
    parser.add_argument("--args", default="{}", metavar="JSON", help="keyword arguments of the class, as JSON")
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="load a .muws, .ckpt, .pt, .pth or .safetensors file into it"
    )
    parser.add_argument(
        "--batches", required=True, metavar=CODE, help="function that returns the batches, such as a DataLoader"
    )
    parser.add_argument(
        "--loss",
        required=True,
        metavar=f"{{{','.join(LOSSES)}}} or {CODE}",
        help="function of the network and a batch that returns the mean loss; or a loss of torch, for batches that are "
        "pairs of inputs and targets",
    )
    parser.add_argument(
        "--ratios",
        type=float,
        nargs="+",
        default=list(RATIOS),
        metavar="N",
        help=f"how many times smaller a layer gets (default: {' '.join(f'{ratio:g}' for ratio in RATIOS)})",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the losses into a .png, .pdf or .svg file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def run(options: argparse.Namespace) -> int:
    """Run ``muws sensitivity`` and return its exit code, 0.

    Raises:
        MuwsError: An option is not allowed, or the network, the batches or the loss fail.
    """
    plot: Path | None = options.plot
    if plot and (plot.is_dir() or not plot.parent.is_dir() or plot.suffix not in (".png", ".pdf", ".svg")):
        raise SettingError(f"--plot {plot} cannot be written: give a .png, .pdf or .svg file in a folder that exists")
    model = build(options.model, options.args)
    if options.weights:
        _load(options.weights, model)
    loss = _loss(options.loss)
    make_batches = find("--batches", options.batches)
    with explained(f"--batches {options.batches!r} fails", "name a function without arguments that returns batches"):
        batches = list(make_batches())
    advice = "give batches that the loss and the network accept"
    with progress("measuring", options.json) as update, explained(f"--loss {options.loss!r} fails", advice):
        report = sensitivity(model, loss, batches, options.ratios, progress=update)
    if plot:
        plot_sensitivity(report).figure.savefig(plot, dpi=150)  # type: ignore[union-attr]  # a figure, not a part of one
    say_json(report.to_dict()) if options.json else say(report)
    return DONE


def _load(path: Path, model: nn.Module) -> None:
    """Load the weights of a file into the model."""
    if path.suffix == ".muws":
        load_compressed(path, into=model)
        return
    state = read_state(path).tensors
    with explained(f"--weights {path} does not fit the network", "give the weights of this network"):
        model.load_state_dict({name: x.read() for name, x in state.items()})


def _loss(name: str) -> Callable[[nn.Module, Any], Tensor]:
    """Return the loss that is named: one of torch's on pairs of inputs and targets, or the user's function."""
    if name not in LOSSES:
        return find("--loss", name)
    compare = LOSSES[name]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        return compare(model(inputs), targets)

    return loss
