"""The entry point of `muws`, the command for `.muws` files: the parser, the exit codes and the errors.

The command line of a training script is another thing: see `lightning_muws.cli`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import lightning_muws
from lightning_muws.commands import bench, dry_run, files, pack, page, sensitivity, view
from lightning_muws.commands.output import TROUBLE, reason, say, say_json
from lightning_muws.errors import MuwsError

EPILOG = """exit codes:
  0  done
  1  verify: the file is damaged; diff: the files differ
  2  the command failed; standard error has the reason
"""
INTERRUPTED, CLOSED = 130, 141  # exit codes of a program that was ended by SIGINT, by SIGPIPE


def main(args: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        args: The words after ``muws``; those of the process if not given.

    Returns:
        0: done; 1: ``verify`` found damage or ``diff`` a difference; 2: the command failed, and its reason is on
        standard error, as JSON if that is asked for.

    Raises:
        SystemExit: The words are not those of a command (code 2), or ask for the help or the version (code 0).
    """
    options = parser().parse_args(args)
    try:
        code = int(options.run(options))
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
        _discard_output()
        return CLOSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except (MuwsError, OSError) as error:
        say_json({"error": reason(error)}, sys.stderr) if options.json else say(f"muws: {reason(error)}", sys.stderr)
        _discard_output()
        return files.verdict(error) if options.run is files.verify else TROUBLE
    return code


def _discard_output() -> None:
    """Leave what standard output could not take, as on a full disk; Python would try once more when it exits."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    found = argparse.ArgumentParser(
        prog="muws",
        description="Look into .muws files, check, write, compress, unpack, compare and time them, and measure layers.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--version", action="version", version=f"muws {lightning_muws.__version__}")
    commands = found.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], int], does: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.")
        added.set_defaults(run=run)
        added.add_argument("--json", action="store_true", help="print JSON instead of tables")
        return added

    files.add_parsers(command)
    pack.add_parsers(command)
    page.add_parsers(command)
    view.add_parsers(command)
    dry_run.add_parser(command)
    bench.add_parser(commands)
    sensitivity.add_parser(commands)
    return found
