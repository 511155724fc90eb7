"""Reports on a file: its tensors and the bytes of each part, as dataclasses, dicts and tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Group
from rich.table import Table

from lightning_muws.artifact.manifest import TensorEntry
from lightning_muws.artifact.values import displayed


@dataclass(frozen=True)
class StreamReport:
    """One kind of stream, over all chunks.

    Args:
        name: ``kinds``, ``signs``, ``magnitudes.<form>.<byte>``, ``free.<form>.<byte>`` or ``other``.
        coder: ``raw``, ``zlib`` or ``rans``; several joined by ``+``.
        n_bytes: Its bytes in the file.
        raw_bytes: Its bytes before coding.
        entropy_bytes: The order-0 entropy of these bytes: the least that a coder without context can reach.
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
        name: Its key.
        dtype: Its dtype.
        shape: Its shape.
        block_shape: ``(outputs, inputs)`` of a block; empty where it is flat.
        stored: How its values are written: a dtype, ``steps``, ``bytes``, or ``same as <name>``.
        counts: Its blocks: dense, unified, pruned.
        dense_bytes: Its bytes in memory; 0 of a shared one.
        n_bytes: About its bytes in the file: its share of each stream, by the symbols it has there.
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
class SaveReport:
    """Summary of a file that was written.

    Args:
        path: The file.
        n_bytes: Its bytes.
        header_bytes: Those of header and manifest.
        dense_bytes: Bytes of all tensors in memory, shared ones once.
        streams: Each kind of stream.
        tensors: Each tensor.
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

    def __rich__(self) -> Table:
        table = Table(
            title=f"{self.path}: {self.n_bytes:,} bytes, {self.compression_ratio:.2f} x smaller",
            caption=f"largest error {self.max_error:.3g}" if self.max_error else "bit for bit",
        )
        table.add_column("stream")
        for header in ("bytes", "share", "before", "order-0 entropy", "coder"):
            table.add_column(header, justify="right")
        for s in self.streams:
            share = f"{s.n_bytes / self.n_bytes:.1%}"
            table.add_row(s.name, f"{s.n_bytes:,}", share, f"{s.raw_bytes:,}", f"{s.entropy_bytes:,.0f}", s.coder)
        table.add_row(
            "header, manifest", f"{self.header_bytes:,}", f"{self.header_bytes / self.n_bytes:.1%}", "", "", ""
        )
        return table


@dataclass(frozen=True)
class FileInfo:
    """Description of a file, from its manifest alone.

    Args:
        path: The file.
        version: Of the format.
        n_bytes: Bytes of the file.
        dense_bytes: Bytes of all tensors in memory, shared ones once.
        tensors: Each tensor; ``n_bytes`` is 0, as it is not known without decoding.
        streams: The bytes of each kind of stream.
        coders: The coders of each kind of stream.
        extra: The user's own values.
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

    def __rich__(self) -> Group:
        table = Table(
            title=f"{self.path}: {self.n_bytes:,} bytes, {self.compression_ratio:.2f} x smaller, format {self.version}"
        )
        table.add_column("tensor")
        for header in ("shape", "dtype", "block", "dense", "unified", "pruned", "stored", "error"):
            table.add_column(header, justify="right")
        for t in self.tensors:
            counts = [f"{n:,}" for n in t.counts] if t.block_shape else ["", "", ""]
            shapes = ("x".join(map(str, t.shape)) or "scalar", t.dtype, "x".join(map(str, t.block_shape)))
            table.add_row(t.name, *shapes, *counts, t.stored, f"{t.max_error:.3g}" if t.max_error else "")
        streams = Table(title="streams")
        streams.add_column("stream")
        for header in ("bytes", "share", "coder"):
            streams.add_column(header, justify="right")
        for name, n_bytes in self.streams.items():
            streams.add_row(name, f"{n_bytes:,}", f"{n_bytes / self.n_bytes:.1%}", self.coders[name])
        return Group(table, streams)


def tensor_report(entry: TensorEntry, entries: tuple[TensorEntry, ...], n_bytes: float = 0.0) -> TensorReport:
    """Return the report on one of the tensors of a file."""
    stored = displayed(entry.form.stored) if entry.form else "bytes"
    if entry.same_as is not None:
        stored = f"same as {entries[entry.same_as].name}"
    return TensorReport(
        name=entry.name,
        dtype=entry.dtype,
        shape=entry.shape,
        block_shape=entry.grid.block_shape if entry.grid else (),
        stored=stored,
        counts=entry.counts,
        dense_bytes=entry.n_bytes if entry.same_as is None else 0,
        n_bytes=n_bytes,
        max_error=entry.error,
    )
