"""The manifest of a file: its tensors and chunks, checked before anything else is read or memory taken."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from lightning_muws.artifact.container import NEWEST, VERSION
from lightning_muws.artifact.json_text import MAX_DEPTH, nests_deeper
from lightning_muws.artifact.parts import minor
from lightning_muws.artifact.values import BYTES, FLOATS, MAX_PALETTE, PALETTE, STEPS, Form
from lightning_muws.errors import FormatError, SettingError
from lightning_muws.structure.grid import BlockGrid

OTHERS = (
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "complex32", "complex64",
    "complex128", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
)  # fmt: skip
DTYPES = {name: getattr(torch, name) for name in (*FLOATS, *OTHERS) if hasattr(torch, name)}
MAX_CHUNK = 256 << 20  # bytes of tensors in a chunk
MAX_CHUNKS = 1024  # and one more for each MiB of tensors: each takes time, and the writer needs two for 32 MiB
CHUNK_PER_BYTES = 1 << 20
MAX_AXES = 64
MAX_NUMEL = 1 << 60  # of the product of all sizes, each counted as at least 1


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Args:
        name: Its key in the state_dict.
        dtype: Its dtype, as ``float32``.
        shape: Its shape.
        form: How its values are written; None where its bytes are as they are.
        grid: How it is cut into blocks; None where it is flat.
        counts: Its blocks: dense, unified, pruned; zeros where it is flat.
        error: The largest ``|w - w'|``; 0 where it is exact.
        same_as: The index of the earlier tensor that it is, if it is shared or a copy.
        is_copy: Whether it has the values of that tensor in separate memory.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    form: Form | None = None
    grid: BlockGrid | None = None
    counts: tuple[int, int, int] = (0, 0, 0)
    error: float = 0.0
    same_as: int | None = None
    is_copy: bool = False

    @property
    def numel(self) -> int:
        """Its elements."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Its bytes in memory."""
        return self.numel * item_bytes(self.dtype)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Its units, and the elements of a unit: rows of the matrix that blocks lie on, or single elements."""
        return self.grid.matrix_shape(self.shape) if self.grid else (self.numel, 1)

    @property
    def block_rows(self) -> int:
        """Units that belong together."""
        return self.grid.block_shape[0] if self.grid else 1

    def to_dict(self) -> dict[str, Any]:
        """Return its entry in the manifest, without values that are the default."""
        fields: dict[str, Any] = {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}
        if self.same_as is not None:
            return fields | {"same_as": self.same_as} | ({"copy": True} if self.is_copy else {})
        if self.form and self.form.stored != self.dtype:
            fields["stored"] = self.form.stored
        if self.form and self.form.step:
            fields["step"] = self.form.step
        if self.form and self.form.palette:
            fields["palette"] = np.array(self.form.palette, f"<u{item_bytes(self.dtype)}").tobytes().hex()
        if self.grid:
            fields |= {"block": list(self.grid.block_shape), "kinds": list(self.counts)}
            fields |= {"out_axis": 1, "groups": self.grid.groups} if self.grid.out_axis else {}
        return fields | ({"error": self.error} if self.error else {})


class ChunkEntry(NamedTuple):
    """What was coded together.

    Args:
        until: The tensor, and the unit of it, before which the chunk ends.
        streams: The coder and the CRC-32 of each stream, by name.
    """

    until: tuple[int, int]
    streams: dict[str, tuple[str, int]]


class Piece(NamedTuple):
    """The part of a tensor that lies in a chunk: units ``start`` to ``stop``."""

    entry: TensorEntry
    start: int
    stop: int


@dataclass(frozen=True)
class Manifest:
    """The manifest of a file.

    Args:
        tensors: In the order of the state_dict.
        chunks: In order.
        modules: The versions that modules record for their state (``state_dict._metadata``).
        extra: The user's own values.
    """

    tensors: tuple[TensorEntry, ...]
    chunks: tuple[ChunkEntry, ...]
    modules: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors in memory, shared ones once."""
        return sum(entry.n_bytes for entry in self.tensors if entry.same_as is None or entry.is_copy)

    @property
    def version(self) -> str:
        """The lowest version of the format that has all that the file uses."""
        coders = {coder for chunk in self.chunks for coder, _ in chunk.streams.values()}
        is_new = any(e.is_copy or (e.form and (e.form.palette or e.dtype in BYTES)) for e in self.tensors)
        is_new = is_new or any(minor(coder) for coder in coders)
        return NEWEST if is_new else VERSION

    def pieces(self) -> Iterator[list[Piece]]:
        """Yield the pieces of each chunk."""
        at, unit = 0, 0
        for chunk in self.chunks:
            pieces, (last, stop) = [], chunk.until
            while (at, unit) < (last, stop):
                entry = self.tensors[at]
                end = stop if at == last else entry.matrix_shape[0]
                if entry.same_as is None and end > unit:
                    pieces.append(Piece(entry, unit, end))
                at, unit = (at, end) if at == last else (at + 1, 0)
            yield pieces

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain dicts, lists, strings and numbers."""
        chunks = [{"until": list(c.until), "streams": {n: list(s) for n, s in c.streams.items()}} for c in self.chunks]
        fields = {"version": self.version, "tensors": [entry.to_dict() for entry in self.tensors], "chunks": chunks}
        optional = {"modules": dict(self.modules), "extra": dict(self.extra)}
        return fields | {name: value for name, value in optional.items() if value}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Manifest:
        """Return the manifest of a file that was opened.

        Raises:
            FormatError: It contradicts the format or itself.
        """
        entries: list[TensorEntry] = []
        for entry in _get(fields, "tensors", list):
            entries.append(_tensor(_is(entry, dict, "a tensor"), entries))
        if len({entry.name for entry in entries}) < len(entries):
            raise FormatError("two tensors of the file have one name")
        chunks = tuple(_chunk(_is(chunk, dict, "a chunk")) for chunk in _get(fields, "chunks", list))
        modules = _get(fields, "modules", dict, {})
        for name, about in modules.items():  # load_state_dict trusts them
            _get(_is(about, dict, f"the entry of module {name!r}"), "version", int, 1)
        if nests_deeper(extra := _get(fields, "extra", dict, {})):
            raise FormatError(f"extra nests more than {MAX_DEPTH} deep")
        manifest = cls(tuple(entries), chunks, modules, extra)
        manifest._check_chunks()
        return manifest

    def _check_chunks(self) -> None:
        """Check that the chunks cover all tensors once, in order, each one in whole block rows and not too large."""
        before, n = (0, 0), len(self.tensors)
        if len(self.chunks) > (most := MAX_CHUNKS + self.n_bytes // CHUNK_PER_BYTES):
            raise FormatError(f"the file has {len(self.chunks)} chunks, at most {most} are allowed for its tensors")
        for chunk in self.chunks:
            (at, unit) = chunk.until
            whole = at <= n and (unit == 0 or (at < n and self.tensors[at].same_as is None))
            if not whole or not before < (at, unit):
                raise FormatError(
                    f"a chunk ends at tensor {at}, unit {unit}, which is not after {before} and within {n}"
                )
            if unit and (unit >= self.tensors[at].matrix_shape[0] or unit % self.tensors[at].block_rows):
                raise FormatError(f"a chunk ends within {self.tensors[at].name}, at {unit}, where no block row does")
            before = (at, unit)
        if before != (n, 0):
            raise FormatError(f"the chunks end at tensor {before[0]} of {n}")
        for pieces in self.pieces():
            if (size := sum(piece_bytes(piece) for piece in pieces)) > MAX_CHUNK:
                raise FormatError(f"a chunk has {size} bytes, at most {MAX_CHUNK} are allowed")


def item_bytes(dtype: str) -> int:
    """Return the bytes of an element."""
    return int(DTYPES[dtype].itemsize)


def piece_bytes(piece: Piece) -> int:
    """Return the bytes of a piece in memory."""
    return (piece.stop - piece.start) * piece.entry.matrix_shape[1] * item_bytes(piece.entry.dtype)


def why_too_large(shape: Sequence[int]) -> str | None:
    """Return why no file holds a tensor of this shape, even an empty one; None if a file may."""
    if len(shape) > MAX_AXES:
        return f"has {len(shape)} axes, at most {MAX_AXES} can be stored"
    if math.prod(max(1, n) for n in shape) >= MAX_NUMEL:
        return f"has shape {tuple(shape)}, more than any memory holds"
    return None


def _tensor(fields: Mapping[str, Any], before: Sequence[TensorEntry]) -> TensorEntry:
    name, dtype = _get(fields, "name", str), _get(fields, "dtype", str)
    shape = _ints(fields, "shape", None)
    if dtype not in DTYPES:
        raise FormatError(f"{name!r} has dtype {dtype!r}, which this reader does not know")
    if why := why_too_large(shape):
        raise FormatError(f"{name!r} {why}")
    if "same_as" in fields:
        is_copy = _get(fields, "copy", bool, False)
        return _shared(TensorEntry(name, dtype, shape, same_as=_get(fields, "same_as", int), is_copy=is_copy), before)
    form, grid, counts = _form(fields, name, dtype), None, (0, 0, 0)
    if "block" in fields:
        if form is None:
            raise FormatError(f"{name!r} is of dtype {dtype} and in blocks, which only floating tensors are, and bytes")
        grid = _grid(fields, name, shape)
        counts = _ints(fields, "kinds", 3)  # type: ignore[assignment]
        down, across = grid.counts(shape)
        if sum(counts) != down * across:
            raise FormatError(f"{name!r} of shape {shape} has {down * across} blocks, the file declares {sum(counts)}")
    error = _get(fields, "error", float, 0.0)
    if not 0 <= error < math.inf:
        raise FormatError(f"{name!r} has an error of {error}, a finite number >= 0 is needed")
    return TensorEntry(name, dtype, shape, form, grid, counts, error)


def _shared(entry: TensorEntry, before: Sequence[TensorEntry]) -> TensorEntry:
    """Return the entry, if it is the same as an earlier one that is stored."""
    other = before[entry.same_as] if entry.same_as is not None and 0 <= entry.same_as < len(before) else None
    if other is None or other.same_as is not None or (other.shape, other.dtype) != (entry.shape, entry.dtype):
        raise FormatError(
            f"{entry.name!r} has same_as={entry.same_as}, but tensor {entry.same_as} is missing, itself shared, or has "
            "another shape or dtype"
        )
    return entry


def _form(fields: Mapping[str, Any], name: str, dtype: str) -> Form | None:
    stored, step = _get(fields, "stored", str, dtype), _get(fields, "step", float, 0.0)
    if dtype not in FLOATS:
        if stored != dtype or step:
            raise FormatError(f"{name!r} is of dtype {dtype} and stored as {stored!r}")
        return Form(dtype) if dtype in BYTES and "block" in fields else None
    if stored == PALETTE:
        return Form(stored, palette=_palette(_get(fields, "palette", str), name, item_bytes(dtype)))
    held = step if dtype == "float64" else float(torch.tensor(step, dtype=torch.float32))
    if stored not in (*FLOATS, STEPS) or (stored == STEPS) != (step != 0) or not 0 <= step < math.inf or held != step:
        raise FormatError(f"{name!r} is stored as {stored!r} with step {step}, which this format does not allow")
    return Form(stored, step)


def _palette(text: str, name: str, width: int) -> tuple[int, ...]:
    """Return the magnitudes of a palette."""
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        raw = b""
    n, rest = divmod(len(raw), width)
    found = np.frombuffer(raw[: n * width], f"<u{width}").tolist()
    if rest or not 1 <= n <= MAX_PALETTE or max(found) >> (8 * width - 1):
        raise FormatError(
            f"{name!r} has the palette {text[:40]!r}, 1 to {MAX_PALETTE} magnitudes of {width} bytes in hex are needed"
        )
    return tuple(found)


def _grid(fields: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> BlockGrid:
    """Return the grid of an entry, if it fits the shape."""
    block, groups = _ints(fields, "block", 2), _get(fields, "groups", int, 1)
    out_axis = _get(fields, "out_axis", int, 0)
    fits = len(shape) >= 2 and out_axis in (0, 1) and 1 <= groups <= max(1, shape[0]) and shape[0] % groups == 0
    if not fits or (groups > 1 and out_axis == 0):
        raise FormatError(f"{name!r} of shape {shape} cannot have out_axis={out_axis}, groups={groups}")
    try:
        return BlockGrid((block[0], block[1]), out_axis, groups)
    except SettingError as error:
        raise FormatError(f"{name!r}: {error}") from None


def _chunk(fields: Mapping[str, Any]) -> ChunkEntry:
    until = _ints(fields, "until", 2)
    streams = {}
    for name, stream in _get(fields, "streams", dict).items():
        coder, checksum = stream if isinstance(stream, list) and len(stream) == 2 else (None, None)
        if not isinstance(coder, str) or type(checksum) is not int:
            raise FormatError(f"stream {name!r} has neither coder nor checksum")
        streams[name] = (coder, checksum)
    return ChunkEntry((until[0], until[1]), streams)


def _ints(fields: Mapping[str, Any], key: str, length: int | None) -> tuple[int, ...]:
    found = _get(fields, key, list)
    if length not in (None, len(found)) or not all(type(n) is int and 0 <= n < MAX_NUMEL for n in found):
        raise FormatError(f"{key} is {str(found)[:100]}, whole numbers >= 0 are needed")
    return tuple(found)


def _get(fields: Mapping[str, Any], key: str, kind: type, usual: Any = None) -> Any:
    return _is(fields.get(key, usual), kind, key)


def _is(value: Any, kind: type, what: str) -> Any:
    if type(value) is not kind:
        raise FormatError(f"{what} is {str(value)[:100]!r}, a {kind.__name__} is needed")
    return value
