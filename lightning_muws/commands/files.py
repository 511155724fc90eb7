"""The `muws` command: looks into `.muws` files, checks, makes, unpacks, compares and times them. Needs no Lightning."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import save
from torch import Tensor

from lightning_muws.artifact.container import replacing
from lightning_muws.artifact.load import MAX_BYTES, inspect_compressed, load_compressed, verify_compressed
from lightning_muws.artifact.save import save_compressed
from lightning_muws.artifact.source import plain, read_state
from lightning_muws.commands import bench
from lightning_muws.errors import MuwsError, SettingError

DONE, NO, TROUBLE = 0, 1, 2  # exit codes: all is well; broken or different; the command could not be carried out
WIDE = 150  # columns of a table that is printed to a file


def main(args: Sequence[str] | None = None) -> int:
    """Carry out the command; return its exit code: 0 done, 1 broken or different, 2 in trouble, with the reason."""
    options = _parser().parse_args(args)
    try:
        return int(options.run(options))
    except (MuwsError, OSError) as error:
        if options.json:
            _say_json({"error": str(error)})
        else:
            Console(stderr=True, soft_wrap=True).print(f"muws: {error}", style="red", markup=False, highlight=False)
        return NO if options.run is _verify and isinstance(error, MuwsError) else TROUBLE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="muws", description="Work with .muws files.")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], int], says: str, *files: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=says, description=f"{says[0].upper()}{says[1:]}.")
        added.set_defaults(run=run)
        for file in files:
            added.add_argument(file, type=Path)
        added.add_argument("--json", action="store_true", help="print JSON instead of tables")
        return added

    command("inspect", _inspect, "show what a file says of itself, without decoding it", "file")
    limited = [command("verify", _verify, "check every checksum and every stream of a file", "file")]
    pack = command(
        "pack", _pack, "make a file of a .ckpt, .pt, .pth, .safetensors, or anew of a .muws", "source", "file"
    )
    pack.add_argument("--block", type=_shape, metavar="ROWSxCOLS", help="one block shape for all; else found")
    pack.add_argument("--max-error", type=float, default=0.0, help="how far a weight may move (0)")
    names = ("tensor_max", "model_max", "absolute")
    pack.add_argument("--relative-to", choices=names, default=names[0], help=f"what it is a share of ({names[0]})")
    pack.add_argument("--value-dtype", choices=("float16", "bfloat16"), help="round values to this dtype instead")
    pack.add_argument("--lossy", choices=("weights", "all"), default="weights", help="what may lose anything (weights)")
    limited += [command("unpack", _unpack, "write a file as .safetensors, .pt or .pth", "file", "target")]
    bench.add_parser(commands)
    limited += [command("diff", _diff, "compare the tensors of two files of any of these kinds", "one", "other")]
    for added in limited:
        added.add_argument("--max-bytes", type=int, default=MAX_BYTES, help=f"most bytes of all tensors ({MAX_BYTES})")
    return parser


def _inspect(options: argparse.Namespace) -> int:
    _say(inspect_compressed(options.file), options.json)
    return DONE


def _verify(options: argparse.Namespace) -> int:
    with _progress("verifying", options.json) as progress:
        info = verify_compressed(options.file, max_bytes=options.max_bytes, progress=progress)
    if options.json:
        _say_json({"file": str(options.file), "ok": True})
    else:
        Console(soft_wrap=True).print(f"{options.file}: whole, {len(info.tensors)} tensors", markup=False)
    return DONE


def _pack(options: argparse.Namespace) -> int:
    with _progress("packing", options.json) as progress:
        report = save_compressed(
            options.source,
            options.file,
            blocks=options.block,
            max_error=options.max_error,
            relative_to=options.relative_to,
            value_dtype=options.value_dtype,
            lossy=options.lossy,
            progress=progress,
        )
    _say(report, options.json)
    return DONE


def _unpack(options: argparse.Namespace) -> int:
    if options.target.suffix not in (".safetensors", ".pt", ".pth"):
        raise SettingError(f"{options.target} is not allowed: give a name that ends in .safetensors, .pt or .pth")
    with _progress("unpacking", options.json) as progress:
        state = load_compressed(options.file, max_bytes=options.max_bytes, progress=progress)
    with replacing(options.target) as file:
        if options.target.suffix == ".safetensors":
            # safetensors refuses tensors that are one: each gets its own
            file.write(save({name: x.clone() for name, x in state.items()}))
        else:
            torch.save(state, file)
    if options.json:
        _say_json({"file": str(options.target), "tensors": len(state)})
    return DONE


def _diff(options: argparse.Namespace) -> int:
    one, other = (_tensors(path, options) for path in (options.one, options.other))
    rows = [(name, *_difference(one.get(name), other.get(name))) for name in {**one, **other}]
    apart = [row for row in rows if row[1]]
    if options.json:
        found = [{"name": name, "difference": what, "max_error": error} for name, what, error in apart]
        _say_json({"equal": not apart, "tensors": len(rows), "different": found})
        return NO if apart else DONE
    table = Table(title=f"{len(apart)} of {len(rows)} tensors differ")
    for header in ("tensor", "difference", "largest"):
        table.add_column(header)
    for name, what, error in apart:
        table.add_row(name, what, "" if error is None else f"{error:.3g}")
    _console().print(table if apart else f"{len(rows)} tensors, all equal bit for bit")
    return NO if apart else DONE


def _tensors(path: Path, options: argparse.Namespace) -> Mapping[str, Tensor]:
    if path.suffix == ".muws":
        with _progress("reading", options.json) as progress:
            return load_compressed(path, max_bytes=options.max_bytes, progress=progress)
    return read_state(path).tensors


def _difference(a: Tensor | None, b: Tensor | None) -> tuple[str, float | None]:
    """Return in what two tensors differ, empty for nothing, and the largest difference of their values."""
    if a is None or b is None:
        return f"only in the {'other' if a is None else 'first'}", None
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}", None
    if torch.equal(*(plain(x).reshape(-1).view(torch.uint8) for x in (a, b))):
        return "", 0.0
    wide = torch.complex128 if a.is_complex() else torch.float64
    apart = float((a.to(wide) - b.to(wide)).abs().max())
    return ("values", apart) if math.isfinite(apart) else ("values, not all finite", None)


def _shape(text: str) -> tuple[int, int]:
    rows, _, cols = text.partition("x")
    return int(rows), int(cols)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDE)


def _say(thing: Any, as_json: bool) -> None:
    if as_json:
        _say_json(thing.to_dict())
    else:
        _console().print(thing)


def _say_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


@contextmanager
def _progress(what: str, is_quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal that says how far it is, on standard error."""
    columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=is_quiet or not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
