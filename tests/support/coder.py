"""Runs code with one level of the native coder, or with numpy."""

import contextlib
import os
from collections.abc import Iterator

from lightning_muws.artifact import native


def levels() -> list[str]:
    """Return the levels that this machine has; none where the coder is not built."""
    best = native._best()
    return [] if best is None else list(native.LEVELS[: best + 1])


@contextlib.contextmanager
def coder(name: str) -> Iterator[None]:
    """Use a level by its name; ``none`` for numpy."""
    before = os.environ.get("MUWS_CODER")
    os.environ["MUWS_CODER"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["MUWS_CODER"]
        else:
            os.environ["MUWS_CODER"] = before
