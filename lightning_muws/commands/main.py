"""The entry point of `muws`, the command for `.muws` files: the parser, the exit codes and the errors.

The command line of a training script is another thing: see `lightning_muws.cli`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import lightning_muws
from lightning_muws.commands import bench, files, sensitivity
from lightning_muws.commands.output import BAD, TROUBLE, say, say_json
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
        standard error, or in the JSON on standard output.

    Raises:
        SystemExit: The words are not those of a command (code 2), or ask for the help or the version (code 0).
    """
    options = parser().parse_args(args)
    try:
        code = int(options.run(options))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except (MuwsError, OSError) as error:
        reason = _reason(error)
        if options.json:
            say_json({"error": reason})
        else:
            say(f"muws: {reason}", sys.stderr)
        return BAD if options.run is files.verify and isinstance(error, MuwsError) else TROUBLE
    return code


def parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    found = argparse.ArgumentParser(
        prog="muws",
        description="Look into .muws files, check, write, unpack, compare and time them, and measure layers.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--version", action="version", version=f"muws {lightning_muws.__version__}")
    commands = found.add_subparsers(required=True, metavar="command")
    files.add_parsers(commands)
    bench.add_parser(commands)
    sensitivity.add_parser(commands)
    return found


def _reason(error: Exception) -> str:
    """Return the message of an error on one line, without the number of a system's error."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
