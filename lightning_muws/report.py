"""Numbers: what became of each layer, as dataclasses, dicts and tables. Knows structures, and nothing of training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.plan import Plan, PlanEntry
from lightning_muws.structure.sharded import whole
from lightning_muws.structure.support import Support
from lightning_muws.training.run import Update

WIDE = 150  # columns of a table that is printed to a file


@dataclass(frozen=True)
class LayerReport:
    """What became of one covered weight.

    Args:
        name: The parameter's name.
        shape: Its shape.
        block_shape: ``(outputs, inputs)`` of a block.
        n_dense: Blocks left free.
        n_unified: Blocks of one magnitude.
        n_pruned: Blocks of zeros.
        n_edge: Weights at the edges, in no block, dense.
        n_weights: All weights.
        n_nonzero: Weights that are not zero, counted on the weight itself.
        primal: ``|W - project(W)| / |W|`` when the structure was frozen.
        dense_bits: Bits of the dense weight.
        ideal_bits: Idealised bits: each free weight in full, a magnitude a unified block and a bit a sign, and the
            entropy of the kinds. No coder and no header is counted, so no file is quite as small, nor codes the values.
        multiplications: Of one output position; one a free weight, ``min(rows, cols)`` a unified block (1 if it
            shares its sign).
        additions: Of one output position; one a weight of a free or unified block (``rows + cols - 1`` of a unified
            block that shares its sign).
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
class CompressionReport:
    """What became of a model: its covered layers, the rest, and how the residuals fell.

    Args:
        layers: A report for each covered weight.
        n_uncovered: Weights of the model that no structure covers.
        uncovered_bits: Their bits.
        history: The updates of the run, its hard projection last.
    """

    layers: tuple[LayerReport, ...]
    n_uncovered: int
    uncovered_bits: int
    history: tuple[Update, ...] = ()

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
        return asdict(self) | {"sparsity": self.sparsity, "ideal_ratio": self.ideal_ratio}

    def __rich__(self) -> Table:
        table = Table(
            title="Micro-structured weights",
            caption=(
                f"{self.sparsity:.1%} of the covered weights are zero; {self.n_uncovered:,} weights are not covered; "
                f"the whole model is {self.ideal_ratio:.1f} x smaller by the idealised count (no coder, no header). "
                "Multiplications and additions are of one output position; unification saves multiplications only."
            ),
        )
        table.add_column("layer")
        for header in ("shape", "block", "dense", "unified", "pruned", "edge", "weights left", "residual"):
            table.add_column(header, justify="right")
        for header in ("ideal bits", "mults", "adds"):
            table.add_column(header, justify="right")
        for layer in self.layers:
            table.add_row(*_cells(layer))
        totals = [f"{self._sum(name):,.0f}" for name in ("n_dense", "n_unified", "n_pruned", "n_edge", "n_nonzero")]
        dense = self._sum("n_weights")
        work = [f"{self._sum(name) / max(1, dense):.1%}" for name in ("multiplications", "additions")]
        last = f"{self.history[-1].primal:.3f}" if self.history else ""
        bits = f"{self._sum('ideal_bits') / max(1, self._sum('dense_bits')):.1%}"
        table.add_section()
        table.add_row("all covered", "", "", *totals, last, bits, *work)
        return table

    def print(self) -> None:
        """Print the table, and how the residuals fell, to the terminal."""
        console = Console()
        if not console.is_terminal:
            console = Console(width=WIDE)
        console.print(self)
        if self.history:
            console.print(residual_table(self.history))


def residual_table(history: Sequence[Update]) -> Table:
    """Return the residuals of a run as a table; the last row is the hard projection."""
    table = Table(
        title="ADMM residuals", caption="the last row is the projection; primal |W - Z| / |W|, dual |dZ| / |W|"
    )
    for header in ("at", "rho", "primal", "dual"):
        table.add_column(header, justify="right")
    for update in history:
        table.add_row(
            f"{update.when:.2f}".removesuffix(".00"), f"{update.rho:.3g}", f"{update.primal:.4f}", f"{update.dual:.4f}"
        )
    return table


def make_report(
    module: nn.Module,
    plan: Plan,
    supports: Mapping[str, Support],
    primal: Mapping[str, float],
    history: Sequence[Update] = (),
) -> CompressionReport:
    """Return the report on a module whose covered weights are inside their supports.

    Args:
        module: The module that was planned for.
        plan: Its plan.
        supports: The support of each covered weight.
        primal: The relative distance of each weight when its structure was frozen.
        history: The updates of the run.
    """
    weights, covered = plan.weights(module), plan.covered
    layers = [_layer(covered[name], whole(w.detach()), supports[name], primal[name]) for name, w in weights.items()]
    known = {id(w) for w in weights.values()}
    rest = [p for p in module.parameters() if id(p) not in known]
    bits = sum(p.numel() * 8 * p.element_size() for p in rest)
    return CompressionReport(tuple(layers), sum(p.numel() for p in rest), bits, tuple(history))


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
