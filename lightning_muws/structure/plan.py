"""The plan: which parameter of a model gets which structure, and why each other one is left out."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_muws.errors import PlanError, SettingError
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.micro import MicroStructure
from lightning_muws.structure.nm import NMStructure
from lightning_muws.structure.shapes import SHAPES, fitting
from lightning_muws.structure.structure import Structure, check_structure
from lightning_muws.tables import Column, Table, Tabular

VECTOR, BIAS, NORM = NEVER = ("fewer than 2 axes", "a bias", "a normalisation")  # no rule covers these
COLUMNS = (
    Column("parameter", room=24),
    Column("shape", drop=1),
    Column("module", drop=4, room=12),
    Column("block", drop=2),
    Column("pruned"),
    Column("unified"),
    Column("blocks"),
    Column("edge", drop=3),
)


@dataclass(frozen=True)
class LayerRule:
    """Gives the parameters that it matches another structure, or leaves them out; the last matching rule wins.

    Args:
        name: Pattern on the parameter's name: a glob (``encoder.*``), or a regular expression after ``re:``, which
            must match the whole name.
        module_type: Glob on the class name of the module that owns the parameter, or of a class it inherits from
            (``Linear``, ``*Conv?d``). An embedding is covered only by a rule that names its type here.
        structure: The structure of the matching weights.
        skip: Leave the matching parameters dense.
        batched: How weights of three axes are cut. ``out_in``: as a batch of matrices ``(batch, out, in)``, such as the
            experts of Mixtral, with each block in one matrix. ``in_out``: as a batch ``(batch, in, out)``. ``never``:
            axis 0 runs over the outputs. ``auto``: as a batch if axis 0 is longer than 1 and the owner is neither a
            convolution nor a ``Bilinear``; ``(batch, in, out)`` if the owner sets ``is_transposed`` (transformers).

    Raises:
        SettingError: A value is not allowed, or the regular expression is wrong.
    """

    name: str = "*"
    module_type: str = "*"
    structure: MicroStructure | NMStructure | Structure = field(default_factory=MicroStructure)
    skip: bool = False
    batched: Literal["auto", "never", "out_in", "in_out"] = "auto"

    def __post_init__(self) -> None:
        check_structure(self.structure)
        for field_name in ("name", "module_type"):
            value: object = getattr(self, field_name)  # a configuration file may have put anything there
            if not isinstance(value, str):
                hint = f"give the name of the class, {value.__name__!r}" if isinstance(value, type) else "give a string"
                raise SettingError(f"{field_name}={value!r} is not allowed: {hint}")
        if not isinstance(self.skip, bool):
            raise SettingError(f"skip={self.skip!r} is not allowed: give True or False")
        batched: object = self.batched
        if not isinstance(batched, str) or batched not in ("auto", "never", "out_in", "in_out"):
            raise SettingError(f"batched={self.batched!r} is not allowed: give 'auto', 'never', 'out_in' or 'in_out'")
        if self.name.startswith("re:"):
            try:
                re.compile(self.name[3:])
            except re.error as error:
                raise SettingError(
                    f"name={self.name!r} is no regular expression: {error}; correct it or use a glob"
                ) from None

    def matches(self, name: str, owner: nn.Module) -> bool:
        """Return whether the rule matches the parameter ``name`` owned by the module ``owner``."""
        by_name = (
            re.fullmatch(self.name[3:], name) if self.name.startswith("re:") else fnmatch.fnmatchcase(name, self.name)
        )
        return bool(by_name) and any(fnmatch.fnmatchcase(kind, self.module_type) for kind in _kinds(owner))


@dataclass(frozen=True)
class PlanEntry:
    """The plan of one parameter.

    Args:
        name: Its name in the model, without the ``_orig_mod.`` of compiled modules.
        shape: Its shape.
        module_type: Class name of the module that owns it.
        structure: The structure it gets; unused if it is left out.
        grid: How it is cut into blocks.
        reason: Why it is left out; empty if it is covered.
    """

    name: str
    shape: tuple[int, ...]
    module_type: str
    structure: Structure
    grid: BlockGrid
    reason: str = ""

    @property
    def n_blocks(self) -> int:
        """Whole blocks of the weight."""
        down, across = self.grid.counts(self.shape)
        return down * across

    @property
    def is_open(self) -> bool:
        """Whether a budget chooses the ratios of its structure."""
        return isinstance(self.structure, MicroStructure) and self.structure.is_open

    @property
    def n_edge(self) -> int:
        """Weights at the edges that fill no block and stay dense."""
        return torch.Size(self.shape).numel() - self.n_blocks * self.grid.block_numel


@dataclass(frozen=True)
class Plan(Tabular):
    """An entry for each parameter of a model, in the model's order; printing it shows a table."""

    entries: tuple[PlanEntry, ...]

    @property
    def covered(self) -> dict[str, PlanEntry]:
        """The entries that get a structure, by name."""
        return {entry.name: entry for entry in self.entries if not entry.reason}

    @property
    def left_out(self) -> dict[str, PlanEntry]:
        """The entries that stay dense, by name."""
        return {entry.name: entry for entry in self.entries if entry.reason}

    def updated(self, entries: Mapping[str, PlanEntry]) -> Plan:
        """Return the plan with these entries in the place of those that have the same name."""
        return Plan(tuple(entries.get(entry.name, entry) for entry in self.entries))

    def weights(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Return the covered parameters of the module, by name."""
        covered = self.covered
        return {name: p for name, p, _ in named_weights(module) if name in covered}

    def tables(self) -> list[Table]:
        """Return the table of the parameters: the blocks of each covered one, and why each other one is left out."""
        note = f"{len(self.covered)} of {len(self.entries)} parameters get a structure."
        return [Table("", COLUMNS, [self._row(entry) for entry in self.entries], notes=[note])]

    @staticmethod
    def _row(entry: PlanEntry) -> tuple[str, ...]:
        row = entry.name, "x".join(map(str, entry.shape)) or "scalar", entry.module_type
        if entry.reason:
            return *row, f"left out: {entry.reason}"
        counts = entry.structure.counts(entry.grid, entry.shape)
        kinds = [f"{counts[kind]:,}" for kind in (Kind.PRUNED, Kind.UNIFIED)]
        if entry.is_open:
            kinds = ["open", "open"]
        shape = entry.structure.block_shape
        block = shape if shape == "auto" else "x".join(map(str, shape))
        return *row, block, *kinds, f"{entry.n_blocks:,}", f"{entry.n_edge:,}"


def make_plan(
    module: nn.Module,
    structure: Structure,
    rules: Sequence[LayerRule] = (),
    optimized: Iterable[nn.Parameter] | None = None,
    open_ratios: bool = False,
) -> Plan:
    """Return the plan of a model: for each parameter its structure, or why it is left out.

    A weight of two or more axes gets ``structure``, or that of the last rule that matches it. The plan leaves out, each
    with its reason: what a rule skips, biases, norms, embeddings whose type no rule names, what is not trained, what is
    not real floating point, and weights too small for one block. A shared weight appears once, under its first name;
    rules match it under any of its names, and it is an embedding if it is one in any place.

    Args:
        module: Any module, its parameters initialised.
        structure: For all weights that no rule matches.
        rules: Exceptions, the last matching one wins.
        optimized: The parameters that the optimizers hold. Other weights are left out, unless the rule that decides
            about them has a ``name``. None covers weights whether an optimizer holds them or not.
        open_ratios: Cover weights whose ratios are both 0, or ranges: a budget chooses their ratios later.

    Raises:
        SettingError: ``structure`` is no structure, ``rules`` is no list of rules, or a ratio is a range although
            ``open_ratios`` is False.
        PlanError: A rule matches no parameter, or only such as no structure fits; or nothing is covered, or a parameter
            is not initialised yet.
    """
    check_structure(structure)
    check_rules(rules)
    if not open_ratios:
        for given in (structure, *(rule.structure for rule in rules)):
            _check_no_range(given)
    held = None if optimized is None else {id(p) for p in optimized}
    entries: list[PlanEntry] = []
    matched: list[list[PlanEntry]] = [[] for _ in rules]
    places = _places(module)
    for name, parameter, owner in named_weights(module):
        if isinstance(parameter, UninitializedParameter):
            raise PlanError(f"{name} is not initialised yet: run one batch through the lazy module before fit")
        here = places[id(parameter)]
        matching = [i for i, rule in enumerate(rules) if any(rule.matches(*place) for place in here)]
        rule = rules[matching[-1]] if matching else LayerRule(structure=structure)
        grid = _grid(parameter, owner, rule)
        entry = PlanEntry(name, tuple(parameter.shape), type(owner).__name__, rule.structure, grid)
        is_held = held is None or id(parameter) in held or rule.name != "*"
        reason = _reason(entry, parameter, [owner for _, owner in here], rule, is_held)
        reason = reason or _objection(entry, open_ratios)
        entries.append(replace(entry, reason=reason))
        for i in matching:
            matched[i].append(entries[-1])
    for rule, found in zip(rules, matched, strict=True):
        _check_match(rule, found, entries)
    plan = Plan(tuple(entries))
    if not plan.covered:
        reasons = _listed(entries) or "it has no parameters"
        raise PlanError(
            f"no parameter of {type(module).__name__} is covered ({reasons}): change the ratios or the rules"
        )
    return plan


def check_rules(rules: object) -> None:
    """Check that a setting is a list of rules.

    Raises:
        SettingError: It is not.
    """
    if not isinstance(rules, (list, tuple)):
        raise SettingError(f"rules={rules!r} is not allowed: give a list, such as [LayerRule('head.*', skip=True)]")
    if wrong := [rule for rule in rules if not isinstance(rule, LayerRule)]:
        raise SettingError(f"rules has {wrong[0]!r}, only rules are allowed: give LayerRule('head.*', ...) instead")


def named_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Yield each parameter once: its name without the marks of compiled modules, itself, and its owner."""
    for name, parameter in module.named_parameters():
        yield clean_name(name), parameter, module.get_submodule(name.rpartition(".")[0])


def _places(module: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Return the names and owners of each parameter, by its id: several if modules share it."""
    places: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        place = clean_name(name), module.get_submodule(name.rpartition(".")[0])
        places.setdefault(id(parameter), []).append(place)
    return places


def clean_name(name: str) -> str:
    """Return a parameter's name without the marks that torch.compile leaves in it."""
    return name.replace("_orig_mod.", "")


def _grid(parameter: nn.Parameter, owner: nn.Module, rule: LayerRule) -> BlockGrid:
    """Return how a weight is cut into the blocks of a rule's structure; for ``auto`` into the first shape that fits."""
    block_shape = rule.structure.block_shape
    if block_shape != "auto":
        return _cut(parameter, owner, rule.batched, block_shape)
    return fitting(_cut(parameter, owner, rule.batched, SHAPES[0]), parameter.shape)[0]


def _cut(parameter: nn.Parameter, owner: nn.Module, batched: str, block_shape: tuple[int, int]) -> BlockGrid:
    if batched in ("out_in", "in_out") and parameter.ndim == 3:
        return BlockGrid(block_shape, out_axis=int(batched == "in_out"), batched=True)
    if isinstance(owner, nn.modules.conv._ConvTransposeNd):
        return BlockGrid(block_shape, 1, owner.groups)
    first_is_output = batched == "never" or any("Conv" in kind or kind == "Bilinear" for kind in _kinds(owner))
    if parameter.ndim == 3 and len(parameter) > 1 and not first_is_output:
        return BlockGrid(block_shape, out_axis=int(getattr(owner, "is_transposed", False) is True), batched=True)
    # The linear layer of GPT-2 in the transformers library is stored input first.
    return BlockGrid(block_shape, out_axis=int(type(owner).__name__ == "Conv1D" and parameter.ndim == 2))


def _reason(
    entry: PlanEntry, parameter: nn.Parameter, owners: Sequence[nn.Module], rule: LayerRule, is_held: bool
) -> str:
    """Return why no structure fits a parameter; empty if one may."""
    kinds, attribute = [kind for owner in owners for kind in _kinds(owner)], entry.name.rpartition(".")[2]
    # torch's older weight_norm, spectral_norm and prune compute the weight from such parameters, as a plain attribute
    stem, _, mark = attribute.rpartition("_")
    is_part = mark in ("v", "g", "orig") and stem in vars(owners[0])
    checks = {
        "a rule skips it": rule.skip,
        VECTOR: parameter.ndim < 2,
        BIAS: attribute.startswith("bias") or attribute.endswith("bias"),
        NORM: any("Norm" in kind for kind in kinds),
        "an embedding": _is_embedding(attribute, owners, rule),
        "computed from other parameters": is_part or "ParametrizationList" in kinds,
        "not trained (requires_grad=False)": not parameter.requires_grad,
        "no optimizer trains it": not is_held,
        f"of dtype {parameter.dtype}": not parameter.dtype.is_floating_point,
    }
    if not entry.grid.fits(entry.shape):
        n_out, rows = entry.shape[1 + entry.grid.out_axis], entry.grid.block_shape[0]
        checks[f"each of its matrices has {n_out} outputs, which blocks of {rows} rows do not fill"] = True
    return next((reason for reason, holds in checks.items() if holds), "")


def _objection(entry: PlanEntry, open_ratios: bool) -> str:
    """Return why the structure leaves the weight as it is; empty if it does not, or if its ratios are still open."""
    structure = entry.structure
    if open_ratios and isinstance(structure, MicroStructure) and structure.is_open:
        structure = replace(structure, prune_ratio=0.0, unify_ratio=1.0)  # the largest change that a budget may choose
    return structure.objection(entry.grid, entry.shape)


def _check_no_range(structure: Structure) -> None:
    """Check that no ratio is a range.

    Raises:
        SettingError: One is.
    """
    if isinstance(structure, MicroStructure) and structure.has_range:
        raise SettingError(
            f"{structure!r} has a range, from which only a budget chooses: give one number as the ratio, or a budget "
            "such as compression=20"
        )


def _is_embedding(attribute: str, owners: Sequence[nn.Module], rule: LayerRule) -> bool:
    """Return whether a parameter is an embedding of one of its owners, and the rule does not name that owner's type."""
    found = [
        kinds for kinds in map(_kinds, owners) if "embed" in attribute or any("Embedding" in kind for kind in kinds)
    ]
    named = any(fnmatch.fnmatchcase(kind, rule.module_type) for kinds in found for kind in kinds)
    return bool(found) and (rule.module_type == "*" or not named)


def _kinds(owner: nn.Module) -> list[str]:
    return [kind.__name__ for kind in type(owner).__mro__]


def _check_match(rule: LayerRule, found: Sequence[PlanEntry], entries: Sequence[PlanEntry]) -> None:
    """Check that a rule can have an effect on what it matches.

    Raises:
        PlanError: It matches nothing, or only parameters that no structure fits.
    """
    meant = f"name={rule.name!r}" + (f", module_type={rule.module_type!r}" if rule.module_type != "*" else "")
    if not found:
        names, types = [e.name for e in entries], sorted({e.module_type for e in entries})
        near = difflib.get_close_matches(rule.name.removeprefix("re:"), names, n=5, cutoff=0.3) or names[:5]
        raise PlanError(
            f"no parameter matches the rule {meant}; near names are {', '.join(near)} "
            f"(module types: {', '.join(types)})"
        )
    if rule.skip:
        return
    if all(entry.reason in NEVER for entry in found):
        raise PlanError(
            f"the rule {meant} matches only parameters that get no structure ({_listed(found)}): "
            "name weights of two or more axes, or set skip=True"
        )
    if rule.batched in ("out_in", "in_out") and all(len(entry.shape) != 3 for entry in found):
        raise PlanError(
            f"the rule {meant} has batched={rule.batched!r}, but it matches no weight of three axes: "
            "leave batched away, or name other weights"
        )


def _listed(entries: Sequence[PlanEntry]) -> str:
    return "; ".join(f"{e.name}: {e.reason}" for e in entries[:5])
