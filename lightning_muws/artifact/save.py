"""Writes a `.muws` file."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_muws.artifact.block_shape import shared_shapes, smallest_shape
from lightning_muws.artifact.chunk import ChunkWriter
from lightning_muws.artifact.codecs import encode
from lightning_muws.artifact.container import MOST, head, write
from lightning_muws.artifact.entropy import count, entropy_bytes
from lightning_muws.artifact.json_text import dump, why_unstorable
from lightning_muws.artifact.load import Progress, check_errors
from lightning_muws.artifact.manifest import ChunkEntry, Manifest, TensorEntry
from lightning_muws.artifact.precision import allowed_forms, candidate, fit
from lightning_muws.artifact.report import SaveReport, StreamReport, tensor_report
from lightning_muws.artifact.source import Source, State, identity, plain, read_state
from lightning_muws.artifact.values import STEPS, Form, Loss, choose, displayed
from lightning_muws.errors import FormatError, SettingError
from lightning_muws.structure.cost import TENSOR_BYTES, check_compression
from lightning_muws.structure.grid import BlockGrid

CHUNK_BYTES = 32 << 20  # of tensors that are coded together
CHUNK_ENTRY_BYTES = 2 << 10  # that a manifest has at most on a chunk: 40 streams of 45
IN_MEMORY = 8 << 20  # of streams; more of them wait in a file beside the place of the file
ChooseGrid = Callable[[str, Tensor], BlockGrid | None]


def save_compressed(
    model: Source,
    path: str | Path,
    *,
    blocks: Mapping[str, BlockGrid] | tuple[int, int] | None = None,
    max_error: float = 0.0,
    relative_to: Literal["tensor_max", "model_max", "absolute"] = "tensor_max",
    value_dtype: Literal["float16", "bfloat16"] | None = None,
    lossy: Literal["weights", "all"] | None = None,
    compression: float | None = None,
    parameters: Collection[str] | None = None,
    extra: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> SaveReport:
    """Write a model to a `.muws` file and return a report of its size.

    Without ``max_error`` and ``value_dtype`` the file is lossless. It is written to a temporary file, synced, then
    renamed, so that a crash or a full disk keeps the old file.

    Args:
        model: A module, a state_dict, a Lightning checkpoint (its weights are taken), or the path of a file of these.
        path: The file to write.
        blocks: How weights are cut, by name, as a plan's grids; or one block shape for all. Other weights get the
            shape that makes the file smallest.
        max_error: How far a weight may move; 0 for not at all. Values become whole multiples of a step. No unified
            block is broken or becomes zero, and a tensor that is smaller exact, or not finite, stays exact.
        relative_to: What ``max_error`` is a share of: ``tensor_max`` or ``model_max``, the largest ``|w|``; or nothing,
            ``absolute``.
        value_dtype: Round values to this dtype instead; they come back in their own.
        lossy: ``weights``: only parameters of two or more axes lose anything, biases, norms and buffers stay exact; or
            ``all`` floating tensors. By default ``weights``, and ``all`` with ``compression``.
        compression: How many times smaller than its tensors the file is at least, above 1; instead of ``max_error``.
            The network loses as little of the energy of its tensors as that allows: each weight gets a step, other
            parameters a step where it pays, and buffers at most float16. The file is at most 5 % smaller than needed
            wherever such a file exists. Several files are coded until one fits, and ``progress`` begins again for each.
        parameters: Names of the model's parameters, for ``compression`` of a state_dict, which does not tell parameters
            from buffers. By default those of the module; without a module, tensors of one axis get at most float16.
        extra: Your own values to keep in the manifest: what JSON can hold, keys being strings, nested at most 64 deep.
            Tuples come back as lists.
        progress: Called with the bytes done and all bytes.

    Raises:
        SettingError: A setting is not allowed, no file is as small as requested, or the model holds anything that a
            file cannot.
        FormatError: The model has so many tensors, or ``extra`` is so large, that no reader would accept the manifest.
        OSError: The file cannot be written; an earlier file at that place is unchanged.

    Example:
        >>> from lightning_muws import MicroStructure, load_compressed
        >>> layer = torch.nn.Linear(64, 64)
        >>> layer.weight.data = MicroStructure(prune_ratio=0.9).project(layer.weight.data)
        >>> path = Path(tempfile.mkdtemp()) / "layer.muws"
        >>> save_compressed(layer, path).compression_ratio > 5
        True
        >>> layer.load_state_dict(load_compressed(path))
        <All keys matched successfully>
    """
    loss, path = Loss(max_error, relative_to, value_dtype, "weights" if lossy is None else lossy), Path(path)
    if compression is not None:
        check_compression(compression)
        if loss:
            raise SettingError(
                f"compression={compression}, max_error={max_error} and value_dtype={value_dtype!r} are different ways "
                "to lose precision: give one of them"
            )
    if path.is_dir() or not path.parent.is_dir():
        raise SettingError(f"{path} cannot be written: it is a folder, or is in none")
    state = read_state(model)
    _check_blocks(blocks, state)
    own = _check_json(extra, state.modules)
    _check_manifest(state, blocks, own)
    shared = shared_shapes(state.tensors.items()) if not isinstance(blocks, tuple) else {}
    choose_grid: ChooseGrid = partial(_grid, blocks=blocks, shared=shared)
    with contextlib.ExitStack() as bodies:

        def encoded(forms: Mapping[str, Form]) -> tuple[int, tuple[_Writer, Manifest]]:
            body = bodies.enter_context(tempfile.SpooledTemporaryFile(max_size=IN_MEMORY, dir=str(path.parent)))
            writer = _Writer(state, loss, body, progress or (lambda done, total: None), forms)
            manifest = writer.run(choose_grid, own)
            n_bytes = sum(map(len, head(manifest.to_dict(), writer.lengths))) + sum(writer.lengths.values())
            return 8 + n_bytes, (writer, manifest)

        if compression is None:
            _, (writer, manifest) = encoded({})
        else:
            grids = _grids(state, choose_grid)
            choose_grid = lambda name, x: grids[name]  # noqa: E731  one search for block shapes, for all files tried
            allowed = allowed_forms(model, state, lossy or "all", parameters)
            writer, manifest = _fit(state, grids, allowed, compression, encoded)
        check = _checker(state, manifest) if loss or compression else lambda file: None
        header_bytes = write(path, manifest.to_dict(), writer.lengths, writer.body, check)
    tensors = (tensor_report(e, manifest.tensors, writer.shares[e.name]) for e in manifest.tensors)
    n_bytes = header_bytes + sum(writer.lengths.values())
    return SaveReport(str(path), n_bytes, header_bytes, manifest.n_bytes, writer.reports(), tuple(tensors))


@dataclass
class _Writer:
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
    symbols: list[tuple[str, dict[str, int]]] = field(default_factory=list)
    done: int = 0

    def run(self, choose_grid: ChooseGrid, extra: Mapping[str, Any]) -> Manifest:
        """Write all streams, and return the manifest."""
        entries: list[TensorEntry] = []
        seen: dict[tuple[Any, ...], int] = {}
        stored = {identity(x): x.numel() * x.element_size() for x in self.state.tensors.values()}
        total = sum(stored.values())
        largest = self._largest()
        for i, (name, tensor) in enumerate(self.state.tensors.items()):
            entry = TensorEntry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            first = seen.setdefault(identity(tensor), i)
            if first < i:
                entries.append(replace(entry, same_as=first))
                continue
            x = plain(tensor)
            entry = self._decide(entry, x, choose_grid, largest)
            entries.append(self._write(i, entry, x, total))
        if self.state.tensors and (not self.chunks or self.chunks[-1].until < (len(entries), 0)):
            self._flush((len(entries), 0))
        return Manifest(tuple(entries), tuple(self.chunks), self.state.modules, extra)

    def _largest(self) -> float:
        """Return the largest ``|w|`` of the model, if the error is relative to it; else what it is relative to."""
        if self.loss.relative_to != "model_max" or not self.loss.max_error:
            return 1.0
        names = self.state.tensors if self.loss.lossy == "all" else self.state.weights
        found = (self.state.tensors[name] for name in names)
        return max((_top(x) for x in found if x.is_floating_point() and x.numel()), default=0.0)

    def _decide(self, entry: TensorEntry, x: Tensor, choose_grid: ChooseGrid, largest: float) -> TensorEntry:
        """Return the entry with its form, and its blocks."""
        if not x.is_floating_point() or x.element_size() == 1:
            return entry
        grid = choose_grid(entry.name, x)
        if entry.name in self.forms:
            return replace(entry, grid=grid, form=self.forms[entry.name])
        loses = self.loss.lossy == "all" or entry.name in self.state.weights
        if self.loss.max_error and loses and self.loss.relative_to == "tensor_max" and x.numel():
            largest = _top(x)
        return replace(entry, grid=grid, form=choose(x, grid, self.loss if loses else Loss(), largest))

    def _write(self, i: int, entry: TensorEntry, x: Tensor, total: int) -> TensorEntry:
        """Write a tensor, over as many chunks as it takes; return the entry with what was measured."""
        units = entry.grid.matrix(x) if entry.grid else x.reshape(-1)
        unit_bytes = max(1, x.numel() * x.element_size() // max(1, len(units)))
        counts, error, at = (0, 0, 0), 0.0, 0
        while at < len(units):
            fit = max(0, CHUNK_BYTES - self.chunk.n_bytes) // unit_bytes // entry.block_rows * entry.block_rows
            if not fit and self.chunk.n_bytes:
                self._flush((i, at))
                continue
            stop = min(len(units), at + max(fit, entry.block_rows))
            measured = self.chunk.add(entry, units[at:stop])
            self.symbols.append((entry.name, dict(self.chunk.symbols)))
            n = measured.counts
            counts = (counts[0] + n[0], counts[1] + n[1], counts[2] + n[2])
            error = max(error, measured.error)
            self.done += (stop - at) * unit_bytes
            self.progress(self.done, total)
            at = stop
        return replace(entry, counts=counts, error=error)

    def _flush(self, until: tuple[int, int]) -> None:
        """Code the streams of a chunk and write them."""
        streams = {}
        for name, data in self.chunk.streams():
            coder, coded = encode(data)
            self.body.write(coded)
            streams[name] = (coder, zlib.crc32(coded))
            self.lengths[f"c{len(self.chunks)}.{name}"] = len(coded)
            self.coded[name].append((coder, len(coded), len(data), entropy_bytes(count(data))))
            self._share(name, len(coded))
        self.chunks.append(ChunkEntry(until, streams))
        self.chunk = ChunkWriter()
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


def _fit(
    state: State,
    grids: Mapping[str, BlockGrid | None],
    allowed: Mapping[str, tuple[str, ...]],
    compression: float,
    encoded: Callable[[Mapping[str, Form]], tuple[int, tuple[_Writer, Manifest]]],
) -> tuple[_Writer, Manifest]:
    """Return the largest file that is so many times smaller than its tensors."""
    owned = {identity(x): name for name, x in reversed(state.tensors.items())}  # the first name of shared ones
    dense_bytes = sum(state.tensors[name].nbytes for name in owned.values())
    found, others = {}, 0
    for name in owned.values():
        if name in grids:
            found[name] = candidate(plain(state.tensors[name]), grids[name], allowed.get(name, ()))
        else:
            others += state.tensors[name].nbytes
    return fit(found, others + TENSOR_BYTES * len(state.tensors), dense_bytes, compression, encoded)


def _grids(state: State, choose_grid: ChooseGrid) -> dict[str, BlockGrid | None]:
    """Return how each floating tensor is cut."""
    floating = {name: x for name, x in state.tensors.items() if x.is_floating_point() and x.element_size() > 1}
    return {name: choose_grid(name, plain(x)) for name, x in floating.items()}


def _grid(
    name: str,
    x: Tensor,
    blocks: Mapping[str, BlockGrid] | tuple[int, int] | None,
    shared: Mapping[str, tuple[int, int] | None],
) -> BlockGrid | None:
    """Return how a weight is cut; None where it is flat."""
    if isinstance(blocks, Mapping) and name in blocks:
        grid: BlockGrid | None = blocks[name].unbatched(x.shape)
    elif x.ndim < 2 or not x.numel():
        grid = None
    else:
        shape = blocks if isinstance(blocks, tuple) else shared[name] if name in shared else smallest_shape(x)
        grid = BlockGrid(shape) if shape else None
    if grid is None or 0 in grid.counts(x.shape):
        return None
    row_bytes = grid.block_shape[0] * grid.matrix_shape(x.shape)[1] * x.element_size()
    return grid if row_bytes <= CHUNK_BYTES else None


def _top(x: Tensor) -> float:
    low, high = torch.aminmax(x.reshape(-1))
    top = max(-float(low), float(high))
    return top if np.isfinite(top) else 0.0


def _check_blocks(blocks: Mapping[str, BlockGrid] | tuple[int, int] | None, state: State) -> None:
    if isinstance(blocks, Mapping):
        if wrong := [name for name in blocks if name not in state.tensors or state.tensors[name].ndim < 2]:
            raise SettingError(
                f"blocks names {', '.join(wrong[:5])}, which is no tensor of two or more axes; "
                f"there are {', '.join(list(state.tensors)[:5])}"
            )
    elif blocks is not None:
        BlockGrid(blocks)


def _check_json(extra: Mapping[str, Any] | None, modules: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``extra`` as a dict that comes back equal."""
    if not isinstance(extra, (Mapping, type(None))):
        raise SettingError(f"extra is a {type(extra).__name__}, a dict is needed")
    own = dict(extra or {})
    if why := why_unstorable(own, "extra") or why_unstorable(modules, "the versions of the modules"):
        raise SettingError(f"this cannot be written as JSON: {why}")
    return own


def _check_manifest(
    state: State, blocks: Mapping[str, BlockGrid] | tuple[int, int] | None, extra: Mapping[str, Any]
) -> None:
    """Refuse a model whose manifest may become too large, before any work on its values: all numbers count as long."""
    number = -sys.float_info.min  # no float has more digits
    entries = []
    for name, x in state.tensors.items():
        entry = TensorEntry(name, str(x.dtype).removeprefix("torch."), tuple(x.shape))
        if x.is_floating_point():
            grid = blocks[name] if isinstance(blocks, Mapping) and name in blocks else BlockGrid((16, 16))
            form, counts = Form(STEPS, number), (x.numel(), x.numel(), x.numel())
            entry = replace(entry, form=form, grid=grid if x.ndim > 1 else None, counts=counts, error=number)
        entries.append(entry)
    n_bytes = len(dump(Manifest(tuple(entries), (), state.modules, extra).to_dict()))
    n_chunks = 2 + 2 * sum(entry.n_bytes for entry in entries) // CHUNK_BYTES  # any two together have CHUNK_BYTES
    if (n_bytes := n_bytes + n_chunks * CHUNK_ENTRY_BYTES) > MOST:
        raise FormatError(
            f"the manifest would have up to {n_bytes} bytes for {len(entries)} tensors, at most {MOST} are allowed: "
            "save the model in several files"
        )


def _checker(state: State, manifest: Manifest) -> Callable[[IO[bytes]], None]:
    """Return a check that a file decodes to what the manifest promises."""
    errors = {entry.name: entry.error for entry in manifest.tensors}
    return lambda file: check_errors(file, state.tensors, errors)
