"""`muws report`: one HTML page about a `.muws` file."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_muws.artifact.container import replacing
from lightning_muws.commands.options import add_force, add_max_bytes, check_target, opened
from lightning_muws.commands.output import DONE, say, say_json
from lightning_muws.errors import SettingError
from lightning_muws.file_page import file_page
from lightning_muws.runtime.measure.report import SpeedReport
from lightning_muws.training.run import Update

LARGEST = 1 << 26  # bytes of a history; a larger file is none


def add_parsers(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add ``report``; ``command`` adds a subcommand and returns its parser."""
    parser = command("report", report, "write an HTML page about a .muws file, with pictures of its blocks")
    parser.add_argument("file", type=Path, help="the .muws file; - for standard input")
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="PAGE", help="the .html file to write")
    parser.add_argument(
        "--history",
        type=Path,
        metavar="FILE",
        help="show the residuals of this file: JSON of report.to_dict() after fit",
    )
    parser.add_argument("--speed", type=Path, metavar="FILE", help="show this speed report, from SpeedReport.save")
    parser.add_argument(
        "--score",
        type=score,
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="show a number, as accuracy=0.92",
    )
    add_force(parser)
    add_max_bytes(parser)


def report(options: argparse.Namespace) -> int:
    """Write the page and return the exit code, 0.

    Raises:
        MuwsError: The file is damaged, the page cannot be written, or an option's file is not what it should be.
    """
    check_target(options.output, options.file, (".html",), force=options.force)
    history = read_history(options.history) if options.history else []
    speed = SpeedReport.load(options.speed) if options.speed else None
    with opened(options.file, options.max_bytes) as path:
        page = file_page(
            path, history=history, scores=dict(options.score), speed=speed, max_bytes=options.max_bytes,
            name="standard input" if str(options.file) == "-" else options.file.name,
        )  # fmt: skip
    encoded = page.encode()
    with replacing(options.output) as file:
        file.write(encoded)
    if options.json:
        say_json({"file": str(options.output), "n_bytes": len(encoded)})
    else:
        say(f"{options.output}: written, {len(encoded):,} bytes")
    return DONE


def score(text: str) -> tuple[str, float]:
    """Return the name and the number of a text such as ``accuracy=0.92``."""
    name, _, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not name or not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: give a name and a number, such as accuracy=0.92")
    return name, value


def read_history(path: Path) -> list[Update]:
    """Return the updates of a run from the JSON of a report, or from a list of them.

    Raises:
        SettingError: The file has none.
    """
    advice = "give the JSON of report.to_dict() after fit, or of its history"
    try:
        if path.stat().st_size > LARGEST:
            raise SettingError(f"{path} is larger than any history: {advice}")
        found: Any = json.loads(path.read_bytes())
        updates = found["history"] if isinstance(found, dict) else found
        return [Update(**{key: float(one[key]) for key in ("when", "rho", "primal", "dual")}) for one in updates]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError(f"{path} holds no history ({error!r}): {advice}") from None
