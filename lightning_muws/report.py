"""The result of a compression in numbers, layer by layer: as dataclasses, dicts and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muws.page import Page, figures, keys
from lightning_muws.pictures import Line, Span, line_chart
from lightning_muws.structure.block_map import COLOURS, MEANING, BlockMap
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.plan import Plan, PlanEntry
from lightning_muws.structure.sharded import whole
from lightning_muws.structure.support import Support
from lightning_muws.tables import Column, Table, Tabular
from lightning_muws.training.drop import DropReport
from lightning_muws.training.run import Update

LAYERS = (
    Column("layer", room=24),
    Column("shape", drop=3),
    Column("block", drop=2),
    Column("dense"),
    Column("unified"),
    Column("pruned"),
    Column("edge", drop=1),
    Column("nonzero"),
    Column("residual"),
    Column("bits"),
    Column("mults", drop=4),
    Column("adds", drop=4),
)
KEYS = [(MEANING[kind], COLOURS[kind]) for kind in Kind]  # of the pictures of blocks


@dataclass(frozen=True)
class LayerReport:
    """The structure of one covered weight after training.

    Args:
        name: Name of the parameter.
        shape: Shape of the parameter.
        block_shape: ``(outputs, inputs)`` of a block.
        n_dense: Number of dense blocks.
        n_unified: Number of unified blocks (one magnitude).
        n_pruned: Number of pruned blocks (all zero).
        n_edge: Number of weights at the edges that fill no block; they stay dense.
        n_weights: Number of weights.
        n_nonzero: Number of weights that are not zero, counted on the weight itself.
        primal: ``|W - project(W)| / |W|`` when the structure was frozen.
        dense_bits: Bits of the dense weight.
        ideal_bits: A lower bound on the bits of the compressed weight that ignores file headers and does not
            entropy-code the values: each dense weight in full, one magnitude for each unified block and one bit for
            each of its signs, and the entropy of the kinds.
        multiplications: Multiplications for one output position: one for each dense weight, ``min(rows, cols)`` for
            each unified block (1 if its weights share their sign).
        additions: Additions for one output position: one for each weight of a dense or unified block
            (``rows + cols - 1`` for a unified block whose weights share their sign).
    """

    name: str
    shape: tuple[int, ...]
    block_shape: tuple[int, int]
    n_dense: int
    n_unified: int
    n_pruned: int
    n_edge: int
    n_weights: int
    n_nonzero: int
    primal: float
    dense_bits: int
    ideal_bits: float
    multiplications: int
    additions: int


@dataclass(frozen=True)
class CompressionReport(Tabular):
    """The result of a compression; ``print`` and notebooks show it as a table.

    Args:
        layers: One report for each covered weight.
        n_uncovered: Number of weights of the model without a structure.
        uncovered_bits: Bits of these weights.
        history: The Z/U updates of the run, and its projection last.
        drop: The drop of a monitored metric, if a callback was given ``max_drop``.
        predicted_speedup: How many times faster than its best dense form ``accelerate`` should make the module; None if
            the structures were not chosen for a speedup.
        maps: Where the blocks of each covered weight lie, by name; not in ``to_dict``.
    """

    layers: tuple[LayerReport, ...]
    n_uncovered: int
    uncovered_bits: int
    history: tuple[Update, ...] = ()
    drop: DropReport | None = None
    predicted_speedup: float | None = None
    maps: Mapping[str, BlockMap] = field(default_factory=dict, repr=False, compare=False)

    @property
    def sparsity(self) -> float:
        """Share of zeros among the covered weights, in [0, 1]."""
        return 1 - self._sum("n_nonzero") / max(1, self._sum("n_weights"))

    @property
    def ideal_ratio(self) -> float:
        """Dense bits of the whole model over its idealised bits."""
        return (self._sum("dense_bits") + self.uncovered_bits) / (self._sum("ideal_bits") + self.uncovered_bits)

    def _sum(self, name: str) -> float:
        return float(sum(getattr(layer, name) for layer in self.layers))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists, strings and numbers, ready for JSON."""
        drop = asdict(self.drop) | {"drop": self.drop.drop, "is_kept": self.drop.is_kept} if self.drop else None
        found = asdict(replace(self, maps={})) | {"drop": drop}
        del found["maps"]
        return found | {"sparsity": self.sparsity, "ideal_ratio": self.ideal_ratio}

    def to_html(self, *, scores: Mapping[str, float] | None = None, speed: Tabular | None = None) -> str:
        """Return a page of HTML with this report and a picture of each block map; it needs no other file.

        :func:`lightning_muws.file_page.file_page` makes such a page of a file, with the bytes that it takes.

        Args:
            scores: Numbers to show, by name, such as ``{"accuracy": 0.92, "accuracy of the dense network": 0.93}``.
            speed: What :func:`lightning_muws.accelerate` reports.
        """
        page = Page("Micro-structured weights")
        n_weights = int(self._sum("n_weights"))
        facts = [("covered weights", f"{n_weights:,}"), ("of them are zero", f"{self.sparsity:.1%}")]
        page.facts([*facts, *score_facts(scores or {})])
        shapes = {
            layer.name: ("x".join(map(str, x)) for x in (layer.shape, layer.block_shape)) for layer in self.layers
        }
        captions = {name: " in blocks of ".join(found) for name, found in shapes.items()}
        if self.maps:
            add_maps(page, [(name, captions.get(name, ""), found) for name, found in self.maps.items()])
        add_residuals(page, self.history)
        page.heading("Layers")
        page.table(self._layers())
        if speed:
            page.heading("Speed")
            for table in speed.tables():
                page.table(table)
        return page.html()

    def _repr_html_(self) -> str:
        tables = super()._repr_html_()
        if not self.maps:
            return tables
        return tables + keys(KEYS) + figures((name, str(found), found.pixels()) for name, found in self.maps.items())

    def tables(self) -> list[Table]:
        """Return the table of the layers, and that of the residuals if there was an update."""
        return [self._layers(), *([residual_table(self.history)] if self.history else [])]

    def _layers(self) -> Table:
        totals = [f"{self._sum(name):,.0f}" for name in ("n_dense", "n_unified", "n_pruned", "n_edge", "n_nonzero")]
        n_weights, dense_bits = max(1, self._sum("n_weights")), max(1, self._sum("dense_bits"))
        work = [f"{self._sum(name) / n_weights:.1%}" for name in ("multiplications", "additions")]
        last = f"{self.history[-1].primal:.3f}" if self.history else ""
        return Table(
            title="Micro-structured weights",
            columns=LAYERS,
            rows=[_cells(layer) for layer in self.layers],
            total=["all covered", "", "", *totals, last, f"{self._sum('ideal_bits') / dense_bits:.1%}", *work],
            notes=[
                f"{self.sparsity:.1%} of the covered weights are zero; {self.n_uncovered:,} weights are not covered. "
                f"The whole model is {self.ideal_ratio:.1f} times smaller by the idealised count of bits, which "
                "ignores file headers and does not entropy-code the values.",
                "dense, unified, pruned: blocks; edge: weights in no block; residual: |W - project(W)| / |W| before "
                "the projection; bits, mults (multiplications), adds (additions): share of the dense weight's, for "
                "one output position. Unified blocks save multiplications, not additions.",
                *([f"{self.drop}."] if self.drop else []),
                *self._speed(),
            ],
        )

    def _speed(self) -> list[str]:
        if self.predicted_speedup is None:
            return []
        return [
            f"Predicted: {self.predicted_speedup:.2f} times as fast as its best dense form, on the machine and for the "
            "input shape that were measured when fit began; accelerate(model, example_input) makes and measures it."
        ]


def residual_table(history: Sequence[Update]) -> Table:
    """Return the residuals of a run as a table; the last row is the projection."""
    rows = [
        (f"{update.when:.2f}".removesuffix(".00"), f"{update.rho:.3g}", f"{update.primal:.4f}", f"{update.dual:.4f}")
        for update in history
    ]
    return Table(
        title="Residuals",
        columns=[Column("at"), Column("rho"), Column("primal"), Column("dual")],
        rows=rows,
        notes=["at: epoch or step of the update; primal: |W - Z| / |W|; dual: |Z - Z_old| / |W|; last row: projection"],
    )


def score_facts(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return numbers as text for a page: what each is, and its value."""
    return [(name, f"{value:.6g}") for name, value in scores.items()]


def add_maps(page: Page, maps: Sequence[tuple[str, str, BlockMap]]) -> None:
    """Add the pictures of block maps to a page, each with a name and what is below it, and their legend."""
    page.heading("Blocks")
    page.legend(KEYS)
    page.pictures((name, f"{below}; {found}", found.pixels()) for name, below, found in maps)
    if not all(found.is_exact for _, _, found in maps):
        page.text("A pixel that stands for several blocks has the mean of their colours.")


def add_residuals(page: Page, history: Sequence[Update]) -> None:
    """Add a chart of the residuals of a run, with its phases, to a page; nothing without updates."""
    finite = [update for update in history if all(map(math.isfinite, (update.when, update.primal, update.dual)))]
    if not finite:
        return
    # a projection has no dual residual
    updates, projected = (finite[:-1], finite[-1:]) if finite[-1].dual == 0 else (finite, [])
    lines = [
        Line("primal |W - Z| / |W|", "#1f77b4", [(u.when, u.primal) for u in finite]),
        Line("dual |Z - Z_old| / |W|", "#ff7f0e", [(u.when, u.dual) for u in updates], "6 4"),
    ]
    first, last = finite[0].when, finite[-1].when
    spans = [Span("method", first, last, "#1f77b4")] if updates else []
    if projected:
        spans.append(Span("retraining", last, last + (0.2 * (last - first) or 0.5), "#2ca02c"))
    page.heading("Residuals")
    page.chart(line_chart(lines, spans, "epoch or step of the update", "relative residual"))


def make_report(
    module: nn.Module,
    plan: Plan,
    supports: Mapping[str, Support],
    primal: Mapping[str, float],
    history: Sequence[Update] = (),
    predicted_speedup: float | None = None,
) -> CompressionReport:
    """Return the report on a module whose covered weights are inside their supports.

    Args:
        module: The compressed module.
        plan: The plan that was made for it.
        supports: The support of each covered weight, by name.
        primal: ``|W - project(W)| / |W|`` of each weight when its structure was frozen, by name.
        history: The Z/U updates of the run, and its projection last.
        predicted_speedup: Of structures that were chosen for a speedup.
    """
    weights, covered = plan.weights(module), plan.covered
    layers = [_layer(covered[name], whole(w.detach()), supports[name], primal[name]) for name, w in weights.items()]
    known = {id(w) for w in weights.values()}
    rest = [p for p in module.parameters() if id(p) not in known]
    bits = sum(p.numel() * 8 * p.element_size() for p in rest)
    n_rest = sum(p.numel() for p in rest)
    maps = {name: BlockMap.of(supports[name].kinds) for name in weights if supports[name].kinds.numel()}
    return CompressionReport(
        tuple(layers), n_rest, bits, tuple(history), predicted_speedup=predicted_speedup, maps=maps
    )


def _layer(entry: PlanEntry, weight: Tensor, support: Support, primal: float) -> LayerReport:
    counts, (rows, cols), n = support.counts(), entry.grid.block_shape, entry.grid.block_numel
    value_bits, shared = 8 * weight.element_size(), support.shares_signs
    free = counts[Kind.DENSE] * n + entry.n_edge
    unified_bits = value_bits + (0 if shared else n)
    shares = [count / entry.n_blocks for count in counts.values() if count]
    kind_bits = entry.n_blocks * -sum(share * math.log2(share) for share in shares)
    return LayerReport(
        name=entry.name,
        shape=entry.shape,
        block_shape=entry.grid.block_shape,
        n_dense=counts[Kind.DENSE],
        n_unified=counts[Kind.UNIFIED],
        n_pruned=counts[Kind.PRUNED],
        n_edge=entry.n_edge,
        n_weights=weight.numel(),
        n_nonzero=int(torch.count_nonzero(weight)),
        primal=primal,
        dense_bits=value_bits * weight.numel(),
        ideal_bits=value_bits * free + unified_bits * counts[Kind.UNIFIED] + kind_bits,
        multiplications=free + counts[Kind.UNIFIED] * (1 if shared else min(rows, cols)),
        additions=free + counts[Kind.UNIFIED] * (rows + cols - 1 if shared else n),
    )


def _cells(layer: LayerReport) -> list[str]:
    counts = (layer.n_dense, layer.n_unified, layer.n_pruned, layer.n_edge, layer.n_nonzero)
    work = (
        layer.ideal_bits / layer.dense_bits,
        layer.multiplications / layer.n_weights,
        layer.additions / layer.n_weights,
    )
    shapes = ("x".join(map(str, layer.shape)), "x".join(map(str, layer.block_shape)))
    return [layer.name, *shapes, *(f"{n:,}" for n in counts), f"{layer.primal:.3f}", *(f"{w:.1%}" for w in work)]
