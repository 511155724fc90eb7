"""Damages small files in so many random ways, and counts what a reader makes of it.

Run: python -m tests.support.fuzz_file 10000
"""

import collections
import sys
import tempfile
from pathlib import Path

import torch

from lightning_muws import load_compressed
from lightning_muws.errors import FormatError
from tests.support.forge import corrupt, small_model


def fuzz(seeds: range, folder: Path) -> dict[str, int]:
    """Return how many damaged files were refused, loaded in silence, or met with another exception."""
    path, other = folder / "a.muws", folder / "b.muws"
    small_model(path)
    small_model(other, seed=1)
    good, others = path.read_bytes(), other.read_bytes()
    found: dict[str, int] = collections.Counter(refused=0, silent=0, other=0)
    for seed in seeds:
        bad = corrupt(good, others, seed)
        if bad in (good, others):
            continue
        path.write_bytes(bad)
        try:
            load_compressed(path)
            found["silent"] += 1
        except FormatError:
            found["refused"] += 1
        except Exception as error:  # what is counted is that there is none
            found["other"] += 1
            found[f"{seed}: {error!r}"] += 1
    return dict(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        result = fuzz(range(int(sys.argv[1])), Path(name))
    sys.stdout.write(f"{result}\n")
    sys.exit(bool(result["silent"] or result["other"]))
