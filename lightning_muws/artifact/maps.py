"""The block maps of a `.muws` file and the bytes of each tensor, from its kinds alone: no weight is decoded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from lightning_muws.artifact.chunk import n_blocks
from lightning_muws.artifact.container import Frame
from lightning_muws.artifact.entropy import Bytes
from lightning_muws.artifact.load import (
    MAX_BYTES,
    blaming,
    check_max_bytes,
    check_size,
    checked_kinds,
    inspect_compressed,
    opened,
    stream_bytes,
)
from lightning_muws.artifact.manifest import Manifest, Piece, piece_bytes
from lightning_muws.artifact.opening import Readable
from lightning_muws.artifact.report import FileInfo
from lightning_muws.artifact.streams import DENSE, KINDS_A_BYTE, MIXED, N_KINDS, PRUNED, is_unified, unpack_kinds
from lightning_muws.structure.block_map import MOST, BlockMap, Sketch
from lightning_muws.structure.kinds import Kind

# The kind of a block, for each of the five numbers that a file has.
KINDS = np.full(N_KINDS, Kind.UNIFIED, np.uint8)
KINDS[DENSE], KINDS[PRUNED] = Kind.DENSE, Kind.PRUNED


def map_compressed(
    path: Readable, *, max_bytes: int = MAX_BYTES, most: int = MOST
) -> tuple[FileInfo, dict[str, BlockMap]]:
    """Return the content of a `.muws` file and the block map of each tensor in blocks, by name.

    Only the manifest and the streams of kinds are read.

    Args:
        path: The file; also a URL (extra ``remote``), or a file that is open for reading and can seek.
        max_bytes: The most bytes that all tensors of the file may take.
        most: The most cells along a side of a map.

    Returns:
        What :func:`inspect_compressed` returns, with the ``n_bytes`` of each tensor as ``save_compressed`` estimates
        them; and the maps. Shared tensors and copies have none of their own.

    Raises:
        SettingError: ``max_bytes`` is no whole number >= 0, or the source cannot be opened.
        FormatError: The file is no `.muws` file, or larger than ``max_bytes``, or what was read of it is damaged.
    """
    check_max_bytes(max_bytes)
    info = inspect_compressed(path)
    with opened(path) as (frame, manifest), blaming(path):
        check_size(manifest.n_bytes, max_bytes)
        shares, maps = _read(frame, manifest, most)
    tensors = tuple(replace(tensor, n_bytes=shares.get(tensor.name, 0.0)) for tensor in info.tensors)
    return replace(info, tensors=tensors), maps


def _read(frame: Frame, manifest: Manifest, most: int) -> tuple[dict[str, float], dict[str, BlockMap]]:
    """Return each tensor's share of the streams, and the maps."""
    chunks = dict(enumerate(manifest.pieces()))
    kept = checked_kinds(frame, manifest, chunks)
    shares: dict[str, float] = defaultdict(float)
    sketches: dict[str, Sketch] = {}
    for i, pieces in chunks.items():
        kinds = _kinds(frame, manifest, i, pieces, kept.pop(i, None))
        symbols, at = [], 0
        for piece in pieces:
            mine, at = kinds[at : at + n_blocks(piece)[0]], at + n_blocks(piece)[0]
            symbols.append(_symbols(piece, mine))
            if grid := piece.entry.grid:
                down, across = grid.counts(piece.entry.shape)
                if down * across:
                    sketch = sketches.setdefault(piece.entry.name, Sketch((down, across), most))
                    sketch.add(KINDS[mine].reshape(-1, across))
        for name in manifest.chunks[i].streams:
            _share(shares, pieces, symbols, name, frame.lengths[f"c{i}.{name}"])
    return shares, {name: sketch.map() for name, sketch in sketches.items()}


def _kinds(frame: Frame, manifest: Manifest, i: int, pieces: list[Piece], packed: Bytes | None) -> Bytes:
    """Return the kinds of all blocks of a chunk."""
    n = sum(n_blocks(piece)[0] for piece in pieces)
    if packed is None:
        if not n or "kinds" not in manifest.chunks[i].streams:
            return np.full(n, DENSE, np.uint8)
        packed = stream_bytes(frame, manifest, i, "kinds", -(-n // KINDS_A_BYTE))
    return unpack_kinds(packed, n, is_all=True)


def _symbols(piece: Piece, kinds: Bytes) -> dict[str, int]:
    """Return how many symbols of each stream a piece has; byte planes count once."""
    form, numel = piece.entry.form, n_blocks(piece)[1]
    if form is None:
        return {"other": piece_bytes(piece)}
    n_edge = (piece.stop - piece.start) * piece.entry.matrix_shape[1] - len(kinds) * numel
    n_dense, n_mixed = (int(np.count_nonzero(kinds == kind)) for kind in (DENSE, MIXED))
    return {
        "kinds": len(kinds),
        "signs": n_mixed * numel,
        f"magnitudes.{form.stored}": int(np.count_nonzero(is_unified(kinds))),
        f"free.{form.stored}": n_dense * numel + n_edge,
    }


def _share(
    shares: dict[str, float], pieces: list[Piece], symbols: Sequence[Mapping[str, int]], name: str, n_bytes: int
) -> None:
    """Give each piece its share of a stream, by the symbols that it has there."""
    key = name.rpartition(".")[0] or name
    total = sum(found.get(key, 0) for found in symbols)
    for piece, found in zip(pieces, symbols, strict=True):
        if total:
            shares[piece.entry.name] += n_bytes * found.get(key, 0) / total
