"""What zeros gain in an exported network: nothing. And how fast `accelerate`'s network is as a saved program.

The first table has the network dense and pruned, exported, equal, and timed alike. The second has the accelerated
network, the program that AOTInductor compiles of it, and the files that `export_onnx` writes of it, in ONNX Runtime.
Run: make bench. The rows of ONNX Runtime need `pip install onnx onnxscript onnxruntime`, that of AOTInductor needs a
C++ compiler; each is left out without.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from machine import console, interleaved, ratios, say_machine
from rich.table import Table
from torch import Tensor, nn
from whole_networks import pruned

from lightning_muws import accelerate, export_onnx, onnx_library
from lightning_muws.runtime.native.library import level

SHARE = 0.9
SHARES = (0.75, 0.9)  # of the accelerated networks


def exported(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Return a run of the network after torch.export."""
    run = torch.export.export(model, (x,)).module()
    return lambda: run(x)


def compiled(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Return a run of the program that AOTInductor compiles of the network, after it was saved and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        program, path = torch.export.export(model, (x,)), str(Path(folder) / "network.pt2")
        run = torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program, package_path=path))
    return lambda: run(x)


def in_onnx_runtime(model: nn.Module, x: Tensor, custom_ops: bool = False, threads: int = 1) -> Callable[[], Tensor]:
    """Return a run of the network in ONNX Runtime, with our operators or as plain ONNX."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    if custom_ops:
        options.register_custom_ops_library(str(onnx_library()))
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(model, Path(folder) / "network.onnx", x, custom_ops)
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def accelerated(x: Tensor, onnx: bool) -> Table:
    """Return a table of the accelerated network as it is, compiled, and in ONNX Runtime."""
    table = Table(title="ResNet-18 (CIFAR stem), batch 1, accelerated, and saved as a program")
    for header in ("pruned", "", "ms", "of the speed of accelerate", "least", "largest", "relative error"):
        table.add_column(header, justify="right" if header else "left")
    for share in SHARES:
        model = pruned("ResNet-18", share)
        fast, _ = accelerate(model, x)
        expected = fast(x)
        tasks = {"accelerate": lambda fast=fast: fast(x)}
        if shutil.which("c++"):
            tasks["AOTInductor"] = compiled(fast, x)
        if onnx:
            tasks["ONNX, our operators"] = in_onnx_runtime(fast, x, custom_ops=True)
            tasks["ONNX, dense weights"] = in_onnx_runtime(fast, x)
            tasks["ONNX, the network as given"] = in_onnx_runtime(model, x)
        times = interleaved(tasks, 31, sample_s=0.02)
        for way, task in tasks.items():
            speeds = [base / own for base, own in zip(times["accelerate"], times[way], strict=True)]
            error = float((task() - expected).abs().max() / expected.abs().max())
            numbers = [f"{speed:.2f}" for speed in (median(speeds), min(speeds), max(speeds))]
            table.add_row(f"{share:.0%}", way, f"{1e3 * median(times[way]):.2f}", *numbers, f"{error:.1e}")
    return table


def main() -> None:
    say_machine()
    ways = {"torch.export": exported}
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        ways["ONNX Runtime"] = in_onnx_runtime
    table = Table(title=f"ResNet-18 (CIFAR stem), batch 1, exported: dense against {SHARE:.0%} of its blocks pruned")
    for header in ("", "dense, ms", "pruned, ms", "gain", "least", "largest", "largest difference to the module"):
        table.add_column(header, justify="right" if header else "left")
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense, sparse = pruned("ResNet-18", 0.0), pruned("ResNet-18", SHARE)
        for way, export in ways.items():
            tasks = {"dense": export(dense, x), "pruned": export(sparse, x)}
            difference = float((tasks["pruned"]() - sparse(x)).abs().max())
            times = interleaved(tasks, 31, sample_s=0.02)
            numbers = [f"{1e3 * median(times[name]):.2f}" for name in tasks]
            gain = [f"{value:.2f}" for value in ratios(times, "pruned")["dense"]]
            table.add_row(way, *numbers, *gain, f"{difference:.1e}")
    console.print(table)
    with torch.no_grad():
        if level() is not None:
            console.print(accelerated(x, "ONNX Runtime" in ways))


if __name__ == "__main__":
    main()
