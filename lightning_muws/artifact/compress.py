"""Compresses a checkpoint on the disk without training: kinds of blocks and steps for one file size, tensor by tensor.

The first pass measures each tensor and keeps far less than the tensor. At some price of a bit, each tensor is then what
costs least: rounded as it is, or with blocks of some shape unified and pruned. The second pass projects, rounds and
codes each tensor; the size of the real file corrects the price, until a file is within 5 % of the size asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_muws.artifact.container import check_place
from lightning_muws.artifact.load import MAX_BYTES, Progress
from lightning_muws.artifact.precision import (
    AIM,
    Candidate,
    Offer,
    Offering,
    allowed_forms,
    candidate,
    estimated_bytes,
    fit,
)
from lightning_muws.artifact.report import CompressedTensor, CompressReport, SaveReport
from lightning_muws.artifact.save import check_manifest, grid_chooser
from lightning_muws.artifact.source import Source, Stored, read_state
from lightning_muws.artifact.streams import slabs
from lightning_muws.artifact.values import STEPS, Form
from lightning_muws.artifact.writer import Draft, Drafts
from lightning_muws.errors import SettingError
from lightning_muws.structure.cost import TENSOR_BYTES, check_compression, sample, search, table_bits
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.layer import Bounds, Layer, measure
from lightning_muws.structure.micro import MicroStructure

BLOCK_SHAPES = ((4, 4), (1, 8))  # tried for each weight
WORTH = 0.97  # a tensor is cut if that costs less than this share of rounding alone: the estimates are that good
MEASURED = 1 << 14  # blocks of a weight that are measured, spread over its rows


def compress_file(
    source: Source,
    path: str | Path,
    compression: float,
    *,
    block_shape: tuple[int, int] | None = None,
    extra: Mapping[str, Any] | None = None,
    max_bytes: int = MAX_BYTES,
    progress: Progress | None = None,
) -> CompressReport:
    """Write a checkpoint, without training, to a file so many times smaller than its tensors, and return a report.

    Of a safetensors checkpoint, in one file or several, one tensor and one chunk of the file are in memory at a time;
    other sources are loaded whole. The network loses as little of the energy of its tensors as the size allows: the sum
    of ``|w - w'|^2 / |w|^2`` over the tensors is the least, for bits as the file's entropies count them (Shoham and
    Gersho 1988). Tensors of one axis keep the relative precision of float16, integers every bit, and tensors with NaN
    or Inf too.

    Args:
        source: The path of a safetensors file, of the index of several, or of their folder; of a `.muws` file or one
            that torch.save wrote; or a module or state_dict.
        path: The file to write.
        compression: Bytes of all tensors over the bytes of the file, at least; at most 5 % more wherever such a file
            exists. Above 1.
        block_shape: Rows and columns of the blocks of weights. By default each weight gets 4x4 or 1x8, whichever costs
            less, or stays without new structure if rounding alone costs less.
        extra: Your own values to keep in the manifest; by default those of a `.muws` source.
        max_bytes: As in ``save_compressed``.
        progress: Called with the bytes coded and all bytes, from 0 for each file that is coded.

    Raises:
        SettingError: A setting is not allowed, no file is as small as that, or the source cannot be read.
        FormatError: The `.muws` source is damaged, or the manifest would be too large.
        OSError: The file cannot be written; an earlier file at that place is unchanged.

    Example:
        >>> import tempfile
        >>> weights = {"w": torch.randn(64, 64, generator=torch.Generator().manual_seed(0))}
        >>> path = Path(tempfile.mkdtemp()) / "small.muws"
        >>> 8 <= compress_file(weights, path, compression=8).compression_ratio <= 8.4
        True
    """
    check_compression(compression)
    shapes = BLOCK_SHAPES if block_shape is None else (BlockGrid(block_shape).block_shape,)
    check_place(path := Path(path))
    state = read_state(source, max_bytes)
    own = check_manifest(state, state.grids, state.extra if extra is None else extra)
    choose_grid = grid_chooser(state, state.grids)
    owned = {x.key: name for name, x in reversed(state.tensors.items())}  # the first name of shared ones
    dense_bytes = sum(state.tensors[name].nbytes for name in owned.values())
    allowed, grids = allowed_forms(source, state, "all"), dict[str, "BlockGrid | None"]()
    found, energies, others = dict[str, _Best](), dict[str, float](), 0
    for name in owned.values():
        stored = state.tensors[name]
        if not stored.is_cuttable:
            others += stored.nbytes
            continue
        x = stored.read()
        grids[name] = choose_grid(name, x)
        plain = candidate(x, grids[name], allowed.get(name, ()))
        energies[name] = _energy(x)
        cuts = [_cut(name, x, shape, plain) for shape in shapes] if name in state.weights and plain.unit else []
        found[name] = _Best(plain, tuple(cut for cut in cuts if cut))
    with Drafts(path, own, progress) as drafts:
        n_files = 0

        def encode(offers: Mapping[str, Offer]) -> tuple[int, Draft]:
            nonlocal n_files
            n_files += 1
            tensors = {name: _changed(x, offers.get(owned[x.key])) for name, x in state.tensors.items()}
            structures = {name: offer.structure for name, offer in offers.items()}
            cut = {name: s.grid if s else grids[name] for name, s in structures.items()}
            forms = {name: offer.form for name, offer in offers.items()}
            now = replace(state, tensors=tensors)
            draft = drafts.code(now, lambda name, x: cut[name] if name in cut else choose_grid(name, x), forms)
            return draft.n_bytes, draft

        draft = _fitted(found, others + TENSOR_BYTES * len(state.tensors), dense_bytes, compression, encode)
        report = draft.put(path, is_lossy=True)
    return _report(report, draft, energies, n_files)


def _fitted(
    found: Mapping[str, _Best],
    other_bytes: float,
    dense_bytes: int,
    compression: float,
    encode: Callable[[Mapping[str, Offer]], tuple[int, Draft]],
) -> Draft:
    """Return the largest file that is so many times smaller than its tensors.

    Which weights are cut is settled at the estimated price: the size would jump where a large weight changes its mind.
    """
    price = search(lambda price: estimated_bytes(found, other_bytes, price), dense_bytes / compression / AIM)
    try:
        return fit({n: one.at(price) for n, one in found.items()}, other_bytes, dense_bytes, compression, encode)
    except SettingError:  # out of reach with these
        return fit(found, other_bytes, dense_bytes, compression, encode)


@dataclass(frozen=True)
class _Best:
    """A tensor that stays as it is, or is cut in one of several ways if that is clearly cheaper."""

    plain: Candidate
    cuts: tuple[_Cut, ...]

    def at(self, multiplier: float) -> Offering:
        """Return the one that costs least if a bit costs ``multiplier``."""
        best: Offering = self.plain
        least = WORTH * best.offer(multiplier).cost
        for cut in self.cuts:
            offer = cut.offer(multiplier)
            if offer.structure and offer.cost < least:
                best, least = cut, offer.cost
        return best

    def offer(self, multiplier: float) -> Offer:
        """Return the offer of the one that costs least."""
        return self.at(multiplier).offer(multiplier)


@dataclass(frozen=True)
class _Cut:
    """A weight that may be unified and pruned.

    Args:
        layer: What a budget knows of the block rows that were measured.
        scale: Values of the weight over those that were measured.
        finest: The smallest step, in units of the layer.
    """

    layer: Layer
    scale: float
    finest: float

    def offer(self, multiplier: float) -> Offer:
        """Return the kinds of blocks that cost least, with their step."""
        layer, bounds = self.layer, self.layer.bounds
        assert bounds is not None  # noqa: S101  only cut weights come here
        prices, kinds = layer.settle(multiplier)
        edges = layer.n_free * (prices.free.bits + layer.importance / multiplier * prices.free.error)
        table = table_bits(int(self.scale * len(kinds) * bounds.grid.block_numel), layer.top / prices.step)
        cost, n_bits = (
            float(one.costs(multiplier, prices).gather(0, kinds[None]).sum(dtype=torch.float64))
            for one in (layer, replace(layer, importance=0.0))
        )
        counts, n = torch.bincount(kinds, minlength=3).tolist(), len(kinds)
        pruned, unified = counts[Kind.PRUNED] / n, counts[Kind.UNIFIED] / n
        structure = MicroStructure(bounds.grid.block_shape, pruned, min(unified, 1 - pruned), bounds.signs)
        step = max(prices.step, self.finest) * layer.unit
        return Offer(
            self.scale * (cost + edges) + table,
            self.scale * (n_bits + layer.n_free * prices.free.bits) + table,
            Form(STEPS, float(np.float32(step)), is_lossy=True),
            None if structure.is_open else structure,
        )


def _cut(name: str, x: Tensor, block_shape: tuple[int, int], plain: Candidate) -> _Cut | None:
    """Return what unifying and pruning a weight would cost, from some of its block rows; None if no block fits."""
    grid = BlockGrid(block_shape)
    down, across = grid.counts(x.shape)
    if not down * across or x.shape.numel() // down > MEASURED * grid.block_numel:
        return None
    matrix, rows = grid.matrix(x), block_shape[0]
    picked = sample(torch.arange(down), -(-MEASURED // across))
    some = matrix[: down * rows].view(down, rows, -1)[picked].flatten(0, 1)
    if not some.any():
        return None
    layer = measure(name, some, Bounds(grid), plain.importance / plain.unit**2)
    return _Cut(layer, x.numel() / some.numel(), plain.finest * plain.unit / layer.unit)


def _changed(stored: Stored, offer: Offer | None) -> Stored:
    """Return a tensor that is projected onto the structure of its offer, if it has one, when it is stored."""
    if offer is None or offer.structure is None:
        return stored
    return replace(stored, change=offer.structure.project)


def _energy(x: Tensor) -> float:
    """Return ``|x|^2``, read a slab at a time."""
    flat = x.view(-1)
    return math.fsum(float(flat[rows].to(torch.float64).square().sum()) for rows in slabs(len(flat), 1))


def _report(report: SaveReport, draft: Draft, energies: Mapping[str, float], n_files: int) -> CompressReport:
    tensors = []
    for tensor in report.tensors:
        lost, energy = draft.writer.distances.get(tensor.name, 0.0), energies.get(tensor.name, 0.0)
        numel = math.prod(tensor.shape)
        tensors.append(
            CompressedTensor(
                tensor.name,
                tensor.shape,
                tensor.block_shape,
                tensor.counts,
                tensor.stored,
                tensor.n_bytes,
                8 * tensor.n_bytes / max(1, numel),
                lost / energy if lost else 0.0,
            )
        )
    return CompressReport(report.path, report.n_bytes, report.dense_bytes, n_files, tuple(tensors))
