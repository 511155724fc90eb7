"""`muws bench`: loads a file into its model, accelerates it, and shows what was gained."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muws.errors import SettingError
from lightning_muws.runtime.accelerate import accelerate

DTYPES = ("float32", "float64", "bfloat16", "float16", "int64")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add ``bench`` to the subcommands; :func:`run` carries it out."""
    says = "measure how fast a file's network runs here, against its best dense form"
    parser = commands.add_parser("bench", help=says, description=f"{says[0].upper()}{says[1:]}.")
    parser.set_defaults(run=run)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", required=True, metavar="PACKAGE.MODULE:CLASS", help="what builds the network")
    parser.add_argument("--args", default="{}", metavar="JSON", help="keyword arguments of the class, as JSON")
    parser.add_argument(
        *("--input", "-i"),
        required=True,
        action="append",
        metavar="1x3x32x32[:DTYPE]",
        help=f"shape of an input, filled at random; again for a second one; dtypes are {', '.join(DTYPES)}",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1)")
    parser.add_argument("--min-gain", type=float, default=1.1, help="what a kernel has to win by (1.1)")
    parser.add_argument("--dtype", choices=("bfloat16",), help="let kernels of this precision win")
    parser.add_argument("--save", type=Path, metavar="JSON", help="write the report, for accelerate(..., plan=...)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def run(options: argparse.Namespace) -> int:
    """Carry out ``muws bench``; return 0.

    Raises:
        MuwsError: The file is damaged, does not fit the model, or an option is not allowed.
    """
    inputs = tuple(_random(text) for text in options.input)
    if options.threads < 1:
        raise SettingError(f"--threads {options.threads} is not allowed: give at least 1")
    model = _build(options.model, options.args)
    block_shapes = _load(options.file, model)
    torch.set_num_threads(options.threads)
    _, report = accelerate(
        model.eval(),
        inputs,
        min_gain=options.min_gain,
        dtype=torch.bfloat16 if options.dtype else None,
        block_shapes=block_shapes,
    )
    if options.save:
        report.save(options.save)
    if options.json:
        sys.stdout.write(json.dumps(report.to_dict(), indent=2) + "\n")
    else:
        report.print()
    return 0


def _random(text: str) -> Tensor:
    """Return an input of a shape written as ``1x3x32x32`` or ``8x128:int64``; whole numbers are zeros."""
    found = re.fullmatch(r"(\d+(?:x\d+)*)(?::(\w+))?", text)
    if not found or (found[2] or DTYPES[0]) not in DTYPES:
        raise SettingError(f"--input {text!r} is not allowed: give a shape as 1x3x32x32, or 8x128:int64 with a dtype")
    shape = [int(n) for n in found[1].split("x")]
    dtype = getattr(torch, found[2] or DTYPES[0])
    return torch.zeros(shape, dtype=dtype) if dtype == torch.int64 else torch.randn(shape).to(dtype)


def _build(name: str, arguments: str) -> nn.Module:
    """Return the module that ``package.module:Class`` makes; the current directory is looked in first, as by python."""
    module_name, _, attribute = name.partition(":")
    try:
        keywords: Any = json.loads(arguments)
    except ValueError as error:
        raise SettingError(
            f'--args {arguments!r} is no JSON ({error}): give an object such as {{"width": 32}}'
        ) from None
    if not attribute or not isinstance(keywords, dict):
        raise SettingError(f"--model {name!r} with --args {arguments} is not allowed: give package.module:Class")
    sys.path.insert(0, str(Path.cwd()))
    try:
        make = getattr(importlib.import_module(module_name), attribute)
        inspect.signature(make).bind(**keywords)
        model = make(**keywords)
    except (ImportError, AttributeError, TypeError) as error:
        raise SettingError(
            f"--model {name!r} cannot be built: {error}; name a class or function, and its --args"
        ) from None
    finally:
        sys.path.remove(str(Path.cwd()))
    if not isinstance(model, nn.Module):
        raise SettingError(f"--model {name!r} gives a {type(model).__name__}: name a class of torch.nn.Module")
    return model


def _load(path: Path, model: nn.Module) -> Mapping[str, tuple[int, int]]:
    """Load the file into the model, and return the block shapes that it names."""
    from lightning_muws.artifact.load import (
        inspect_compressed,
        load_compressed,
    )

    load_compressed(path, into=model)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        tensor.name: (tensor.block_shape[0], tensor.block_shape[1])
        for tensor in inspect_compressed(path).tensors
        if len(tensor.block_shape) == 2 and tensor.name in names
    }
