"""`muws inspect`, `verify`, `pack`, `unpack` and `diff`: the commands that read and write files of weights."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from lightning_muws.artifact.container import replacing
from lightning_muws.artifact.load import MAX_BYTES, inspect_compressed, load_compressed, verify_compressed
from lightning_muws.artifact.save import save_compressed
from lightning_muws.artifact.source import Stored, read_state
from lightning_muws.commands.output import BAD, DONE, progress, say, say_json
from lightning_muws.errors import SettingError
from lightning_muws.tables import Column, Table, terminal_width

UNPACKED = (".safetensors", ".pt", ".pth")  # endings of the files that unpack can write
ANY = "a .muws, .ckpt, .pt, .pth or .safetensors file"


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add these subcommands; each option ``run`` is the function that carries its command out."""

    def command(name: str, run: Callable[[argparse.Namespace], int], does: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.")
        added.set_defaults(run=run)
        return added

    shown = command("inspect", inspect, "show the content of a .muws file, without decoding it")
    shown.add_argument("file", type=Path, help="the .muws file")

    checked = command("verify", verify, "check every checksum and decode every stream of a .muws file")
    checked.add_argument("file", type=Path, help="the .muws file")

    packed = command("pack", pack, "write the weights of a .ckpt, .pt, .pth, .safetensors or .muws file as .muws")
    packed.add_argument("source", type=Path, help=ANY)
    packed.add_argument("file", type=Path, help="the .muws file to write; an older file is replaced")
    _add_loss(packed)

    unpacked = command("unpack", unpack, "write the tensors of a .muws file as .safetensors, .pt or .pth")
    unpacked.add_argument("file", type=Path, help="the .muws file")
    unpacked.add_argument("target", type=Path, help="the file to write; its ending chooses the format")

    compared = command("diff", diff, "compare the tensors of two files")
    compared.add_argument("one", type=Path, help=ANY)
    compared.add_argument("other", type=Path, help=ANY)

    for parser in (checked, unpacked, compared):
        parser.add_argument(
            "--max-bytes",
            type=int,
            default=MAX_BYTES,
            metavar="N",
            help=f"refuse .muws files whose tensors take more bytes in memory (default: {MAX_BYTES})",
        )
    for parser in (shown, checked, packed, unpacked, compared):
        parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _add_loss(parser: argparse.ArgumentParser) -> None:
    """Add the options of pack that choose what the file may lose."""
    parser.add_argument(
        "--block",
        type=_block_shape,
        metavar="ROWSxCOLS",
        help="block shape of all weights, such as 4x4 (default: for each weight, the shape that makes the file small)",
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


def inspect(options: argparse.Namespace) -> int:
    """Show what the manifest of a file declares."""
    info = inspect_compressed(options.file)
    say_json(info.to_dict()) if options.json else say(info)
    return DONE


def verify(options: argparse.Namespace) -> int:
    """Check all of a file."""
    with progress("verifying", options.json) as update:
        info = verify_compressed(options.file, max_bytes=options.max_bytes, progress=update)
    if options.json:
        say_json({"file": str(options.file), "ok": True})
    else:
        say(f"{options.file}: ok, {len(info.tensors)} tensors")
    return DONE


def pack(options: argparse.Namespace) -> int:
    """Write a `.muws` file."""
    with progress("packing", options.json) as update:
        report = save_compressed(
            options.source,
            options.file,
            blocks=options.block,
            max_error=options.max_error,
            relative_to=options.relative_to,
            value_dtype=options.value_dtype,
            lossy=options.lossy,
            compression=options.compression,
            progress=update,
        )
    say_json(report.to_dict()) if options.json else say(report)
    return DONE


def unpack(options: argparse.Namespace) -> int:
    """Write the tensors of a `.muws` file to a file that other programs read."""
    target = options.target
    if target.suffix not in UNPACKED:
        raise SettingError(f"{target} is not allowed: give a name that ends in .safetensors, .pt or .pth")
    if target.is_dir() or not target.parent.is_dir():
        raise SettingError(f"{target} cannot be written: give a file in a folder that exists")
    with progress("unpacking", options.json) as update:
        state = load_compressed(options.file, max_bytes=options.max_bytes, progress=update)
    if target.suffix == ".safetensors":
        encoded = _safetensors(state, target)
        with replacing(target) as file:
            file.write(encoded)
    else:
        with replacing(target) as file:
            torch.save(state, file)
    if options.json:
        say_json({"file": str(target), "tensors": len(state)})
    else:
        say(f"{target}: written, {len(state)} tensors")
    return DONE


def _safetensors(state: Mapping[str, Tensor], target: Path) -> bytes:
    try:
        # safetensors refuses tensors that share memory: each gets a copy
        return save({name: x.clone() for name, x in state.items()})
    except (KeyError, SafetensorError) as error:
        raise SettingError(
            f"{target} cannot be written: safetensors does not support {error}; give a name that ends in .pt"
        ) from None


def diff(options: argparse.Namespace) -> int:
    """Compare the tensors of two files, bit for bit."""
    one, other = (_tensors(path, options) for path in (options.one, options.other))
    names = {**one, **other}
    rows = [(name, *_difference(one.get(name), other.get(name))) for name in names]
    different = [row for row in rows if row[1]]
    if options.json:
        found = [{"name": name, "difference": what, "max_error": error} for name, what, error in different]
        say_json({"equal": not different, "tensors": len(rows), "different": found})
    elif different:
        table = Table(
            title=f"{len(different)} of {len(rows)} tensors differ",
            columns=[Column("tensor", room=24), Column("difference", room=24), Column("largest")],
            rows=[(name, what, "" if error is None else f"{error:.3g}") for name, what, error in different],
        )
        say(table.text(terminal_width()))
    else:
        say(f"{len(rows)} tensors, all equal bit for bit")
    return BAD if different else DONE


def _tensors(path: Path, options: argparse.Namespace) -> Mapping[str, Stored]:
    with progress("reading", options.json) as update:
        return read_state(path, options.max_bytes, update).tensors


def _difference(a: Stored | None, b: Stored | None) -> tuple[str, float | None]:
    """Return how two tensors differ, empty if they do not, and the largest difference of their values."""
    if a is None or b is None:
        return f"only in the {'other' if a is None else 'first'}", None
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}", None
    one, other = a.read(), b.read()
    if torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (one, other))):
        return "", 0.0
    wide = torch.complex128 if one.is_complex() else torch.float64
    largest = float((one.to(wide) - other.to(wide)).abs().max())
    return ("values", largest) if math.isfinite(largest) else ("values, not all finite", None)


def _block_shape(text: str) -> tuple[int, int]:
    """Return the block shape that is written as ``4x4``."""
    found = re.fullmatch(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: give rows and columns, such as 4x4")
    return int(found[1]), int(found[2])
