"""Codes the tensors of a state into streams beside the place of a file, and puts the finished file there."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from lightning_muws.artifact import native
from lightning_muws.artifact.chunk import NOTHING, ChunkWriter
from lightning_muws.artifact.container import head, write
from lightning_muws.artifact.entropy import count, entropy_bytes
from lightning_muws.artifact.load import Progress, check_errors
from lightning_muws.artifact.manifest import ChunkEntry, Manifest, TensorEntry, item_bytes
from lightning_muws.artifact.parts import encode
from lightning_muws.artifact.report import SaveReport, StreamReport, tensor_report
from lightning_muws.artifact.source import State
from lightning_muws.artifact.streams import slabs
from lightning_muws.artifact.values import BYTES, Form, Loss, choose, displayed
from lightning_muws.structure.grid import BlockGrid

CHUNK_BYTES = 32 << 20  # of tensors that are coded together
# A tensor of this share of a chunk begins a chunk, and others may add this share of it to its last one: who reads it
# alone reads little else. A chunk costs tables and names, so small tensors get none of their own.
LARGE, ASIDE = 1 / 4, 1 / 64
PALETTE_BYTES = 1 << 18  # that the palettes of all tensors take in a manifest at most
LEAST_COPY = 1 << 10  # bytes of a tensor that is written as the copy of an earlier one
LEAST_CUT = 1 << 12  # values of one byte that are cut into blocks
SAMPLED = 1 << 12  # values of a tensor that are compared first
IN_MEMORY = 8 << 20  # of streams; more of them wait in a file beside the place of the file
ChooseGrid = Callable[[str, Tensor], BlockGrid | None]


@dataclass(frozen=True)
class Draft:
    """A file whose streams are coded.

    Args:
        state: What is in it.
        writer: What coded the streams.
        manifest: Its manifest.
    """

    state: State
    writer: Writer
    manifest: Manifest

    @property
    def n_bytes(self) -> int:
        """Bytes of the file."""
        lengths = self.writer.lengths
        return 8 + sum(map(len, head(self.manifest.to_dict(), lengths))) + sum(lengths.values())

    def put(self, path: Path, *, is_lossy: bool) -> SaveReport:
        """Write the file and return its report; a lossy one is decoded and compared before it replaces an older one.

        Raises:
            FormatError: The manifest is larger than a reader would accept.
            OSError: The file cannot be written; an earlier file at that place is unchanged.
        """
        manifest, writer = self.manifest, self.writer
        errors = {entry.name: entry.error for entry in manifest.tensors}

        def check(file: IO[bytes]) -> None:
            if is_lossy:
                check_errors(file, lambda name: self.state.tensors[name].read(), errors)

        header_bytes = write(path, manifest.to_dict(), writer.lengths, writer.body, check)
        tensors = (tensor_report(e, manifest.tensors, writer.shares[e.name]) for e in manifest.tensors)
        n_bytes = header_bytes + sum(writer.lengths.values())
        return SaveReport(str(path), n_bytes, header_bytes, manifest.n_bytes, writer.reports(), tuple(tensors))


class Drafts:
    """Codes files whose streams wait beside a path until the context ends.

    Args:
        path: Where the file will be.
        extra: The user's own values.
        progress: Called with the bytes done and all bytes, from 0 for each file.
    """

    def __init__(self, path: Path, extra: Mapping[str, Any], progress: Progress | None = None) -> None:
        self._path, self._extra, self._progress = path, extra, progress
        self._bodies = contextlib.ExitStack()

    def __enter__(self) -> Drafts:
        """Return it."""
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the streams."""
        self._bodies.close()

    def code(
        self,
        state: State,
        choose_grid: ChooseGrid,
        forms: Mapping[str, Form] | None = None,
        loss: Loss | None = None,
    ) -> Draft:
        """Return the draft of a file.

        Args:
            state: What goes into it.
            choose_grid: Returns how a floating tensor is cut.
            forms: How the values of tensors are written, by name; ``loss`` decides for others.
            loss: What may be lost; by default nothing.
        """
        body = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY, dir=str(self._path.parent))  # noqa: SIM115  closed on exit
        self._bodies.callback(body.close)
        progress = self._progress or (lambda done, total: None)
        writer = Writer(state, loss or Loss(), body, progress, forms or {})
        return Draft(state, writer, writer.run(choose_grid, self._extra))


@dataclass
class Writer:
    """Encode every tensor into ``body`` and collect the entries of the manifest."""

    state: State
    loss: Loss
    body: IO[bytes]
    progress: Progress
    forms: Mapping[str, Form]  # chosen before, by name
    chunk: ChunkWriter = field(default_factory=ChunkWriter)
    chunks: list[ChunkEntry] = field(default_factory=list)
    lengths: dict[str, int] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    coded: dict[str, list[tuple[str, int, int, float]]] = field(default_factory=lambda: defaultdict(list))
    alike: dict[tuple[Any, ...], list[int]] = field(default_factory=dict)  # tensors that begin equally, by index
    distances: dict[str, float] = field(default_factory=dict)  # of the tensors, squared
    symbols: list[tuple[str, dict[str, int]]] = field(default_factory=list)
    room: int = field(default_factory=lambda: PALETTE_BYTES)  # that is left for palettes
    full_at: float = math.inf  # bytes of a chunk at which no tensor joins the end of a large one
    done: int = 0

    def run(self, choose_grid: ChooseGrid, extra: Mapping[str, Any]) -> Manifest:
        """Write all streams, and return the manifest."""
        entries: list[TensorEntry] = []
        seen: dict[Hashable, int] = {}
        total = sum({x.key: x.nbytes for x in self.state.tensors.values()}.values())
        n_names = Counter(x.key for x in self.state.tensors.values())
        largest = self._largest()
        for i, (name, tensor) in enumerate(self.state.tensors.items()):
            entry = TensorEntry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            first = seen.setdefault(tensor.key, i)
            if first < i:
                entries.append(replace(entry, same_as=first))
                continue
            original = tensor.read()
            x = tensor.change(original) if tensor.change else original
            entry = self._decide(entry, x, choose_grid, largest)
            # no entry may refer to a copy, so that a tensor of several names is none
            same = self._equal(entry, original, entries) if n_names[tensor.key] == 1 else None
            if same is not None:
                self.distances[entry.name] = self.distances.get(entries[same].name, 0.0)
                self.done += tensor.nbytes
                self.progress(self.done, total)
                entries.append(TensorEntry(entry.name, entry.dtype, entry.shape, same_as=same, is_copy=True))
            else:
                entries.append(self._write(i, entry, x, original, total))
        if self.state.tensors and (not self.chunks or self.chunks[-1].until < (len(entries), 0)):
            self._flush((len(entries), 0))
        return Manifest(tuple(entries), tuple(self.chunks), self.state.modules, extra)

    def _equal(self, entry: TensorEntry, x: Tensor, entries: list[TensorEntry]) -> int | None:
        """Return the index of an earlier tensor that is equal bit for bit and written in the same way, if there is one.

        Both are compared whole only if their beginnings are equal, so that different tensors take no time.
        """
        if entry.n_bytes < LEAST_COPY:
            return None
        start = x.reshape(-1)[:SAMPLED].view(torch.uint8).numpy().tobytes()
        found = self.alike.setdefault((entry.dtype, entry.shape, hash(start)), [])
        for i in found:
            earlier, stored = entries[i], self.state.tensors[entries[i].name]
            is_alike = (earlier.form, earlier.grid) == (entry.form, entry.grid)
            if is_alike and bool(stored.change) == bool(self.state.tensors[entry.name].change):
                other = stored.read()
                if all(np.array_equal(_raw(x, part), _raw(other, part)) for part in slabs(x.numel(), 1)):
                    return i
        found.append(len(entries))
        return None

    def _largest(self) -> float:
        """Return the largest ``|w|`` of the model, if the error is relative to it; else what it is relative to."""
        if self.loss.relative_to != "model_max" or not self.loss.max_error:
            return 1.0
        names = self.state.tensors if self.loss.lossy == "all" else self.state.weights
        found = (self.state.tensors[name] for name in names)
        return max((top(x.read()) for x in found if x.dtype.is_floating_point and x.nbytes), default=0.0)

    def _decide(self, entry: TensorEntry, x: Tensor, choose_grid: ChooseGrid, largest: float) -> TensorEntry:
        """Return the entry with its form, and its blocks."""
        if entry.dtype in BYTES and x.ndim >= 2 and x.numel() >= LEAST_CUT:
            grid = choose_grid(entry.name, x)
            return replace(entry, grid=grid, form=Form(entry.dtype) if grid else None)
        if not self.state.tensors[entry.name].is_cuttable:
            return entry
        grid = choose_grid(entry.name, x)
        if entry.name in self.forms:
            return replace(entry, grid=grid, form=self._affordable(self.forms[entry.name], entry.dtype))
        loses = self.loss.lossy == "all" or entry.name in self.state.weights
        if self.loss.max_error and loses and self.loss.relative_to == "tensor_max" and x.numel():
            largest = top(x)
        form = choose(x, grid, self.loss if loses else Loss(), largest)
        return replace(entry, grid=grid, form=self._affordable(form, entry.dtype))

    def _affordable(self, form: Form, dtype: str) -> Form:
        """Return the form, or the exact one if the palettes of all tensors would make the manifest too large."""
        if not form.palette:
            return form
        n_bytes = 2 * len(form.palette) * item_bytes(dtype)
        if n_bytes > self.room:
            return Form(dtype)
        self.room -= n_bytes
        return form

    def _write(self, i: int, entry: TensorEntry, x: Tensor, original: Tensor, total: int) -> TensorEntry:
        """Write a tensor, over as many chunks as it takes; return the entry with what was measured."""
        units, old = (entry.grid.matrix(t) if entry.grid else t.reshape(-1) for t in (x, original))
        unit_bytes = max(1, x.numel() * x.element_size() // max(1, len(units)))
        measured, at, is_large = NOTHING, 0, is_large_tensor(entry.n_bytes)
        if self.chunk.n_bytes and (is_large or self.chunk.n_bytes + entry.n_bytes > self.full_at):
            self._flush((i, 0))
        while at < len(units):
            fit = max(0, CHUNK_BYTES - self.chunk.n_bytes) // unit_bytes // entry.block_rows * entry.block_rows
            if not fit and self.chunk.n_bytes:
                self._flush((i, at))
                continue
            stop = min(len(units), at + max(fit, entry.block_rows))
            measured += self.chunk.add(entry, units[at:stop], None if x is original else old[at:stop])
            self.symbols.append((entry.name, dict(self.chunk.symbols)))
            self.done += (stop - at) * unit_bytes
            self.progress(self.done, total)
            at = stop
        if is_large:
            self.full_at = self.chunk.n_bytes + ASIDE * entry.n_bytes
        self.distances[entry.name] = measured.distance
        return replace(entry, counts=measured.counts, error=measured.error)

    def _flush(self, until: tuple[int, int]) -> None:
        """Code the streams of a chunk and write them."""
        streams = {}
        for name, data in self.chunk.streams():
            coder, coded = encode(data, self.chunk.rows if name == "other" else ())
            self.body.write(coded)
            streams[name] = (coder, native.crc32(coded))
            self.lengths[f"c{len(self.chunks)}.{name}"] = len(coded)
            self.coded[name].append((coder, len(coded), len(data), entropy_bytes(count(data))))
            self._share(name, len(coded))
        self.chunks.append(ChunkEntry(until, streams))
        self.chunk = ChunkWriter()
        self.full_at = math.inf
        self.symbols = []

    def _share(self, name: str, n_bytes: int) -> None:
        """Give each piece its share of a stream, by the symbols it has there."""
        key = name.rpartition(".")[0] or name
        here = [(tensor, symbols.get(key, 0)) for tensor, symbols in self.symbols]
        total = sum(n for _, n in here)
        for tensor, n in here:
            self.shares[tensor] += n_bytes * n / total

    def reports(self) -> tuple[StreamReport, ...]:
        """Return a report on each kind of stream."""
        found = []
        for name, coded in self.coded.items():
            coders, lengths, raw, entropies = zip(*coded, strict=True)
            found.append(
                StreamReport(displayed(name), "+".join(sorted(set(coders))), sum(lengths), sum(raw), sum(entropies))
            )
        return tuple(found)


def is_large_tensor(n_bytes: int) -> bool:
    """Return whether a tensor of so many bytes begins a chunk."""
    return n_bytes >= LARGE * CHUNK_BYTES


def top(x: Tensor) -> float:
    """Return the largest ``|x|`` of a tensor; 0 if it is not finite."""
    low, high = torch.aminmax(x.reshape(-1))
    largest = max(-float(low), float(high))
    return largest if np.isfinite(largest) else 0.0


def _raw(x: Tensor, part: slice) -> Any:
    """Return the bytes of some elements of a contiguous tensor."""
    return x.view(-1)[part].view(torch.uint8).numpy()
