"""Knows the one family of errors. A message says what was given, what is allowed and what to do."""

from __future__ import annotations


class MuwsError(Exception):
    """Any refusal of lightning_muws; catch this one to catch them all."""


class SettingError(MuwsError, ValueError):
    """A setting has a value that is not allowed, by itself or for this Trainer."""


class PlanError(MuwsError, ValueError):
    """The rules do not fit the model: a rule matches nothing, or no weight is covered."""


class StateError(MuwsError, RuntimeError):
    """The weights or the run are in a state that the call cannot work with."""


class FormatError(MuwsError, ValueError):
    """A file is no `.muws` file, or is broken, or asks for more than is allowed; nothing of it was used."""


class LimitError(FormatError):
    """The tensors of a file, which may be intact, take more memory than the caller allows."""
