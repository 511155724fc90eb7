"""Speed of saving and loading `.muws` files: native coder, numpy, the reader in C, and zipnn. Run: make bench-coder.

Weights are random, which is the worst case: the bytes of their mantissas do not compress. MB are of float32.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from file import zipnn
from machine import console, interleaved, say_machine
from rich.table import Table
from torch import Tensor

from lightning_muws import MicroStructure, load_compressed, save_compressed
from lightning_muws.artifact import native

ROUNDS = 5
FEW = 100  # tensors that zipnn is compared on
READER = Path(__file__).parents[2] / "build" / "bench_reader"


def networks(layers: int) -> dict[str, dict[str, Tensor]]:
    """Return a dense network of layers of 16.8 MB, the same in blocks of 4x4, and one of small tensors."""
    generator = torch.Generator().manual_seed(0)
    dense = {f"{i}.weight": torch.randn(1024, 4096, generator=generator) * 0.02 for i in range(layers)}
    structure = MicroStructure((4, 4), 0.5, 0.3)
    return {
        "dense": dense,
        "4x4, 50 % pruned, 30 % unified": {name: structure.project(x) for name, x in dense.items()},
        "1,500 tensors of 32x32": {f"{i}": torch.randn(32, 32, generator=generator) for i in range(1500)},
    }


def at(level: str, task: Callable[[], object]) -> Callable[[], object]:
    """Return the task as it runs with a level of the coder, or with numpy for ``none``."""

    def run() -> object:
        os.environ["MUWS_CODER"] = level
        return task()

    return run


def zipped(state: dict[str, Tensor], path: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return what writes a file of what zipnn makes of each tensor, and what reads it; on one thread."""
    coder, lengths = zipnn.ZipNN(input_format="torch", threads=1), []

    def write() -> None:
        coded = [coder.compress(x.clone()) for x in state.values()]  # it changes what it is given
        lengths[:] = map(len, coded)
        path.write_bytes(b"".join(coded))

    def read() -> list[Tensor]:
        data, at, found = path.read_bytes(), 0, []
        for n in lengths:
            found.append(coder.decompress(data[at : at + n]))
            at += n
        return found

    write()
    if not all(torch.equal(x, y) for x, y in zip(read(), state.values(), strict=True)):
        raise RuntimeError("not what was written")
    return write, read


def read_in_c(path: Path) -> list[float]:
    """Return the seconds of each round in which the reader in C decodes a file to float32; it makes no tensors."""
    done = subprocess.run([READER, path, str(ROUNDS)], check=True, capture_output=True, text=True)  # noqa: S603  our own
    return list(map(float, done.stdout.split()))


def shown(n_bytes: int, times: list[float]) -> str:
    rates = [n_bytes / 1e6 / seconds for seconds in times]
    return f"{median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"


def main(layers: int = 4) -> None:
    say_machine()
    best = native.level()
    levels = ["none", *([] if best is None else native.LEVELS[: best + 1])]
    table = Table(title="MB of float32 a second: median (smallest to largest)")
    for header in ("network", "MB", "coder", "save", "load"):
        table.add_column(header, justify="left" if header in ("network", "coder") else "right")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.muws"
        for name, state in networks(layers).items():
            n_bytes = sum(x.nbytes for x in state.values())
            saves = {level: at(level, lambda state=state: save_compressed(state, path)) for level in levels}
            loads = {level: at(level, lambda: load_compressed(path)) for level in levels}
            if zipnn and len(state) < FEW:
                saves["zipnn"], loads["zipnn"] = zipped(state, Path(folder) / "m.znn")
            written, read = interleaved(saves, ROUNDS), interleaved(loads, ROUNDS)
            for level in saves:
                label = {"none": "numpy"}.get(level, level)
                cells = shown(n_bytes, written[level]), shown(n_bytes, read[level])
                table.add_row(name, f"{n_bytes / 1e6:.0f}", label, *cells)
            if READER.exists():
                table.add_row(name, f"{n_bytes / 1e6:.0f}", "reader in C", "", shown(n_bytes, read_in_c(path)))
    console.print(table)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
