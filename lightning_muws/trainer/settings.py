"""Checks the callback's own arguments when the callback is made: a configuration file may put anything there."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from lightning_muws.errors import SettingError
from lightning_muws.structure.micro import MicroStructure
from lightning_muws.structure.plan import LayerRule
from lightning_muws.training.budget import Budget
from lightning_muws.training.checks import refuse

Init = TypeVar("Init", bound=Callable[..., None])
CALLBACK = "WeightUnificationCallback"  # what a user calls the class whose __init__ is checked
SUFFIX = ".muws"


def explained(init: Init) -> Init:
    """Return an ``__init__`` that explains arguments it does not know, in place of Python's TypeError.

    Where the argument is a field of a setting, such as ``prune_ratio`` of MicroStructure, the message names the setting
    that takes it. The signature stays as it is, for tools that read it.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked(self: object, *args: Any, **kwargs: Any) -> None:
        if unknown := [name for name in kwargs if name not in signature.parameters]:
            name = unknown[0]
            raise SettingError(f"{CALLBACK} has no setting {name}{_instead(name, kwargs[name], signature)}")
        try:
            signature.bind(self, *args, **kwargs)
        except TypeError as error:
            raise SettingError(f"{CALLBACK} was given {error}") from None
        init(self, *args, **kwargs)

    return cast(Init, checked)


def _instead(name: str, value: object, signature: inspect.Signature) -> str:
    """Return what to give in place of the unknown argument ``name=value``."""
    settings = {key: parameter.default for key, parameter in signature.parameters.items() if key != "self"}
    for setting, default in settings.items():
        if is_dataclass(default) and name in {field.name for field in fields(default)}:
            return f": give {setting}={type(default).__name__}({name}={value!r})"
    if name in {field.name for field in fields(LayerRule)}:
        return f": give rules=[LayerRule({name}={value!r})]"
    near = difflib.get_close_matches(name, settings, n=1)
    return (f": the nearest is {near[0]}; all are " if near else "; all are ") + ", ".join(settings)


def check_switch(name: str, value: object) -> None:
    """Check that the setting ``name`` is a bool.

    Raises:
        SettingError: It is something else.
    """
    if not isinstance(value, bool):
        raise refuse(name, value, "give True or False")


def make_budget(*asked: float | None) -> Budget | None:
    """Return the budget of these fields of :class:`Budget`, in its order; None if all of them are None.

    Raises:
        SettingError: More than one is given, or its value is not allowed.
    """
    return None if all(value is None for value in asked) else Budget(*asked)


def check_open(budget: Budget | None, structure: object) -> None:
    """Check that a budget, if there is one, finds a structure whose ratios are open.

    Raises:
        SettingError: The structure has ratios.
    """
    if budget and not (isinstance(structure, MicroStructure) and structure.is_open):
        raise SettingError(
            f"{budget} chooses the ratios of each weight, and structure={structure!r} sets them: "
            f"give MicroStructure(block_shape=...) without ratios, or leave {budget.asked} out"
        )


def check_file(name: str, value: object) -> None:
    """Check that the setting ``name`` is the name of a `.muws` file, or empty.

    Raises:
        SettingError: It is no name, or has another ending.
    """
    if not isinstance(value, (str, Path)):
        raise refuse(name, value, f"give the name of a {SUFFIX} file, or '' for none")
    if value != "" and Path(value).suffix.lower() != SUFFIX:
        example = str(Path(value).with_suffix(SUFFIX)) if Path(value).name else f"model{SUFFIX}"
        raise refuse(name, str(value), f"the name must end in {SUFFIX}, such as {example!r}")
