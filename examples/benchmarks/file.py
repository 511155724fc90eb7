"""Sizes and speeds of `.muws` files against what else there is, on weights that were really trained. Run: make bench.

Structure is imposed on each weight of two or more axes: blocks of 4x4 of the least magnitudes are pruned, then those
nearest to one magnitude unified, the rest is free. zstandard and zipnn are compared to where they are installed.
"""

from __future__ import annotations

import importlib
import lzma
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import numpy as np
import torch
from machine import console, interleaved, say_machine
from pretrained import weights
from rich.table import Table
from safetensors.torch import load, save, save_file
from torch import Tensor
from torch.nn import functional as F

from lightning_muws import load_compressed, save_compressed
from lightning_muws.artifact.save import SaveReport

BLOCK = (4, 4)
MIXES = {  # shares pruned and unified
    "50/30/20": (0.5, 0.3), "70/20/10": (0.7, 0.2), "90/8/2": (0.9, 0.08), "0/80/20": (0.0, 0.8), "0/100/0": (0.0, 1.0),
}  # fmt: skip
BITS = (8, 6, 4)
# Dense bytes over bytes of nncodec 2.1.3 (an implementation of ISO/IEC 15938-17), lossless, for 8, 6 and 4 bits.
# Measured once, in a separate environment (it needs numpy < 2), on integers made by the recipe of impose, quantised.
NNC = {
    ("MTCNN", "50/30/20"): (12.2, 18.0, 60.4),
    ("MTCNN", "90/8/2"): (54.8, 76.1, 120.7),
    ("MTCNN", "0/100/0"): (5.4, 8.5, 16.3),
    ("CREPE", "50/30/20"): (10.8, 16.0, 29.4),
    ("CREPE", "90/8/2"): (47.1, 71.0, 102.0),
    ("CREPE", "0/100/0"): (6.2, 10.6, 19.6),
}


def optional(name: str) -> object | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


zstandard, zipnn = optional("zstandard"), optional("zipnn")


def part(name: str) -> dict[str, Tensor]:
    """Return the part of a network that sizes are measured on."""
    state = weights(name)
    if name == "MiniLM-L6":
        kept = ("encoder.layer.0.", "encoder.layer.1.")
        return {k: v for k, v in state.items() if any(mark in k for mark in kept)}
    if name == "CREPE":
        return {k: v for k, v in state.items() if k.startswith(("conv3.", "conv4.", "conv5.", "classifier."))}
    return state


def impose(weight: Tensor, pruned: float, unified: float) -> Tensor:
    """Return the weight with so many of its blocks pruned, and unified; blocks over the edge count as well."""
    matrix = weight.reshape(len(weight), -1)
    (n_out, n_in), (rows, cols) = matrix.shape, BLOCK

    def tiles(m: Tensor) -> Tensor:
        m = F.pad(m, (0, -n_in % cols, 0, -n_out % rows))
        return m.view(m.shape[0] // rows, rows, -1, cols).transpose(1, 2).reshape(-1, rows * cols)

    blocks, there = tiles(matrix.abs()), tiles(torch.ones_like(matrix))
    size = there.sum(1)
    mean = blocks.sum(1) / size
    loss = (((blocks - mean[:, None]) * there) ** 2).sum(1)
    n = len(blocks)
    order = (blocks.sum(1) / size).argsort()
    zero = torch.zeros(n, dtype=torch.bool)
    zero[order[: round(pruned * n)]] = True
    one = torch.zeros(n, dtype=torch.bool)
    one[loss.masked_fill(zero, torch.inf).argsort()[: round(unified * n)]] = True
    one &= ~zero
    kept = torch.where(one[:, None], mean[:, None], blocks).masked_fill(zero[:, None], 0.0)
    down, across = -(-n_out // rows), -(-n_in // cols)
    merged = kept.view(down, across, rows, cols).transpose(1, 2).reshape(down * rows, across * cols)[:n_out, :n_in]
    return torch.where(merged == 0, 0.0, torch.copysign(merged, matrix)).view(weight.shape)


def structured(state: Mapping[str, Tensor], mix: str) -> dict[str, Tensor]:
    if mix == "dense":
        return dict(state)
    return {k: impose(v, *MIXES[mix]) if v.ndim >= 2 and v.numel() >= 256 else v for k, v in state.items()}


def quantised(weight: Tensor, n_bits: int) -> Tensor:
    """Return whole multiples of one step, the largest of them ``2 ** (n_bits - 1) - 1``."""
    step = weight.abs().max() / (2 ** (n_bits - 1) - 1)
    return (weight / step).round() * step + 0.0  # not -0.0: integers have none


def peers(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return how many bytes others make of a state_dict."""
    plain = save({k: v.contiguous() for k, v in state.items()})
    sizes = {"safetensors": len(plain), "+ lzma": len(lzma.compress(plain, preset=6))}
    if zstandard:
        sizes["+ zstd 19"] = len(zstandard.ZstdCompressor(level=19).compress(plain))
    if zipnn:
        coder = zipnn.ZipNN(input_format="torch")
        sizes["zipnn"] = sum(
            len(coder.compress(v.clone())) if v.numel() > 16 else v.numel() * 4 for v in state.values()
        )
    return sizes


def bound(report: SaveReport) -> float:
    """Return the order-0 entropy of the streams of a file."""
    return sum(stream.entropy_bytes for stream in report.streams)


def sizes(folder: Path) -> None:
    for name in ("MiniLM-L6", "CREPE", "MTCNN"):
        state = part(name)
        dense = sum(v.numel() * v.element_size() for v in state.values())
        table = Table(title=f"{name}, {dense / 1e6:.2f} MB: dense bytes over bytes of the file, bit for bit")
        columns = list(peers({"x": torch.zeros(32)}))
        for header in (
            "pruned/unified/free",
            *columns,
            ".muws",
            "order-0 bound",
            "over the bound",
            "smallest",
            "block",
        ):
            table.add_column(header, justify="right")
        for mix in (*MIXES, "dense"):
            stored = structured(state, mix)
            report = save_compressed(stored, folder / "m.muws")
            again = load_compressed(folder / "m.muws")
            if not all(torch.equal(again[k], v) for k, v in stored.items()):
                raise RuntimeError("not what was saved")
            others = peers(stored)
            n_bytes, least = (folder / "m.muws").stat().st_size, bound(report)
            shapes = {t.block_shape for t in report.tensors if t.block_shape}
            table.add_row(
                mix, *(f"{dense / n:.3f}" for n in others.values()), f"{dense / n_bytes:.3f}", f"{dense / least:.3f}",
                f"{n_bytes / least - 1:+.2%}", "yes" if n_bytes < min(others.values()) else "NO",
                " ".join(f"{r}x{c}" for r, c in sorted(shapes)),
            )  # fmt: skip
        console.print(table)


def integers(folder: Path) -> None:
    table = Table(title="The same integers: dense bytes of the weights over bytes of the whole file, header included")
    for header in (
        "network",
        "pruned/unified/free",
        "bits",
        "nncodec",
        ".muws",
        "smaller by",
        "bytes",
        "order-0 bound",
    ):
        table.add_column(header, justify="right")
    for (name, mix), published in NNC.items():
        state = {k: v for k, v in part(name).items() if v.ndim >= 2}
        dense = sum(v.numel() * 4 for v in state.values())
        for n_bits, theirs in zip(BITS, published, strict=True):
            stored = {k: quantised(v, n_bits) for k, v in structured(state, mix).items()}
            report = save_compressed(stored, folder / "m.muws")
            n_bytes = (folder / "m.muws").stat().st_size
            ours = dense / n_bytes
            verdict = f"{ours / theirs:.2f} x" if ours > theirs else "NOT SMALLER"
            cells = (str(n_bits), str(theirs), f"{ours:.1f}", verdict, f"{n_bytes:,}", f"{dense / bound(report):.1f}")
            table.add_row(name, mix, *cells)
    console.print(table)


def speeds(folder: Path) -> None:
    state = structured(weights("CREPE"), "50/30/20")
    dense = sum(v.numel() * v.element_size() for v in state.values())
    paths = {n: folder / f"m{n}" for n in (".muws", ".pt", ".safetensors", ".zst")}

    def zstd(level: int) -> Callable[[], None]:
        return lambda: paths[".zst"].write_bytes(zstandard.ZstdCompressor(level=level).compress(save(state)))

    saves: dict[str, Callable[[], object]] = {
        ".muws": lambda: save_compressed(state, paths[".muws"]),
        ".muws, block shape given": lambda: save_compressed(state, paths[".muws"], blocks=BLOCK),
        "torch.save": lambda: torch.save(state, paths[".pt"]),
        "safetensors": lambda: save_file(state, paths[".safetensors"]),
    }
    loads: dict[str, Callable[[], object]] = {
        ".muws": lambda: load_compressed(paths[".muws"]),
        "torch.save": lambda: torch.load(paths[".pt"], weights_only=True),
        "safetensors": lambda: load(paths[".safetensors"].read_bytes()),
    }
    if zstandard:
        saves["safetensors + zstd 3"] = zstd(3)
        loads["safetensors + zstd 3"] = lambda: load(
            zstandard.ZstdDecompressor().decompress(paths[".zst"].read_bytes())
        )
    written, read = interleaved(saves, 5), interleaved(loads, 5)
    table = Table(title=f"CREPE, {dense / 1e6:.0f} MB of float32, 50/30/20: MB of float32 a second, one thread")
    for header in ("", "save", "load"):
        table.add_column(header, justify="right")
    for name, times in written.items():
        rates = [f"{dense / 1e6 / median(ts):.0f}" if ts else "" for ts in (times, read.get(name))]
        table.add_row(name, *rates)
    console.print(table)
    fast = dense / 1e6 / median(written[".muws"]) >= 50 and dense / 1e6 / median(read[".muws"]) >= 120
    console.print(f"save at least 50 MB/s and load 120 MB/s: {'met' if fast else 'MISSED'}")
    if zstandard:
        start = np.array(interleaved({"19": zstd(19)}, 1)["19"])
        console.print(f"safetensors + zstd 19 saves {dense / 1e6 / float(start[0]):.2f} MB/s")


def main() -> None:
    say_machine()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes(folder)
        integers(folder)
        speeds(folder)


if __name__ == "__main__":
    main()
