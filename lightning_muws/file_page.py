"""One HTML page about a `.muws` file: pictures of its blocks, what each tensor takes, and what the caller adds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_muws.artifact.load import MAX_BYTES
from lightning_muws.artifact.maps import map_compressed
from lightning_muws.artifact.opening import Readable
from lightning_muws.artifact.report import FileInfo, TensorReport
from lightning_muws.page import LONGEST, Page
from lightning_muws.report import add_maps, add_residuals, score_facts
from lightning_muws.structure.block_map import MOST, BlockMap
from lightning_muws.tables import Column, Table, Tabular
from lightning_muws.training.run import Update

SHOWN = 1000  # tensors: a page of more is slow to open
CELLS = 2_000_000  # of all pictures together, about: a few megabytes

TENSORS = (
    Column("tensor", room=24),
    Column("shape"),
    Column("dtype"),
    Column("block"),
    Column("dense"),
    Column("unified"),
    Column("pruned"),
    Column("stored", room=16),
    Column("bytes"),
    Column("bits a weight"),
    Column("error"),
)


def file_page(
    path: Readable,
    *,
    history: Sequence[Update] = (),
    scores: Mapping[str, float] | None = None,
    speed: Tabular | None = None,
    max_bytes: int = MAX_BYTES,
    name: str = "",
) -> str:
    """Return a page of HTML about a `.muws` file, which needs no other file and no network.

    It has the block map of each tensor, the bytes of each stream, the bits of each weight, and the user's own values
    (``extra``). All texts of the file are escaped. Only the manifest and the kinds of blocks are read.

    Args:
        path: The file; also a URL (extra ``remote``), or a file that is open for reading and can seek.
        history: The updates of the run that made it, such as ``callback.history``.
        scores: Numbers to show, by name, such as ``{"accuracy": 0.92, "accuracy of the dense network": 0.93}``.
        speed: What :func:`lightning_muws.accelerate` reports.
        max_bytes: The most bytes that all tensors of the file may take.
        name: What to call the file on the page; its path by default.

    Raises:
        SettingError: ``max_bytes`` is no whole number >= 0, or the source cannot be opened.
        FormatError: The file is no `.muws` file, or larger than ``max_bytes``, or what was read of it is damaged.

    Example:
        >>> import tempfile, torch
        >>> from lightning_muws import save_compressed
        >>> file = Path(tempfile.mkdtemp()) / "model.muws"
        >>> _ = save_compressed(torch.nn.Linear(8, 8), file)
        >>> file_page(file)[:15]
        '<!doctype html>'
    """
    info, maps = map_compressed(path, max_bytes=max_bytes)
    if len(maps) * MOST * MOST > CELLS:
        side = max(16, math.isqrt(CELLS // min(SHOWN, len(maps))))
        info, maps = map_compressed(path, max_bytes=max_bytes, most=min(MOST, side))
    page = Page(name or Path(info.path).name or info.path)
    page.facts([*_facts(info), *score_facts(scores or {})])
    largest = sorted(info.tensors, key=lambda tensor: -tensor.n_bytes)[:SHOWN]
    shown = {tensor.name for tensor in largest}
    tensors = [tensor for tensor in info.tensors if tensor.name in shown]
    _add_maps(page, tensors, maps)
    _add_streams(page, info)
    add_residuals(page, history)
    page.heading("Tensors")
    page.table(_table(info, tensors))
    if speed:
        page.heading("Speed")
        for table in speed.tables():
            page.table(table)
    if info.extra:
        page.heading("Values that the user added")
        for key, value in list(info.extra.items())[:SHOWN]:
            page.text(f"{key[:LONGEST]}: {json.dumps(value)}")
    return page.html()


def _facts(info: FileInfo) -> list[tuple[str, str]]:
    n = sum(math.prod(tensor.shape) for tensor in info.tensors if tensor.dense_bytes)
    blocked = [tensor for tensor in info.tensors if tensor.block_shape]
    in_blocks = sum(sum(tensor.counts) * math.prod(tensor.block_shape) for tensor in blocked)
    pruned = sum(tensor.counts[2] * math.prod(tensor.block_shape) for tensor in blocked)
    return [
        ("bytes", f"{info.n_bytes:,}"),
        ("times smaller than its tensors", f"{info.compression_ratio:.2f}"),
        ("bits a weight", f"{8 * info.n_bytes / max(1, n):.2f}"),
        ("of the weights in blocks are pruned", f"{pruned / max(1, in_blocks):.1%}"),
        ("tensors", f"{len(info.tensors):,}"),
        ("format", info.version),
    ]


def _add_maps(page: Page, tensors: Sequence[TensorReport], maps: Mapping[str, BlockMap]) -> None:
    """Add the pictures of the tensors that are in blocks."""
    found = [
        (t.name, f"{_sizes(t.shape)} in blocks of {_sizes(t.block_shape)}: {_bits(t)} bits a weight", maps[t.name])
        for t in tensors
        if t.name in maps
    ]
    if found:
        add_maps(page, found)
    else:
        page.text("No tensor of this file is cut into blocks.")


def _add_streams(page: Page, info: FileInfo) -> None:
    page.heading("Bytes of each stream")
    used = sum(info.streams.values())
    rows = [(name, n, info.coders[name]) for name, n in sorted(info.streams.items(), key=lambda item: -item[1])]
    rows.append(("header, manifest", info.n_bytes - used, ""))
    page.bars([(f"{name} ({coder})" if coder else name, f"{n:,}", float(n)) for name, n, coder in rows])
    page.text(
        "kinds: what each block is; signs: of unified blocks with both; magnitudes: of unified blocks; free: all other "
        "values, byte by byte; other: tensors that are no floats. In brackets: the coder."
    )


def _table(info: FileInfo, tensors: Sequence[TensorReport]) -> Table:
    rows = []
    for t in tensors:
        counts = [f"{n:,}" for n in t.counts] if t.block_shape else ["", "", ""]
        sizes = (_sizes(t.shape) or "scalar", t.dtype, _sizes(t.block_shape))
        n_bytes = f"{t.n_bytes:,.0f}" if t.n_bytes else ""
        row = (t.name, *sizes, *counts, t.stored, n_bytes, _bits(t), f"{t.max_error:.3g}" if t.max_error else "")
        rows.append([cell[:LONGEST] for cell in row])
    notes = [
        "dense, unified, pruned: blocks; bytes: the tensor's share of each stream, by its symbols; error: the largest "
        "difference of a decoded value from the original one, empty where there is none."
    ]
    if len(tensors) < len(info.tensors):
        left = sum(t.n_bytes for t in info.tensors) - sum(t.n_bytes for t in tensors)
        notes.append(f"Not shown: {len(info.tensors) - len(tensors):,} smaller tensors of {left:,.0f} bytes together.")
    return Table("", TENSORS, rows, notes=notes)


def _bits(tensor: TensorReport) -> str:
    return f"{8 * tensor.n_bytes / math.prod(tensor.shape):.2f}" if tensor.n_bytes and math.prod(tensor.shape) else ""


def _sizes(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
