"""Puts the tensors of a file into a module: into its own memory, or in the place of tensors on the meta device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lightning_muws.artifact.manifest import TensorEntry
from lightning_muws.errors import StateError
from lightning_muws.structure.plan import clean_name


def check_fit(entries: Sequence[TensorEntry], into: nn.Module, *, is_all: bool = True) -> None:
    """Compare names and shapes, before any memory is taken.

    Args:
        entries: The tensors to load.
        into: The module.
        is_all: Whether they have to be all tensors of the module.

    Raises:
        StateError: They do not fit.
    """
    own = {clean_name(name): tuple(x.shape) for name, x in into.state_dict().items()}
    there = {entry.name: entry.shape for entry in entries}
    wrong = [name for name in ({**own, **there} if is_all else there) if own.get(name) != there.get(name)]
    if wrong:
        name = wrong[0]
        raise StateError(
            f"the file does not fit {type(into).__name__} at {len(wrong)} tensors, the first one {name!r}: of shape "
            f"{there.get(name, 'none')} in the file and {own.get(name, 'none')} in the module"
        )


def fill(into: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load tensors into a module that they fit; what is on the meta device gets them in the place of copies."""
    versions = getattr(state, "_metadata", {})
    own = into.state_dict(keep_vars=True)
    mine = OrderedDict((name, state[clean_name(name)]) for name in own if clean_name(name) in state)
    mine._metadata = dict(versions)  # type: ignore[attr-defined]
    on_meta = OrderedDict((name, mine.pop(name)) for name, x in own.items() if x.is_meta and name in mine)
    if on_meta:
        assigned = _assignable(own, on_meta)
        assigned._metadata = dict(versions)  # type: ignore[attr-defined]
        into.load_state_dict(assigned, strict=False, assign=True)
    if mine:
        into.load_state_dict(mine, strict=len(mine) == len(own))


def _assignable(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Return tensors to assign to a module, which share memory exactly where those of the module are one.

    As in a copying load, the module decides on the dtype, and of several names of one tensor the last one wins.

    Args:
        own: The state_dict of the module, with its parameters.
        found: The tensors of the file, by those names of the module that get one.
    """
    last = {id(own[name]): name for name in found}
    ready: dict[int, Tensor] = {}
    taken: set[int] = set()
    for key, name in last.items():
        place, value = own[name], found[name].to(own[name].dtype)
        if id(value) in taken:  # one tensor in the file, two in the module
            value = value.clone()
        taken.add(id(value))
        is_parameter = isinstance(place, nn.Parameter)
        ready[key] = nn.Parameter(value, requires_grad=place.requires_grad) if is_parameter else value
    return OrderedDict((name, ready[id(x)]) for name, x in own.items() if id(x) in ready)
