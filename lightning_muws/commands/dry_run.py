"""`muws dry-run`: what a run on a model of transformers will take, from its configuration alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from lightning_muws.commands.options import block_shape
from lightning_muws.commands.output import DONE, say, say_json
from lightning_muws.estimate import dry_run
from lightning_muws.hub import empty_model
from lightning_muws.structure.micro import MicroStructure


def add_parser(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add this subcommand; ``command`` adds one and returns its parser."""
    parser = command("dry-run", run, "compute what a run on a model will take, from its config.json alone")
    parser.add_argument("folder", type=Path, help="a folder with the config.json of a model of transformers")
    parser.add_argument("--compression", type=float, metavar="N", help="make the file N times smaller, such as 20")
    parser.add_argument("--prune-ratio", type=float, default=0.0, metavar="SHARE", help="of the blocks, such as 0.5")
    parser.add_argument("--unify-ratio", type=float, default=0.0, metavar="SHARE", help="of the blocks, such as 0.3")
    parser.add_argument("--block", type=block_shape, default=(4, 4), metavar="ROWSxCOLS", help="4x4 by default")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks that share the weights (default: 1)")


def run(options: argparse.Namespace) -> int:
    """Compute what a run will take."""
    structure = MicroStructure(options.block, options.prune_ratio, options.unify_ratio)
    model, _ = empty_model(options.folder)
    found = dry_run(model, structure, compression=options.compression, n_ranks=options.ranks)
    say_json(found.to_dict()) if options.json else say(found)
    return DONE
