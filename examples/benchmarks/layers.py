"""Speed of a Linear in the C library, beside a dense one in C and in torch. Run: make bench-coder.

In process time, one thread. The ways of the C library take turns, and so do they and torch.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from time import process_time

import torch
from machine import console, say_machine
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from lightning_muws import MicroStructure, save_compressed

PROGRAM = Path(__file__).parents[2] / "build" / "bench_layers"
LEAST_S = 0.02  # of a measurement
CASES = {
    "4x4, 90 % pruned": MicroStructure((4, 4), 0.9),
    "4x4, 75 % pruned": MicroStructure((4, 4), 0.75),
    "4x4, 50 % pruned, 30 % unified": MicroStructure((4, 4), 0.5, 0.3),
    "8x8, 50 % pruned, 50 % unified": MicroStructure((8, 8), 0.5, 0.5),
    "4x4, none pruned": MicroStructure((4, 4), 0.0, 0.0),
}
WAYS = {"values": "packed values", "signs": "packed signs", "dense": "all weights packed", "loop": "loop over dense"}


def in_torch(w: Tensor, batch: int) -> float:
    """Return the process seconds of a dense Linear in torch."""
    x = torch.randn(batch, w.shape[1])
    n = 1
    while True:
        start = process_time()
        for _ in range(n):
            F.linear(x, w)
        took = process_time() - start
        if took >= LEAST_S:
            return took / n
        n = 1 + int(1.5 * n * LEAST_S / (took + 1e-6))


def in_c(path: Path, dense: Path, batch: int) -> tuple[dict[str, float], dict[str, int]]:
    """Return the process seconds of each way of the C library, and the bytes that it takes."""
    command = [PROGRAM, path, "w", dense, str(batch), "1"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603  our own
    found = dict(line.split() for line in done.stdout.splitlines())
    sizes = {name.removesuffix("_bytes"): int(n) for name, n in found.items() if name.endswith("_bytes")}
    return {name: float(found[name]) for name in sizes}, sizes


def main(rounds: int = 7, size: int = 1024) -> None:
    """Measure each case for one sample and for a batch.

    Args:
        rounds: Rounds of every measurement.
        size: Inputs and outputs of the layer.
    """
    say_machine()
    torch.set_num_threads(1)
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    table = Table(title=f"Linear {size}x{size}: times as fast as dense in torch, median (smallest to largest)")
    for header in ("weight", "batch", "torch, us", *WAYS.values(), "bytes of values", "of signs"):
        table.add_column(header, justify="left" if header == "weight" else "right")
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        path, dense = Path(folder) / "m.muws", Path(folder) / "dense.muws"
        save_compressed({"w": noise}, dense)
        for name, structure in CASES.items():
            w = structure.project(noise)
            save_compressed({"w": w}, path, blocks=structure.block_shape)
            for batch in (1, 32):
                gains, times = defaultdict(list), []
                in_torch(w, batch)
                for _ in range(rounds):
                    theirs, (ours, sizes) = in_torch(w, batch), in_c(path, dense, batch)
                    times.append(theirs)
                    for way, seconds in ours.items():
                        gains[way].append(theirs / seconds)
                cells = [f"{median(g):.2f} ({min(g):.2f} to {max(g):.2f})" if (g := gains[way]) else "" for way in WAYS]
                n_bytes = [f"{sizes[way] / w.nbytes:.0%}" if way in sizes else "" for way in ("values", "signs")]
                table.add_row(name, str(batch), f"{1e6 * median(times):.0f}", *cells, *n_bytes)
    console.print(table)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
