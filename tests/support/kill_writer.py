"""Kills a process that writes one file over and over, at random moments, and looks at what is left. POSIX.

Run: python -m tests.support.kill_writer 200
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from lightning_muws import load_compressed, save_compressed, verify_compressed
from tests.support.strategies import same_bytes


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def write_for_ever(states: list[dict[str, torch.Tensor]], path: Path) -> None:
    while True:
        for state in states:
            save_compressed(state, path)


def kill(n: int, folder: Path) -> dict[str, int]:
    """Return how often the file was missing or broken, and how often the kill came while one was being written."""
    path = folder / "model.muws"
    # bytes that take no time to code, so that most of it goes into writing
    states = [{"w": torch.randint(0, 256, (4 << 20,), generator=seeded(i), dtype=torch.uint8)} for i in (0, 1)]
    start = time.perf_counter()
    save_compressed(states[0], path)
    longest = 3 * (time.perf_counter() - start)
    found = {"kills": 0, "broken": 0, "while writing": 0}
    moments = random.Random(0)  # noqa: S311  no secret
    for _ in range(n):
        child = os.fork()
        if not child:
            write_for_ever(states, path)
        time.sleep(moments.uniform(0.0, longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left = [p for p in folder.iterdir() if p != path]
        found["kills"] += 1
        found["while writing"] += bool(left)
        try:
            verify_compressed(path)
            loaded = load_compressed(path)
            found["broken"] += not any(same_bytes(loaded["w"], state["w"]) for state in states)
        except (OSError, ValueError):
            found["broken"] += 1
        for p in left:
            p.unlink()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        result = kill(int(sys.argv[1]), Path(name))
    sys.stdout.write(f"{result}\n")
    sys.exit(bool(result["broken"]))
