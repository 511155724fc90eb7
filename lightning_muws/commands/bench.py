"""`muws bench`: loads a file into its network, accelerates the network and shows the times."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_muws.artifact.load import inspect_compressed, load_compressed
from lightning_muws.commands.code import build, first_line
from lightning_muws.commands.output import DONE, say_json
from lightning_muws.errors import SettingError
from lightning_muws.runtime.accelerate import accelerate

DTYPES = ("float32", "float64", "bfloat16", "float16", "int64")
MAX_THREADS = 1024


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add ``bench`` to the subcommands; its option ``run`` is :func:`run`."""
    does = "measure how fast the network of a .muws file runs on this machine, against its fastest dense form"
    parser = commands.add_parser("bench", help=does, description=f"{does[0].upper()}{does[1:]}.")
    parser.set_defaults(run=run)
    parser.add_argument("file", type=Path, help="the .muws file")
    parser.add_argument("--model", required=True, metavar="PACKAGE.MODULE:CLASS", help="class that builds the network")
    parser.add_argument("--args", default="{}", metavar="JSON", help="keyword arguments of the class, as JSON")
    parser.add_argument(
        *("--input", "-i"),
        required=True,
        action="append",
        metavar="1x3x32x32[:DTYPE]",
        help="shape of an input, which is filled with random numbers (int64: zeros); repeat the option if the network "
        f"has several inputs; dtypes: {', '.join(DTYPES)} (default: {DTYPES[0]})",
    )
    parser.add_argument("--threads", type=int, default=1, help="number of threads of torch (default: 1)")
    parser.add_argument(
        "--min-gain", type=float, default=1.1, help="use a kernel if it is this many times faster (default: 1.1)"
    )
    parser.add_argument("--dtype", choices=("bfloat16",), help="allow kernels of this precision too")
    parser.add_argument("--save", type=Path, metavar="JSON", help="write the report, for accelerate(..., plan=...)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def run(options: argparse.Namespace) -> int:
    """Run ``muws bench`` and return its exit code, 0.

    Raises:
        MuwsError: The file is damaged or does not fit the network, the network does not accept the inputs, or an
            option is not allowed.
    """
    inputs = tuple(_random(text) for text in options.input)
    if not 1 <= options.threads <= MAX_THREADS:
        raise SettingError(f"--threads {options.threads} is not allowed: give a number from 1 to {MAX_THREADS}")
    if options.save and (options.save.is_dir() or not options.save.parent.is_dir()):
        raise SettingError(f"--save {options.save} cannot be written: give a file in a folder that exists")
    model = build(options.model, options.args)
    block_shapes = _load(options.file, model)
    torch.set_num_threads(options.threads)
    _try(model.eval(), inputs, options.input)
    _, report = accelerate(
        model,
        inputs,
        min_gain=options.min_gain,
        dtype=torch.bfloat16 if options.dtype else None,
        block_shapes=block_shapes,
    )
    if options.save:
        report.save(options.save)
    if options.json:
        say_json(report.to_dict())
    else:
        report.print()
    return DONE


def _random(text: str) -> Tensor:
    """Return an input whose shape is written as ``1x3x32x32`` or ``8x128:int64``; integers are zeros."""
    found = re.fullmatch(r"([0-9]{1,12}(?:x[0-9]{1,12})*)(?::(\w+))?", text)
    if not found or (found[2] or DTYPES[0]) not in DTYPES:
        raise SettingError(f"--input {text!r} is not allowed: give a shape as 1x3x32x32, or 8x128:int64 with a dtype")
    shape = [int(n) for n in found[1].split("x")]
    dtype = getattr(torch, found[2] or DTYPES[0])
    try:
        return torch.zeros(shape, dtype=dtype) if dtype == torch.int64 else torch.randn(shape).to(dtype)
    except RuntimeError as error:
        raise SettingError(f"--input {text!r} cannot be made: {first_line(error)}; give a smaller shape") from None


def _load(path: Path, model: nn.Module) -> Mapping[str, tuple[int, int]]:
    """Load the file into the model, and return the block shapes that the file records, by parameter name."""
    load_compressed(path, into=model)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        tensor.name: (tensor.block_shape[0], tensor.block_shape[1])
        for tensor in inspect_compressed(path).tensors
        if len(tensor.block_shape) == 2 and tensor.name in names
    }


def _try(model: nn.Module, inputs: tuple[Tensor, ...], shapes: list[str]) -> None:
    """Check that the network accepts the inputs."""
    try:
        with torch.no_grad():
            model(*inputs)
    except Exception as error:  # the user's own code may raise anything
        raise SettingError(
            f"the network fails on --input {' '.join(shapes)}: {type(error).__name__}: {first_line(error)}; "
            "give the shapes and dtypes that its forward takes"
        ) from error
