"""Checks that the settings of this folder share. They raise one clear error for a wrong type or value."""

from __future__ import annotations

from typing import Any

from lightning_muws.errors import SettingError


def refuse(name: str, value: object, advice: str) -> SettingError:
    """Return the error for a setting: ``name=value is not allowed: advice``."""
    return SettingError(f"{name}={value!r} is not allowed: {advice}")


def is_number(value: object) -> bool:
    """Return whether a value is a plain int or float: no bool, no string, and no NumPy or torch scalar.

    Checkpoints store these numbers, and ``torch.load(weights_only=True)`` reads plain ones only.
    """
    return type(value) in (int, float)


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Check that a setting is one of some words.

    Raises:
        SettingError: It is not.
    """
    if not isinstance(value, str) or value not in allowed:
        first, last = ", ".join(map(repr, allowed[:-1])), repr(allowed[-1])
        raise refuse(name, value, f"give {first} or {last}" if first else f"give {last}")


def check_type(name: str, value: object, kind: type[Any], example: str) -> None:
    """Check that a setting is an object of a class.

    Raises:
        SettingError: It is not.
    """
    if not isinstance(value, kind):
        raise refuse(name, value, f"give a {kind.__name__}, such as {example}")
