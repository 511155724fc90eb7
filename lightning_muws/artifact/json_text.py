"""JSON as the format writes and reads it: equal values are equal bytes, and what was written is read back equal."""

from __future__ import annotations

import json
import math
from typing import Any

from lightning_muws.errors import FormatError

MAX_DEPTH = 64  # levels of lists and objects in a user's own values
MAX_BITS = 8192  # of an integer: Python reads no number of more than 4300 digits


def dump(value: object) -> bytes:
    """Return JSON in ASCII, without spaces between tokens."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def parse(raw: bytes, what: str) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        FormatError: It is none, repeats a key, or has a number that is not finite.
    """
    try:
        parsed = json.loads(
            raw.decode("ascii"), object_pairs_hook=_once, parse_float=_finite, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the {what} is not JSON that this format allows: {str(error)[:100]}") from None
    if not isinstance(parsed, dict):
        raise FormatError(f"the {what} is no JSON object")
    return parsed


def why_unstorable(value: object, where: str, depth: int = 1) -> str | None:
    """Return why ``parse(dump(value))`` would differ from a value, naming the part; None if it would be equal.

    A tuple counts as a list.

    Args:
        value: Anything.
        where: What to call it in the answer.
        depth: The level of nesting on which it stands.

    Example:
        >>> why_unstorable({"a": [1, {2}]}, "extra")
        "extra['a'][1] is a set, only None, bool, int, float, str, list and dict can be stored"
    """
    if isinstance(value, (dict, list, tuple)):
        return _why_not_all(value, where, depth)
    if isinstance(value, str):
        if value.isascii() or json.loads(json.dumps(value)) == value:
            return None
        return f"{where} is {value[:40]!r}, which has a surrogate pair: give the character itself"
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        return f"{where} is an integer of {value.bit_length()} bits, at most {MAX_BITS} can be stored"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{where} is {value}, only finite numbers can be stored"
    if value is None or isinstance(value, (int, float)):
        return None
    kind = type(value).__name__
    return f"{where} is a {kind}, only None, bool, int, float, str, list and dict can be stored"


def _why_not_all(values: dict[Any, Any] | list[Any] | tuple[Any, ...], where: str, depth: int) -> str | None:
    """Return the first answer of :func:`why_unstorable` to the keys and values in a list or dict."""
    if depth > MAX_DEPTH:
        return f"{where[:100]} nests more than {MAX_DEPTH} deep"
    if not isinstance(values, dict):
        answers = (why_unstorable(inner, f"{where}[{i}]", depth + 1) for i, inner in enumerate(values))
        return next((answer for answer in answers if answer), None)
    for key, inner in values.items():
        if not isinstance(key, str):
            return f"{where} has the key {key!r}, only strings are allowed: give it as a string"
        answer = why_unstorable(key, f"a key of {where}") or why_unstorable(inner, f"{where}[{key!r}]", depth + 1)
        if answer:
            return answer
    return None


def nests_deeper(value: object, most: int = MAX_DEPTH) -> bool:
    """Return whether lists and dicts nest more than ``most`` levels deep; does not recurse, as a file may lie."""
    level: list[Any] = [value]
    for _ in range(most + 1):
        level = [x for x in level if isinstance(x, (dict, list))]
        level = [inner for x in level for inner in (x.values() if isinstance(x, dict) else x)]
    return bool(level)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_constant(text[:40])


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")
