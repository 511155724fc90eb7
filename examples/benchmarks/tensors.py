"""Bytes that tensors of other kinds than dense weights take, against the best of other coders. Run: make bench.

Masks, indices, quantised weights in blocks, repeated layers and values of a palette, of sizes as networks have them.
Each is saved beside a small weight, and what the file grows by is compared to the best that other coders make of the
bare bytes, without name, dtype and shape: zstd and lzma of the bytes and of their planes, blosc2 with each filter, and
zipnn. What is not installed is left out. The last columns are those of a file of the tensor alone: its header and
manifest take about 420 bytes, among them a SHA-256.
"""

from __future__ import annotations

import lzma
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from file import impose, optional
from machine import console, say_machine
from rich.table import Table
from torch import Tensor

from lightning_muws import load_compressed, save_compressed

MOST = 1.05  # of the best peer
zstandard, zipnn, blosc2 = optional("zstandard"), optional("zipnn"), optional("blosc2")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quantised(dtype: str) -> Tensor:
    """Return a weight in blocks of 4x4, half of them pruned and 30 % unified, in steps or rounded."""
    weight = impose(torch.randn(1024, 1024, generator=seeded(0)), 0.5, 0.3)
    if dtype.startswith("float8"):
        return weight.to(getattr(torch, dtype))
    steps = (weight / weight.abs().max() * 127).round()
    return (steps if dtype == "int8" else steps + 128).to(getattr(torch, dtype))


def blocks(rows: int, cols: int) -> Tensor:
    """Return a mask of blocks of 4x4."""
    kept = torch.rand(rows // 4, cols // 4, generator=seeded(2)) > 0.5
    return kept.repeat_interleave(4, 0).repeat_interleave(4, 1)


def palette(n: int) -> Tensor:
    return torch.randn(n, generator=seeded(5))[torch.randint(0, n, (512, 512), generator=seeded(6))]


def rows() -> dict[str, list[Tensor]]:
    """Return the tensors of each row."""
    ones, any_index = torch.ones(2048, 2048, dtype=torch.bool), torch.randint(0, 10**7, (50_000,), generator=seeded(0))
    found = {f"{dtype}, blocks": [quantised(dtype)] for dtype in ("int8", "uint8", "float8_e4m3fn", "float8_e5m2")}
    found |= {f"causal mask, {n}": [ones[:n, :n].tril()] for n in (512, 1024, 2048)}
    found |= {
        "window of 256, 2048": [ones.tril().triu(-255)],
        "mask of rows, 3072x768": [(torch.rand(3072, 1, generator=seeded(1)) > 0.5).expand(3072, 768)],
        "mask of columns, 768x3072": [(torch.rand(1, 3072, generator=seeded(1)) > 0.5).expand(768, 3072)],
        "mask of blocks, 256x256": [blocks(256, 256)],
        "mask of blocks, 3072x768": [blocks(3072, 768)],
        "mask of weights, 10 %": [torch.rand(512, 512, generator=seeded(2)) > 0.9],
        "sorted int64": [any_index.sort().values],
        "sorted int32": [any_index.sort().values.int()],
        "counted int64": [torch.arange(100_000)],
        "multiples, int32": [torch.arange(0, 300_000, 3, dtype=torch.int32)],
        "relative positions, int64": [torch.arange(256)[:, None] - torch.arange(256) + 255],
        "four equal layers": [torch.randn(256, 1024, generator=seeded(0))] * 4,
        **{f"palette of {n}": [palette(n)] for n in (16, 256, 1000)},
    }
    return found


def peers(tensors: list[Tensor]) -> dict[str, int]:
    """Return how many bytes others make of the bare values of tensors of one dtype."""
    size = tensors[0].element_size()
    raw = np.concatenate([x.contiguous().view(-1).view(torch.uint8).numpy() for x in tensors])
    coders: dict[str, Callable[[bytes], bytes]] = {
        "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE, preset=9),
        "zlib": lambda data: zlib.compress(data, 9),
    }
    if zstandard:
        coders["zstd"] = zstandard.ZstdCompressor(level=19).compress
    planes = np.ascontiguousarray(raw.reshape(-1, size).T).tobytes()
    found = {name: len(coder(raw.tobytes())) for name, coder in coders.items()}
    if size > 1:
        found |= {f"{name} of planes": len(coder(planes)) for name, coder in coders.items()}
    if blosc2:
        for choice in (blosc2.Filter.NOFILTER, blosc2.Filter.SHUFFLE, blosc2.Filter.BITSHUFFLE):
            settings = {"typesize": size, "clevel": 9, "filters": [choice], "codec": blosc2.Codec.ZSTD, "nthreads": 1}
            found[f"blosc2 {choice.name.lower()}"] = len(blosc2.compress2(raw.tobytes(), **settings))
    if zipnn and tensors[0].is_floating_point() and size > 1:
        coder = zipnn.ZipNN(input_format="torch")
        found["zipnn"] = sum(len(coder.compress(x.clone())) for x in tensors)
    return found


def saved(state: Mapping[str, Tensor], path: Path) -> int:
    """Return the bytes of a file, which loads bit for bit."""
    save_compressed(state, path)
    loaded = load_compressed(path)
    if not all(torch.equal(*(one.view(-1).view(torch.uint8) for one in (loaded[k], x))) for k, x in state.items()):
        raise RuntimeError("not what was saved")
    return path.stat().st_size


def main() -> None:
    say_machine()
    absent = [name for name, module in {"zstandard": zstandard, "zipnn": zipnn, "blosc2": blosc2}.items() if not module]
    weight = {"weight": torch.randn(64, 64, generator=seeded(9))}
    table = Table(title="Bytes beside a weight, ours over the best peer" + (f"; without {absent}" if absent else ""))
    for header in ("tensor", "best peer", "bytes", ".muws", "ratio", "alone", "ratio"):
        table.add_column(header, justify="right")
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.muws"
        base = saved(weight, path)
        for name, tensors in rows().items():
            state = {f"layers.{i}": x.clone(memory_format=torch.contiguous_format) for i, x in enumerate(tensors)}
            others = peers(tensors)
            best = min(others, key=lambda key: others[key])
            grown, alone = saved(weight | state, path) - base, saved(state, path)
            ratios = [n_bytes / others[best] for n_bytes in (grown, alone)]
            cells = (f"{others[best]:,}", f"{grown:,}", f"{ratios[0]:.3f}", f"{alone:,}", f"{ratios[1]:.3f}")
            table.add_row(name, best, *cells)
            missed += [name] if ratios[0] > MOST else []
    console.print(table)
    console.print(f"at most {MOST} of the best peer: {'all' if not missed else 'not ' + ', '.join(missed)}")


if __name__ == "__main__":
    main()
