"""What several subcommands share: sizes as 8GB, standard input as a file, and the check of a file to write."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_muws.artifact.container import check_place
from lightning_muws.artifact.load import MAX_BYTES
from lightning_muws.errors import MuwsError, SettingError

STANDARD_INPUT = Path("-")
SOURCE = "a .muws, .ckpt, .pt, .pth or .safetensors file, an index of several safetensors files, or their folder"
UNITS = {"": 1, **{f"{letter}{tail}": base**i for i, letter in enumerate("KMGT", 1) for tail, base in
                   (("", 1000), ("B", 1000), ("IB", 1024))}, "B": 1}  # fmt: skip
BLOCK = 1 << 20  # bytes of standard input that are copied at a time


def add_max_bytes(parser: argparse.ArgumentParser) -> None:
    """Add ``--max-bytes``."""
    parser.add_argument(
        "--max-bytes",
        type=size,
        default=MAX_BYTES,
        metavar="SIZE",
        help="refuse .muws files whose tensors take more bytes in memory than this, such as 500MB or 16GiB, and other "
        "files that expand to more (default: 8GiB)",
    )


def add_force(parser: argparse.ArgumentParser) -> None:
    """Add ``--force``."""
    parser.add_argument("--force", "-f", action="store_true", help="replace the file if it exists")


def size(text: str) -> int:
    """Return the bytes that a text such as ``8GB``, ``1.5GiB`` or ``1000`` stands for."""
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([A-Za-z]{0,3})", text)
    if not found or found[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: give a number of bytes, such as 500MB or 16GiB")
    return (
        int(float(found[1]) * UNITS[found[2].upper()]) if "." in found[1] else int(found[1]) * UNITS[found[2].upper()]
    )


def block_shape(text: str) -> tuple[int, int]:
    """Return the block shape that is written as ``4x4``."""
    found = re.fullmatch(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: give rows and columns, such as 4x4")
    return int(found[1]), int(found[2])


def check_target(target: Path, source: Path, suffixes: tuple[str, ...], *, force: bool) -> None:
    """Check a file to write before anything is read.

    Raises:
        SettingError: Its ending is wrong, it cannot be written, it is the source, or it exists and is not to be
            replaced.
    """
    check_place(target)
    if target.suffix not in suffixes:
        *most, last = suffixes
        raise SettingError(f"{target} is not allowed: give a name that ends in {', '.join(most) or last}"
                           f"{f' or {last}' if most else ''}")  # fmt: skip
    if target.exists():
        if source.exists() and target.samefile(source):
            raise SettingError(f"{target} is the file that is read: give another name")
        if not force:
            raise SettingError(f"{target} exists: give another name, or --force to replace it")


@contextmanager
def opened(path: Path, max_bytes: int = MAX_BYTES) -> Iterator[Path]:
    """Yield the path of a file: itself, or that of a copy of standard input if it is ``-``; errors name the latter.

    Raises:
        SettingError: Standard input has more than ``max_bytes``.
    """
    if path != STANDARD_INPUT:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="muws-") as folder:
        copy = Path(folder) / "input"
        _copy_input(copy, max_bytes)
        named = copy.rename(copy.with_suffix(_suffix(copy)))
        try:
            yield named
        except MuwsError as error:
            raise type(error)(str(error).replace(str(named), "standard input")) from None


def _copy_input(copy: Path, max_bytes: int) -> None:
    """Write all of standard input to a file."""
    if sys.stdin is None:
        raise SettingError("standard input is closed: give a file")
    source, n_bytes = sys.stdin.buffer, 0
    with copy.open("wb") as file:
        while data := source.read(BLOCK):
            n_bytes += len(data)
            if n_bytes > max_bytes:
                raise SettingError(
                    f"standard input has more than {max_bytes:,} bytes: raise --max-bytes, or give a file"
                )
            file.write(data)


def _suffix(path: Path) -> str:
    """Return the ending for a file of unknown format, by its first bytes."""
    with path.open("rb") as file:
        start = file.read(1 << 10)
    if b'{"__metadata__":{"format":"muws"' in start:
        return ".muws"
    return ".safetensors" if start[8:9] == b"{" and start[:2] != b"PK" else ".pt"
