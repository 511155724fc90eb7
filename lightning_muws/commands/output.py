"""The output of the commands: text, JSON and progress, and the exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from lightning_muws.tables import visible

DONE, BAD, TROUBLE = 0, 1, 2  # exit codes: done; damaged or different; failed


def say(text: object, stream: TextIO | None = None) -> None:
    """Write text as lines, to standard output if no stream is given.

    Control characters, which would reach the terminal, and what the stream cannot encode are written as escapes.
    """
    stream = stream or sys.stdout
    if stream is None:  # the caller has closed it
        return
    encoding = stream.encoding or "utf-8"
    lines = "\n".join(map(visible, str(text).split("\n")))
    stream.write(f"{lines}\n".encode(encoding, "backslashreplace").decode(encoding))


def say_json(value: object, stream: TextIO | None = None) -> None:
    """Write a value as JSON, to standard output if no stream is given."""
    say(json.dumps(value, indent=2), stream)


def reason(error: Exception) -> str:
    """Return the message of an error on one line, without the number of a system's error."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


@contextmanager
def progress(what: str, is_quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of bytes done and bytes in all that shows a percentage on a terminal, on standard error."""
    shown = -1
    is_quiet = is_quiet or sys.stderr is None or not sys.stderr.isatty()

    def update(done: int, total: int) -> None:
        nonlocal shown
        percent = 100 * done // max(1, total)
        if percent > shown and not is_quiet:
            shown = percent
            sys.stderr.write(f"\r{what} {percent:3d} %")
            sys.stderr.flush()

    try:
        yield update
    finally:
        if shown >= 0:
            sys.stderr.write("\r" + " " * len(f"{what} 100 %") + "\r")
            sys.stderr.flush()
