"""The content of a file and the bytes of its parts, as dataclasses, dicts and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from lightning_muws.artifact.manifest import TensorEntry
from lightning_muws.artifact.values import displayed
from lightning_muws.tables import Column, Table, Tabular

TENSORS = (
    Column("tensor", room=24),
    Column("shape"),
    Column("dtype", drop=2),
    Column("block", drop=1),
    Column("dense"),
    Column("unified"),
    Column("pruned"),
    Column("stored", room=16),
    Column("error", drop=3),
)


@dataclass(frozen=True)
class StreamReport:
    """The streams of one kind, over all chunks.

    Args:
        name: ``kinds``, ``signs``, ``magnitudes.<form>.<byte>``, ``free.<form>.<byte>`` or ``other``.
        coder: ``raw``, ``zlib`` or ``rans``; several joined by ``+``.
        n_bytes: Bytes in the file.
        raw_bytes: Bytes before coding.
        entropy_bytes: Order-0 entropy of these bytes, the lower bound of a coder with one frequency table.
    """

    name: str
    coder: str
    n_bytes: int
    raw_bytes: int
    entropy_bytes: float


@dataclass(frozen=True)
class TensorReport:
    """One tensor of a file.

    Args:
        name: Key in the state_dict.
        dtype: Name of the dtype, such as ``float32``.
        shape: Shape of the tensor.
        block_shape: ``(outputs, inputs)`` of a block; empty if the tensor is not cut into blocks.
        stored: How the values are written: a dtype, ``steps``, ``bytes``; or ``same as <name>``, or
            ``copy of <name>`` if the tensor has the values of an earlier one in separate memory.
        counts: Number of dense, unified and pruned blocks.
        dense_bytes: Bytes in memory; 0 if the tensor shares the memory of an earlier one.
        n_bytes: Estimate of the bytes in the file: the tensor's share of each stream, by its number of symbols.
        max_error: The largest ``|w - w'|``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    block_shape: tuple[int, ...]
    stored: str
    counts: tuple[int, int, int]
    dense_bytes: int
    n_bytes: float
    max_error: float


@dataclass(frozen=True)
class SaveReport(Tabular):
    """The size of a written file; ``print`` and notebooks show it as a table.

    Args:
        path: The file.
        n_bytes: Bytes of the file.
        header_bytes: Bytes of its header and manifest.
        dense_bytes: Bytes of all tensors in memory; shared memory counts once.
        streams: One report for each kind of stream.
        tensors: One report for each tensor.
    """

    path: str
    n_bytes: int
    header_bytes: int
    dense_bytes: int
    streams: tuple[StreamReport, ...]
    tensors: tuple[TensorReport, ...]

    @property
    def compression_ratio(self) -> float:
        """Dense bytes over the bytes of the file; more is better."""
        return self.dense_bytes / self.n_bytes

    @property
    def max_error(self) -> float:
        """The largest ``|w - w'|`` of all tensors."""
        return max((tensor.max_error for tensor in self.tensors), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists, strings and numbers, ready for JSON."""
        return asdict(self) | {"compression_ratio": self.compression_ratio, "max_error": self.max_error}

    def tables(self) -> list[Table]:
        """Return the table of the streams."""

        def share(n_bytes: int) -> tuple[str, str]:
            return f"{n_bytes:,}", f"{n_bytes / self.n_bytes:.1%}"

        rows = [
            (s.name, *share(s.n_bytes), f"{s.raw_bytes:,}", f"{s.entropy_bytes:,.0f}", s.coder) for s in self.streams
        ]
        columns = [
            Column("stream", room=24),
            Column("bytes"),
            Column("share"),
            Column("uncoded", drop=1),
            Column("order-0 entropy", drop=2),
            Column("coder"),
        ]
        error = f"Largest error {self.max_error:.3g}." if self.max_error else "Lossless: bit for bit."
        return [
            Table(
                title=f"{self.path}: {self.n_bytes:,} bytes, compression ratio {self.compression_ratio:.2f}",
                columns=columns,
                rows=[*rows, ("header, manifest", *share(self.header_bytes), "", "", "")],
                notes=[error],
            )
        ]


@dataclass(frozen=True)
class CompressedTensor:
    """One tensor of a compressed checkpoint.

    Args:
        name: Key in the state_dict.
        shape: Shape of the tensor.
        block_shape: ``(outputs, inputs)`` of a block; empty if the tensor is not cut into blocks.
        counts: Number of dense, unified and pruned blocks.
        stored: How the values are written, as :class:`TensorReport` has it.
        n_bytes: Estimate of the bytes in the file.
        bits: Bits of the file a value.
        relative_error: ``|w - w'|^2 / |w|^2``.
    """

    name: str
    shape: tuple[int, ...]
    block_shape: tuple[int, ...]
    counts: tuple[int, int, int]
    stored: str
    n_bytes: float
    bits: float
    relative_error: float


@dataclass(frozen=True)
class CompressReport(Tabular):
    """The size and the errors of a compressed checkpoint; ``print`` and notebooks show it as a table.

    Args:
        path: The file.
        n_bytes: Bytes of the file.
        dense_bytes: Bytes of all tensors in memory; shared memory counts once.
        n_files: How many files were coded until one had the size.
        tensors: One entry for each tensor.
    """

    path: str
    n_bytes: int
    dense_bytes: int
    n_files: int
    tensors: tuple[CompressedTensor, ...]

    @property
    def compression_ratio(self) -> float:
        """Dense bytes over the bytes of the file; more is better."""
        return self.dense_bytes / self.n_bytes

    @property
    def relative_error(self) -> float:
        """The mean of ``|w - w'|^2 / |w|^2`` over the tensors of two or more axes."""
        found = [tensor.relative_error for tensor in self.tensors if len(tensor.shape) >= 2]
        return math.fsum(found) / max(1, len(found))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists, strings and numbers, ready for JSON."""
        return asdict(self) | {"compression_ratio": self.compression_ratio, "relative_error": self.relative_error}

    def tables(self) -> list[Table]:
        """Return the table of the tensors."""
        columns = [
            Column("tensor", room=24),
            Column("shape", drop=2),
            Column("block", drop=1),
            Column("dense"),
            Column("unified"),
            Column("pruned"),
            Column("stored", room=16, drop=3),
            Column("bits"),
            Column("error"),
        ]
        rows = [
            (
                t.name,
                "x".join(map(str, t.shape)) or "scalar",
                "x".join(map(str, t.block_shape)),
                *([f"{n:,}" for n in t.counts] if t.block_shape else ["", "", ""]),
                t.stored,
                f"{t.bits:.2f}",
                f"{t.relative_error:.2%}" if t.relative_error else "",
            )
            for t in self.tensors
        ]
        title = f"{self.path}: {self.n_bytes:,} bytes, compression ratio {self.compression_ratio:.2f}"
        note = f"error: |w - w'|^2 / |w|^2; mean over the weights {self.relative_error:.3%}."
        return [Table(title=title, columns=columns, rows=rows, notes=[note])]


@dataclass(frozen=True)
class FileInfo(Tabular):
    """The content of a file as its manifest declares it; ``print`` and notebooks show it as tables.

    Args:
        path: The file.
        version: Version of the format.
        n_bytes: Bytes of the file.
        dense_bytes: Bytes of all tensors in memory; shared memory counts once.
        tensors: One report for each tensor. Its ``n_bytes`` is 0: the manifest does not have it.
        streams: Bytes of each kind of stream.
        coders: Coders of each kind of stream.
        extra: The values that the user added.
    """

    path: str
    version: str
    n_bytes: int
    dense_bytes: int
    tensors: tuple[TensorReport, ...]
    streams: Mapping[str, int]
    coders: Mapping[str, str]
    extra: Mapping[str, Any]

    @property
    def compression_ratio(self) -> float:
        """Dense bytes over the bytes of the file; more is better."""
        return self.dense_bytes / self.n_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists, strings and numbers, ready for JSON."""
        return asdict(replace(self, extra={})) | {"extra": self.extra, "compression_ratio": self.compression_ratio}

    def tables(self) -> list[Table]:
        """Return the table of the tensors and that of the streams."""
        ratio = f"compression ratio {self.compression_ratio:.2f}"
        tensors = Table(
            title=f"{self.path}: {self.n_bytes:,} bytes, {ratio}, format {self.version}",
            columns=TENSORS,
            rows=[_cells(tensor) for tensor in self.tensors],
        )
        streams = Table(
            title="streams",
            columns=[Column("stream", room=24), Column("bytes"), Column("share"), Column("coder")],
            rows=[(n, f"{b:,}", f"{b / self.n_bytes:.1%}", self.coders[n]) for n, b in self.streams.items()],
        )
        return [tensors, streams]


def _cells(tensor: TensorReport) -> list[str]:
    counts = [f"{n:,}" for n in tensor.counts] if tensor.block_shape else ["", "", ""]
    shapes = ("x".join(map(str, tensor.shape)) or "scalar", tensor.dtype, "x".join(map(str, tensor.block_shape)))
    return [tensor.name, *shapes, *counts, tensor.stored, f"{tensor.max_error:.3g}" if tensor.max_error else ""]


def tensor_report(entry: TensorEntry, entries: tuple[TensorEntry, ...], n_bytes: float = 0.0) -> TensorReport:
    """Return the report on one tensor of a file whose manifest has these entries."""
    stored = displayed(entry.form.stored) if entry.form else "bytes"
    if entry.same_as is not None:
        stored = f"{'copy of' if entry.is_copy else 'same as'} {entries[entry.same_as].name}"
    return TensorReport(
        name=entry.name,
        dtype=entry.dtype,
        shape=entry.shape,
        block_shape=entry.grid.block_shape if entry.grid else (),
        stored=stored,
        counts=entry.counts,
        dense_bytes=entry.n_bytes if entry.same_as is None or entry.is_copy else 0,
        n_bytes=n_bytes,
        max_error=entry.error,
    )
