"""Finds classes and functions that a command names as ``package.module:name``, and builds networks with them."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from lightning_muws.errors import MuwsError, SettingError


def build(name: str, arguments: str) -> nn.Module:
    """Return the module that ``package.module:Class`` builds; the current folder is searched first, as by python.

    Args:
        name: The class, or a function that returns a module.
        arguments: Its keyword arguments, as JSON.

    Raises:
        SettingError: It cannot be found or called, or returns no module.
    """
    try:
        keywords: Any = json.loads(arguments)
    except (ValueError, RecursionError) as error:
        raise SettingError(
            f'--args {arguments!r} is no JSON ({error}): give an object such as {{"width": 32}}'
        ) from None
    if ":" not in name or not isinstance(keywords, dict):
        raise SettingError(
            f"--model {name!r} with --args {arguments} is not allowed: give package.module:Class and a JSON object"
        )
    with explained(f"--model {name!r} cannot be built", "name a class or function, and give its arguments in --args"):
        make = _find(name)
        inspect.signature(make).bind(**keywords)
        model = make(**keywords)
    if not isinstance(model, nn.Module):
        raise SettingError(
            f"--model {name!r} returns a {type(model).__name__}: name a class that inherits from torch.nn.Module"
        )
    return model


def find(option: str, name: str) -> Callable[..., Any]:
    """Return the function ``package.module:name`` that an option names.

    Raises:
        SettingError: It cannot be found, or is no function.
    """
    if ":" not in name:
        raise SettingError(f"{option} {name!r} is not allowed: give package.module:function")
    with explained(f"{option} {name!r} cannot be found", "name a function of a module that python can import"):
        found = _find(name)
    if not callable(found):
        raise SettingError(f"{option} {name!r} is a {type(found).__name__}: name a function")
    return found  # type: ignore[no-any-return]  # a user's own


@contextmanager
def explained(what: str, advice: str) -> Iterator[None]:
    """Turn any exception of the user's own code into an error of one sentence; let errors of this package pass.

    Raises:
        SettingError: The block raised anything else.
    """
    try:
        yield
    except MuwsError:
        raise
    except Exception as error:
        raise SettingError(f"{what}: {type(error).__name__}: {first_line(error)}; {advice}") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().partition("\n")[0]


def _find(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module_name), attribute)
    finally:
        sys.path.remove(str(Path.cwd()))
