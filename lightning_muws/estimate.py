"""A dry run: the plan, the file's size and the memory of a run, computed from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_muws.errors import SettingError
from lightning_muws.structure.cost import check_compression, entropy, file_bytes
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.micro import MicroStructure
from lightning_muws.structure.plan import LayerRule, Plan, PlanEntry, make_plan
from lightning_muws.structure.structure import Structure
from lightning_muws.structure.support import MEMORY_RATIO
from lightning_muws.tables import Column, Table, Tabular

UPDATE_BYTES = 13  # a weight of the largest layer, while an update projects it: W + U, magnitudes of a copy, sums


@dataclass(frozen=True)
class DryRun(Tabular):
    """What a run will take; ``print`` and notebooks show it as tables.

    Args:
        plan: What is covered, and why the rest is not.
        n_weights: Numbers in all parameters.
        n_covered: Numbers in the covered ones.
        dense_bytes: Bytes of all parameters and buffers as the module holds them.
        file_bytes: At most so many bytes will the file have: with a compression the bytes that it asks for, else those
            of a lossless file whose values have no redundancy.
        n_ranks: Ranks that share the memory.
        memory: Bytes that the method keeps on each rank beside weights, gradients and optimizer, by phase: ``admm``
            (the other methods need no more), ``retraining``, and beside those of ``admm`` for a moment ``update``.
        largest: The covered weight that an update needs most memory for.
    """

    plan: Plan
    n_weights: int
    n_covered: int
    dense_bytes: int
    file_bytes: int
    n_ranks: int
    memory: dict[str, int]
    largest: str

    @property
    def compression_ratio(self) -> float:
        """Dense bytes over the bytes of the file."""
        return self.dense_bytes / self.file_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain dicts, strings and numbers, without the plan."""
        names = ("n_weights", "n_covered", "dense_bytes", "file_bytes", "n_ranks", "memory", "largest")
        return {**{name: getattr(self, name) for name in names}, "compression_ratio": self.compression_ratio}

    def tables(self) -> list[Table]:
        """Return the table of sizes."""
        rows = [
            ("weights", f"{self.n_weights:,}"),
            ("covered weights", f"{self.n_covered:,} in {len(self.plan.covered):,} tensors"),
            ("dense", _size(self.dense_bytes)),
            ("file, at most", f"{_size(self.file_bytes)}, {self.compression_ratio:.3g} times smaller"),
            ("beside training, method", _size(self.memory["admm"])),
            ("beside training, retraining", _size(self.memory["retraining"])),
            ("beside that, at an update", f"{_size(self.memory['update'])} for {self.largest}"),
        ]
        ranks = "one process" if self.n_ranks == 1 else f"each of {self.n_ranks} ranks with sharded weights"
        columns = [Column("what", room=28), Column("size", room=40)]
        return [Table("Dry run", columns, rows, notes=[f"Memory is that of {ranks}. Nothing was measured."])]


def dry_run(
    model: nn.Module,
    structure: Structure | None = None,
    rules: Sequence[LayerRule] = (),
    compression: float | None = None,
    n_ranks: int = 1,
) -> DryRun:
    """Return the plan, the file's size and the memory of a run, without reading a weight.

    The memory is that of the method: weights, gradients, moments and activations are the training's own. It is the sum
    of the tables in the docs under *Large models*. A budget chooses its kinds of blocks from the weights, so with a
    compression no block counts as unified; retraining then keeps the exact values beside the rounded ones.

    Args:
        model: The module, best on the meta device: ``with torch.device("meta"): model = Model()``.
        structure: The structure with its ratios; without a compression it is needed.
        rules: For single layers.
        compression: How many times smaller the file will be.
        n_ranks: Ranks that share the weights; 1 for DDP, where each rank keeps all.

    Raises:
        SettingError: A setting is not allowed, or neither ratios nor a compression are given.
        PlanError: Nothing is covered, or a rule matches nothing.

    Example:
        >>> with torch.device("meta"):
        ...     model = torch.nn.Sequential(*(torch.nn.Linear(8192, 8192, bias=False) for _ in range(100)))
        >>> found = dry_run(model, compression=20, n_ranks=8)
        >>> found.n_weights, found.file_bytes, round(found.compression_ratio)
        (6710886400, 1342177280, 20)
    """
    given: object = n_ranks  # a configuration file may have put anything there
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise SettingError(f"n_ranks={n_ranks!r} is not allowed: give a whole number from 1 on")
    if compression is not None:
        check_compression(compression)
    plan = make_plan(
        model, MicroStructure() if structure is None else structure, rules, open_ratios=compression is not None
    )
    stored = {id(x): x for x in model.state_dict(keep_vars=True).values() if isinstance(x, torch.Tensor)}
    weights = plan.weights(model)
    dense = sum(x.numel() * x.element_size() for x in stored.values())
    if compression is None:
        covered = {id(weight) for weight in weights.values()}
        others = [x.numel() * x.element_size() for key, x in stored.items() if key not in covered]
        sizes = [_file_bytes(entry, weights[name].element_size()) for name, entry in plan.covered.items()]
        n_bytes = math.ceil(file_bytes([*sizes, *others]))
    else:
        n_bytes = math.floor(dense / compression)
    beside = [_beside(entry, weights[name].element_size()) for name, entry in plan.covered.items()]
    exact = 4 * sum(p.numel() for p in model.parameters()) if compression is not None else 0
    largest = max(plan.covered.values(), key=lambda entry: math.prod(entry.shape))
    return DryRun(
        plan=plan,
        n_weights=sum(p.numel() for p in model.parameters()),
        n_covered=sum(weight.numel() for weight in weights.values()),
        dense_bytes=dense,
        file_bytes=n_bytes,
        n_ranks=n_ranks,
        memory={
            "admm": math.ceil(sum(admm for admm, _ in beside) / n_ranks),
            "retraining": math.ceil((sum(kept for _, kept in beside) + exact) / n_ranks),
            "update": UPDATE_BYTES * math.prod(largest.shape),
        },
        largest=largest.name,
    )


def _counts(entry: PlanEntry) -> tuple[int, int, int]:
    """Return the dense, the unified and the pruned blocks; those of an open structure count as pruned."""
    if entry.is_open:
        return 0, 0, entry.n_blocks
    counts = entry.structure.counts(entry.grid, entry.shape)
    return counts[Kind.DENSE], counts[Kind.UNIFIED], counts[Kind.PRUNED]


def _signs(entry: PlanEntry) -> int:
    """Return the signs of a unified block."""
    return 1 if getattr(entry.structure, "signs", "free") == "shared" else entry.grid.block_numel


def _file_bytes(entry: PlanEntry, item: int) -> float:
    """Return the bytes of a covered weight in a lossless file, if its values have no redundancy."""
    counts, n_signs = _counts(entry), _signs(entry)
    kinds = sum(counts) * entropy(torch.tensor(counts)) / 8
    values = counts[0] * entry.grid.block_numel + entry.n_edge + counts[1]
    return kinds + item * values + counts[1] * n_signs / 8


def _beside(entry: PlanEntry, item: int) -> tuple[float, float]:
    """Return the bytes that ADMM and retraining keep of a weight."""
    _, unified, pruned = _counts(entry)
    (rows, _), numel, n_blocks = entry.grid.block_shape, entry.grid.block_numel, entry.n_blocks
    wide = max(4, item)  # V and the magnitudes have at least float32
    n_signs = numel if _signs(entry) > 1 else 0
    admm = wide * math.prod(entry.shape) + n_blocks + unified * (n_signs / 8 + wide)
    beside = n_blocks + unified * (n_signs + 8 + item)
    mask = n_blocks * numel // rows * item if pruned else 0
    kept = mask if mask + beside <= MEMORY_RATIO * n_blocks * numel * item else 0
    return admm, beside + kept


def _size(n_bytes: float) -> str:
    """Return bytes in the unit that people read; not with rich, which may be missing."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            return f"{n_bytes:,.0f} {unit}" if unit == "bytes" else f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    raise AssertionError
