"""`muws inspect`, `verify`, `unpack` and `diff`: the commands that read files of weights."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from lightning_muws.artifact.container import replacing
from lightning_muws.artifact.load import inspect_compressed, load_compressed, verify_compressed
from lightning_muws.artifact.source import Stored, read_state
from lightning_muws.commands.options import SOURCE, STANDARD_INPUT, add_force, add_max_bytes, check_target, opened
from lightning_muws.commands.output import BAD, DONE, TROUBLE, progress, reason, say, say_json
from lightning_muws.errors import FormatError, LimitError, MuwsError, SettingError
from lightning_muws.tables import Column, Table, terminal_width

UNPACKED = (".safetensors", ".pt", ".pth")  # endings of the files that unpack can write


def add_parsers(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add these subcommands; ``command`` adds one and returns its parser."""
    shown = command("inspect", inspect, "show the content of a .muws file, without decoding it")
    shown.add_argument("file", type=Path, help="the .muws file; - for standard input")

    checked = command("verify", verify, "check every checksum and decode every stream of .muws files")
    checked.add_argument("file", type=Path, nargs="+", help="the .muws files; - for standard input")

    unpacked = command("unpack", unpack, "write the tensors of a .muws file as .safetensors, .pt or .pth")
    unpacked.add_argument("file", type=Path, help="the .muws file; - for standard input")
    unpacked.add_argument("target", type=Path, help="the file to write; its ending chooses the format")
    add_force(unpacked)

    compared = command("diff", diff, "compare the tensors of two files")
    compared.add_argument("one", type=Path, help=f"{SOURCE}; - for standard input")
    compared.add_argument("other", type=Path, help="the same")

    for parser in (checked, unpacked, compared):
        add_max_bytes(parser)


def inspect(options: argparse.Namespace) -> int:
    """Show what the manifest of a file declares."""
    with opened(options.file) as path:
        info = replace(inspect_compressed(path), path=_shown(options.file))
    say_json(info.to_dict()) if options.json else say(info)
    return DONE


def verify(options: argparse.Namespace) -> int:
    """Check all of each file, and return the worst result: a file that cannot be read is worse than a damaged one."""
    found, code = [], DONE
    for file in options.file:
        about = {"file": _shown(file)}
        try:
            with opened(file, options.max_bytes) as path, progress("verifying", options.json) as update:
                info = verify_compressed(path, max_bytes=options.max_bytes, progress=update)
        except (MuwsError, OSError) as error:
            if len(options.file) == 1:
                raise
            code = max(code, verdict(error))
            found.append({**about, "ok": False, "error": reason(error)})
            if not options.json:
                say(f"muws: {reason(error)}", sys.stderr)
        else:
            found.append({**about, "ok": True})
            if not options.json:
                say(f"{about['file']}: ok, {len(info.tensors)} tensors")
    if options.json:
        say_json(found if len(found) > 1 else found[0])
    return code


def verdict(error: Exception) -> int:
    """Return the exit code of a file that was not verified; one beyond ``--max-bytes`` may be intact."""
    return BAD if isinstance(error, FormatError) and not isinstance(error, LimitError) else TROUBLE


def _shown(path: Path) -> str:
    return "standard input" if path == STANDARD_INPUT else str(path)


def unpack(options: argparse.Namespace) -> int:
    """Write the tensors of a `.muws` file to a file that other programs read."""
    target = options.target
    check_target(target, options.file, UNPACKED, force=options.force)
    with opened(options.file, options.max_bytes) as path, progress("unpacking", options.json) as update:
        state = load_compressed(path, max_bytes=options.max_bytes, progress=update)
    if target.suffix == ".safetensors":
        encoded = _safetensors(state, target)
        with replacing(target) as file:
            file.write(encoded)
    else:
        with replacing(target) as file:
            _torch_save(state, file)
    if options.json:
        say_json({"file": str(target), "tensors": len(state)})
    else:
        say(f"{target}: written, {len(state)} tensors")
    return DONE


def _torch_save(state: Mapping[str, Tensor], file: IO[bytes]) -> None:
    """Write tensors as torch.save does."""
    try:
        torch.save(state, file)
    except RuntimeError as error:  # torch hides the error of the system behind one about its own writer
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _safetensors(state: Mapping[str, Tensor], target: Path) -> bytes:
    if "__metadata__" in state:
        raise SettingError(
            f"{target} cannot be written: no tensor in it can be named '__metadata__'; give a name that ends in .pt"
        )
    try:
        # safetensors refuses tensors that share memory: each gets a copy
        return save({name: x.clone() for name, x in state.items()})
    except (KeyError, SafetensorError, UnicodeError) as error:
        raise SettingError(
            f"{target} cannot be written: safetensors does not support {error}; give a name that ends in .pt"
        ) from None


def diff(options: argparse.Namespace) -> int:
    """Compare the tensors of two files, bit for bit."""
    with ExitStack() as open_files:
        one, other = (_tensors(path, options, open_files) for path in (options.one, options.other))
        return _compare(one, other, is_json=options.json)


def _compare(one: Mapping[str, Stored], other: Mapping[str, Stored], *, is_json: bool) -> int:
    """Show how two lists of tensors differ."""
    names = {**one, **other}
    rows = [(name, *_difference(one.get(name), other.get(name))) for name in names]
    different = [row for row in rows if row[1]]
    if is_json:
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


def _tensors(path: Path, options: argparse.Namespace, open_files: ExitStack) -> Mapping[str, Stored]:
    """Return the tensors of a file, which are read while ``open_files`` is open."""
    path = open_files.enter_context(opened(path, options.max_bytes))
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
