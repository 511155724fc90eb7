"""A chunk: pieces of tensors whose parts are coded together, as one stream for each kind of part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_muws.artifact.entropy import Bytes
from lightning_muws.artifact.manifest import Piece, TensorEntry, piece_bytes
from lightning_muws.artifact.parts import Rows
from lightning_muws.artifact.streams import (
    DENSE,
    KINDS_A_BYTE,
    MIXED,
    N_KINDS,
    PRUNED,
    Parts,
    Patterns,
    is_unified,
    join,
    join_planes,
    pack_kinds,
    pack_signs,
    planes,
    slabs,
    split,
    unpack_kinds,
    unpack_signs,
)
from lightning_muws.artifact.values import WIDTHS, Form, bits
from lightning_muws.errors import FormatError
from lightning_muws.structure.grid import BlockGrid

ROLES = ("magnitudes", "free")
ORDER = [f"{role}.{stored}" for role in ROLES for stored in WIDTHS]  # of the streams of values in a chunk


class Measured(NamedTuple):
    """What the writer measures on a piece.

    Args:
        counts: Its blocks: dense, unified, pruned.
        error: The largest ``|w - w'|``, from its decoded values.
        distance: The sum of ``|w - w'|^2``.
    """

    counts: tuple[int, int, int]
    error: float = 0.0
    distance: float = 0.0

    def __add__(self, other: Measured) -> Measured:  # type: ignore[override]
        """Return what both pieces together have."""
        a, b = self.counts, other.counts
        error = max(self.error, other.error)
        return Measured((a[0] + b[0], a[1] + b[1], a[2] + b[2]), error, self.distance + other.distance)


NOTHING = Measured((0, 0, 0))


@dataclass
class ChunkWriter:
    """Splits pieces into streams, before coding."""

    kinds: list[Bytes] = field(default_factory=list)
    signs: list[Any] = field(default_factory=list)
    values: dict[str, list[Sequence[Bytes]]] = field(default_factory=lambda: defaultdict(list))
    other: list[Bytes] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)  # of the tensors in ``other``
    n_bytes: int = 0
    symbols: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # of the last piece

    def add(self, entry: TensorEntry, units: Tensor, original: Tensor | None = None) -> Measured:
        """Add a piece: the rows of the matrix that blocks lie on, or the elements of a flat tensor.

        Args:
            entry: The entry of the tensor.
            units: ``(n, cols)`` or ``(n,)``, on the CPU.
            original: Units that the errors are measured against, if they are others.
        """
        original = units if original is None else original
        self.symbols.clear()
        self.n_bytes += units.numel() * units.element_size()
        if entry.form is None:
            raw = units.contiguous().view(torch.uint8).numpy().reshape(len(units), -1)
            raw = raw != 0 if units.dtype == torch.bool else raw  # a view of other bytes may have made a true of any
            self.other.append(np.ascontiguousarray(raw.T).view(np.uint8).reshape(-1))
            self.rows.append(Rows(raw.size, entry.shape[-1] if entry.shape else 1))
            self.symbols["other"] += raw.size
            return NOTHING
        if entry.grid is None:
            return self._free(entry.form, units, original)
        counts, found = np.zeros(N_KINDS, np.int64), NOTHING
        covered, before = entry.grid.covered(units), entry.grid.covered(original)
        for rows in slabs(len(covered), covered.shape[1], entry.block_rows) if covered.numel() else ():
            slab = covered[rows].contiguous()
            u = entry.form.patterns(slab, entry.grid.block_shape)
            found += _errors(entry.form, u, slab, before[rows] if original is not units else slab)
            parts = split(u, entry.grid.block_shape)
            self._parts(entry.form, parts)
            counts += np.bincount(parts.kinds, minlength=N_KINDS)
        for edge, old in zip(entry.grid.edges(units), entry.grid.edges(original), strict=True):
            flat = edge.reshape(-1)
            found += self._free(entry.form, flat, old.reshape(-1) if original is not units else flat)
        return found._replace(counts=tally(counts))

    def _free(self, form: Form, flat: Tensor, original: Tensor) -> Measured:
        """Add values in no block, and return their errors."""
        if form.is_plain(flat.dtype) and original is flat:
            self._add(f"free.{form.stored}", bits(flat.contiguous()))
            return NOTHING
        found = NOTHING
        for part in slabs(len(flat), 1):
            x = flat[part].contiguous()
            u = form.patterns(x)
            found += _errors(form, u, x, original[part] if original is not flat else x)
            self._add(f"free.{form.stored}", u)
        return found

    def _parts(self, form: Form, parts: Parts) -> None:
        self.kinds.append(parts.kinds)
        self.signs.append(parts.signs.reshape(-1))
        self.symbols["kinds"] += len(parts.kinds)
        self.symbols["signs"] += parts.signs.size
        self._add(f"magnitudes.{form.stored}", parts.magnitudes)
        self._add(f"free.{form.stored}", parts.free.reshape(-1))

    def _add(self, name: str, values: Patterns) -> None:
        self.values[name].append(planes(values))
        self.symbols[name] += len(values)

    def streams(self) -> Iterator[tuple[str, Bytes]]:
        """Yield each stream that is not all zero, by name, in the order of the file; a plane at a time."""
        for name, data in self._streams():
            if data.any():
                yield name, data

    def _streams(self) -> Iterator[tuple[str, Bytes]]:
        if self.kinds:
            yield "kinds", pack_kinds(np.concatenate(self.kinds))
            yield "signs", pack_signs(np.concatenate(self.signs))
        for name in ORDER:
            for i in range(_width(name).itemsize if self.values.get(name) else 0):
                yield f"{name}.{i}", _joined([found[i] for found in self.values[name]])
        if self.other:
            yield "other", np.concatenate(self.other)


def _joined(parts: Sequence[Bytes]) -> Bytes:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _errors(form: Form, u: Patterns, x: Tensor, original: Tensor) -> Measured:
    """Return how far the values that a reader would get are from the original ones."""
    if not x.numel() or (original is x and (form.palette or form.stored == str(x.dtype).removeprefix("torch."))):
        return NOTHING
    apart = form.values(u, x.dtype).to(torch.float64) - original.to(torch.float64)
    return Measured((0, 0, 0), float(apart.abs_().max()), float(apart.square_().sum()))


class ChunkReader:
    """Puts the pieces of a chunk back together.

    Args:
        pieces: The pieces, of a manifest that was checked.
        read: Returns a stream of so many bytes, decoded; zeros if the chunk has none of that name.

    Raises:
        FormatError: The streams do not fit the pieces.
    """

    def __init__(self, pieces: list[Piece], read: Callable[[str, int], Bytes]) -> None:
        grids = [(piece.entry, *n_blocks(piece)) for piece in pieces if piece.entry.grid]
        n_kinds = sum(n for _, n, _ in grids)
        self.kinds = unpack_kinds(read("kinds", -(-n_kinds // KINDS_A_BYTE)), n_kinds, is_all=True)
        needed, at, n_signs = dict.fromkeys(ORDER, 0), 0, 0
        for entry, n, numel in grids:
            kinds, at = self.kinds[at : at + n], at + n
            n_signs += int(np.count_nonzero(kinds == MIXED)) * numel
            needed[f"magnitudes.{_stored(entry)}"] += int(np.count_nonzero(is_unified(kinds)))
            needed[f"free.{_stored(entry)}"] += int(np.count_nonzero(kinds == DENSE)) * numel
        for piece in pieces:
            if piece.entry.form:
                needed[f"free.{_stored(piece.entry)}"] += _n_edge(piece)
        self.signs = unpack_signs(read("signs", -(-n_signs // 8)), n_signs)
        self.planes = {
            name: [read(f"{name}.{i}", n) for i in range(_width(name).itemsize)] for name, n in needed.items() if n
        }
        n_other = sum(piece_bytes(piece) for piece in pieces if not piece.entry.form)
        self.other = read("other", n_other)
        self._at: dict[str, int] = defaultdict(int)

    def fill(self, piece: Piece, units: Tensor) -> None:
        """Write the next piece into its units, see :meth:`ChunkWriter.add`."""
        entry = piece.entry
        if entry.form is None:
            width = units.element_size()
            raw = self._take("other", self.other, len(units) * width).reshape(width, len(units))
            if units.dtype == torch.bool and raw.max() > 1:
                raise FormatError(f"{entry.name} has a bool of {raw.max()}, only 0 and 1 are allowed")
            units.view(torch.uint8).copy_(torch.from_numpy(np.array(raw.T, order="C")).reshape(-1))
        elif entry.grid is None:
            self._fill_free(entry.form, units)
        else:
            covered = entry.grid.covered(units)
            for rows in slabs(len(covered), covered.shape[1], entry.block_rows) if covered.numel() else ():
                self._fill_blocks(entry.form, entry.grid, covered[rows])
            for edge in entry.grid.edges(units):
                flat = torch.empty(edge.numel(), dtype=units.dtype)
                self._fill_free(entry.form, flat)
                edge.copy_(flat.view(edge.shape))

    def skip(self, piece: Piece) -> None:
        """Pass over the next piece: the one after it comes next."""
        entry = piece.entry
        if entry.form is None:
            self._take("other", self.other, piece_bytes(piece))
            return
        blocks, numel = n_blocks(piece)
        kinds = self._take("kinds", self.kinds, blocks)
        n_free = int(np.count_nonzero(kinds == DENSE)) * numel + _n_edge(piece)
        self._at["signs"] += int(np.count_nonzero(kinds == MIXED)) * numel
        self._at[f"magnitudes.{_stored(entry)}"] += int(np.count_nonzero(is_unified(kinds)))
        self._at[f"free.{_stored(entry)}"] += n_free

    def _fill_free(self, form: Form, flat: Tensor) -> None:
        name = f"free.{form.stored}"
        if form.is_plain(flat.dtype):
            self._take_values(name, bits(flat))
            return
        for part in slabs(len(flat), 1):
            u = np.empty(part.stop - part.start, WIDTHS[form.stored])
            self._take_values(name, u)
            flat[part] = form.values(u, flat.dtype)

    def _fill_blocks(self, form: Form, grid: BlockGrid, slab: Tensor) -> None:
        width, numel = WIDTHS[form.stored], grid.block_numel
        kinds = self._take("kinds", self.kinds, slab.numel() // numel)
        n_mixed, n_free = (int(np.count_nonzero(kinds == kind)) for kind in (MIXED, DENSE))
        magnitudes, free = np.empty(int(np.count_nonzero(is_unified(kinds))), width), np.empty(n_free * numel, width)
        self._take_values(f"magnitudes.{form.stored}", magnitudes)
        self._take_values(f"free.{form.stored}", free)
        signs = self._take("signs", self.signs, n_mixed * numel).reshape(-1, *grid.block_shape)
        parts = Parts(kinds, signs, magnitudes, free.reshape(-1, *grid.block_shape))
        if form.is_plain(slab.dtype) and slab.is_contiguous():
            join(parts, bits(slab), grid.block_shape)
            return
        u = np.empty(slab.shape, width)
        join(parts, u, grid.block_shape)
        slab.copy_(form.values(u, slab.dtype))

    def _take_values(self, name: str, out: Patterns) -> None:
        """Write the next values of a stream into contiguous ``out``."""
        if len(out):
            start = self._at[name]
            self._at[name] = start + len(out)
            join_planes([plane[start : start + len(out)] for plane in self.planes[name]], out)

    def _take(self, name: str, values: Any, n: int) -> Any:
        start = self._at[name]
        self._at[name] = start + n
        return values[start : start + n]


def tally(counts: Any) -> tuple[int, int, int]:
    """Return how many blocks are dense, unified and pruned, given how many have each of the five kinds of the file."""
    n = counts.tolist()
    return n[DENSE], sum(n) - n[DENSE] - n[PRUNED], n[PRUNED]


def _stored(entry: TensorEntry) -> str:
    return entry.form.stored if entry.form else ""


def n_blocks(piece: Piece) -> tuple[int, int]:
    """Return the blocks of a piece, and the weights of a block; zeros where it is flat."""
    if (grid := piece.entry.grid) is None:
        return 0, 0
    down, across = (piece.stop - piece.start) // grid.block_shape[0], piece.entry.matrix_shape[1] // grid.block_shape[1]
    return down * across, grid.block_numel


def _n_edge(piece: Piece) -> int:
    """Return the values of a piece that lie in no block."""
    blocks, numel = n_blocks(piece)
    return (piece.stop - piece.start) * piece.entry.matrix_shape[1] - blocks * numel


def _width(name: str) -> np.dtype[Any]:
    """Return the type of the patterns of a stream of values, from its name without the number of a byte."""
    return WIDTHS[name.partition(".")[2]]
