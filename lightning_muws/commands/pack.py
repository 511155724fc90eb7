"""`muws pack` and `compress`: the commands that write `.muws` files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_muws.artifact.compress import BLOCK_SHAPES, compress_file
from lightning_muws.artifact.save import save_compressed
from lightning_muws.commands.options import SOURCE, add_force, add_max_bytes, block_shape, check_target, opened
from lightning_muws.commands.output import DONE, progress, say, say_json


def add_parsers(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add these subcommands; ``command`` adds one and returns its parser."""
    packed = command("pack", pack, "write the weights of a .ckpt, .pt, .pth, .safetensors or .muws file as .muws")
    _add_files(packed)
    _add_loss(packed)
    compressed = command(
        "compress", compress, "write the weights of a checkpoint as a .muws file of a given size, without training"
    )
    _add_files(compressed)
    compressed.add_argument(
        "--compression",
        type=float,
        required=True,
        metavar="N",
        help="make the file at least N times smaller than its tensors, such as 8; above 1",
    )
    shapes = " or ".join(f"{rows}x{cols}" for rows, cols in BLOCK_SHAPES)
    compressed.add_argument(
        "--block",
        type=block_shape,
        metavar="ROWSxCOLS",
        help=f"shape of the blocks that are unified or pruned (default: for each weight {shapes}, or none)",
    )


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help=f"{SOURCE}; - for standard input")
    parser.add_argument("file", type=Path, help="the .muws file to write")
    parser.add_argument(
        "--extra",
        type=_object,
        metavar="JSON",
        help="your own values to keep in the file, such as '{\"accuracy\": 0.92}' (default: those of a .muws source)",
    )
    add_force(parser)
    add_max_bytes(parser)


def _add_loss(parser: argparse.ArgumentParser) -> None:
    """Add the options of pack that choose what the file may lose."""
    parser.add_argument(
        "--block",
        type=block_shape,
        metavar="ROWSxCOLS",
        help="block shape of all weights, such as 4x4 (default: that of a .muws source, or for each weight the shape "
        "that makes the file small)",
    )
    parser.add_argument(
        "--max-error", type=float, default=0.0, help="how far a weight may move (default: 0, the file is lossless)"
    )
    references = ("tensor_max", "model_max", "absolute")
    parser.add_argument(
        "--relative-to",
        choices=references,
        default=references[0],
        help=f"what --max-error is relative to (default: {references[0]})",
    )
    parser.add_argument("--value-dtype", choices=("float16", "bfloat16"), help="round values to this dtype instead")
    parser.add_argument(
        "--lossy",
        choices=("weights", "all"),
        help="which tensors may lose precision: those of two or more axes, or all "
        "(default: weights; with --compression all)",
    )
    parser.add_argument(
        "--compression",
        type=float,
        metavar="N",
        help="make the file at least N times smaller than its tensors, such as 20; instead of --max-error",
    )


def pack(options: argparse.Namespace) -> int:
    """Write a `.muws` file."""
    check_target(options.file, options.source, (".muws",), force=options.force)
    with opened(options.source, options.max_bytes) as source, progress("packing", options.json) as update:
        report = save_compressed(
            source,
            options.file,
            blocks=options.block,
            max_error=options.max_error,
            relative_to=options.relative_to,
            value_dtype=options.value_dtype,
            lossy=options.lossy,
            compression=options.compression,
            extra=options.extra,
            max_bytes=options.max_bytes,
            progress=update,
        )
    say_json(report.to_dict()) if options.json else say(report)
    return DONE


def compress(options: argparse.Namespace) -> int:
    """Write a `.muws` file of a given size, without training."""
    check_target(options.file, options.source, (".muws",), force=options.force)
    with opened(options.source, options.max_bytes) as source, progress("compressing", options.json) as update:
        report = compress_file(
            source,
            options.file,
            options.compression,
            block_shape=options.block,
            extra=options.extra,
            max_bytes=options.max_bytes,
            progress=update,
        )
    say_json(report.to_dict()) if options.json else say(report)
    return DONE


def _object(text: str) -> dict[str, Any]:
    """Return a JSON object."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({error}): give an object") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not allowed: give an object such as {{"accuracy": 0.92}}')
    return found
