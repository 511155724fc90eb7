"""Packs a checkpoint of a billion weights, in several files as the Hub has it, and verifies the result.

Writing the checkpoint takes disk space of eight times ``--weights`` bytes, the file included. Each task runs in a
process of its own: its memory is what it takes beyond the same task for a checkpoint of one million weights.
Run: make bench-large.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from machine import console, say_machine
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file

from lightning_muws import save_compressed, verify_compressed

MB = 1e6
WIDTH = 4096  # columns of each weight
LAYERS, SHARDS = 60, 10
TASKS = ("pack, lossless", "verify")


def write_checkpoint(folder: Path, n_weights: int) -> Path:
    """Write weights of normal numbers in several files, and return their index."""
    rows, places = n_weights // WIDTH // LAYERS, {}
    for shard in track(range(SHARDS), "writing the checkpoint", console=console):
        names = [f"layers.{i}.weight" for i in range(shard, LAYERS, SHARDS)]
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        save_file({name: 0.02 * torch.randn(rows, WIDTH) for name in names}, folder / file)
        places |= dict.fromkeys(names, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 4 * rows * WIDTH * LAYERS}, "weight_map": places}))
    return index


def work(task: str, folder: Path) -> dict[str, float]:
    """Do one task in this process, and return its seconds, its peak memory and the bytes of the file."""
    torch.set_num_threads(1)
    index, path = folder / "model.safetensors.index.json", folder / "model.muws"
    start, clock = time.process_time(), time.perf_counter()
    if task == TASKS[0]:
        save_compressed(index, path)
    else:
        verify_compressed(path)
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "cpu": time.process_time() - start,
        "seconds": time.perf_counter() - clock,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "bytes": path.stat().st_size,
    }


def run(task: str, folder: Path) -> dict[str, float]:
    """Do one task in a process of its own."""
    done = subprocess.run(  # noqa: S603  our own code
        [sys.executable, __file__, "--task", task, "--folder", str(folder)], stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--weights", type=int, default=10**9)
    options.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.task:
        sys.stdout.write(json.dumps(work(chosen.task, chosen.folder)))
        return
    say_machine()
    torch.manual_seed(0)
    table = Table(title=f"{chosen.weights:.3g} float32 weights in {SHARDS} files, one thread")
    for header in ("task", "file, MB", "times smaller", "MB/s of weights", "MB/s, CPU time", "memory beyond, MB"):
        table.add_column(header, justify="left" if header == "task" else "right")
    with tempfile.TemporaryDirectory() as small, tempfile.TemporaryDirectory() as large:
        write_checkpoint(Path(small), LAYERS * WIDTH * 4)
        write_checkpoint(Path(large), chosen.weights)
        dense = sum(file.stat().st_size for file in Path(large).glob("*.safetensors"))
        for task in TASKS:
            beside, found = run(task, Path(small)), run(task, Path(large))
            table.add_row(
                task,
                f"{found['bytes'] / MB:.0f}",
                f"{dense / found['bytes']:.2f}",
                f"{dense / found['seconds'] / MB:.0f}",
                f"{dense / found['cpu'] / MB:.0f}",
                f"{(found['peak'] - beside['peak']) / MB:.0f}",
            )
            console.print(f"{task}: {found['seconds']:.0f} s")
    console.print(table)


if __name__ == "__main__":
    main()
