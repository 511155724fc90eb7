"""Damages the files that pack reads in so many random ways, and counts what becomes of each.

Run: python -m tests.support.fuzz_sources 2000
"""

import collections
import random
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

from lightning_muws import save_compressed
from lightning_muws.errors import SettingError
from tests.support.forge import corrupt

KINDS = ("zip.pt", "legacy.pt", "model.ckpt", "model.safetensors")


def state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a.weight": torch.randn(8, 6, generator=generator), "a.bias": torch.arange(5), "b": torch.ones(2, 2).half()}


def write(path: Path, seed: int) -> bytes:
    """Write a small file of a kind, and return its bytes."""
    if path.suffix == ".safetensors":
        save_file(state(seed), path)
    elif path.suffix == ".ckpt":
        torch.save({"pytorch-lightning_version": "2.6", "epoch": seed, "state_dict": state(seed)}, path)
    else:
        torch.save(state(seed), path, _use_new_zipfile_serialization="zip" in path.name)
    return path.read_bytes()


def damage(good: bytes, other: bytes, seed: int) -> bytes:
    """Return a file with bits flipped, cut or spliced; half of the times only where names, shapes and code are."""
    r = random.Random(seed)  # noqa: S311  no secret
    if r.random() < 0.5:
        return corrupt(good, other, seed)
    found = bytearray(good)
    start = max(0, good.find(b"data.pkl"))
    for _ in range(r.choice((1, 1, 2, 3))):
        found[r.randrange(start, min(len(found), start + 700))] = r.randrange(256)
    return bytes(found)


def fuzz(kind: str, seeds: range, folder: Path) -> dict[str, int]:
    """Return how many damaged files were packed, refused, or met with another exception."""
    path = folder / kind
    good, other = write(path, 0), write(path, 1)
    found: dict[str, int] = collections.Counter(packed=0, refused=0, other=0)
    for seed in seeds:
        path.write_bytes(damage(good, other, seed))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                save_compressed(path, folder / "m.muws", max_bytes=1 << 26)
            found["packed"] += 1
        except SettingError:
            found["refused"] += 1
        except Exception as error:  # what is counted is that there is none
            found["other"] += 1
            found[f"{seed}: {error!r}"[:200]] += 1
    return dict(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    bad = 0
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as name:
            result = fuzz(kind, range(int(sys.argv[1])), Path(name))
        sys.stdout.write(f"{kind}: {result}\n")
        bad += result["other"]
    sys.exit(bool(bad))
