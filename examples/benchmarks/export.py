"""What zeros gain in an exported network: nothing. The network dense and pruned, exported, equal, and timed alike.

Run: make bench. The rows of ONNX Runtime need `pip install onnx onnxscript onnxruntime`, and are left out without.
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from machine import console, interleaved, ratios, say_machine
from rich.table import Table
from torch import Tensor, nn
from whole_networks import pruned

SHARE = 0.9


def exported(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Return a run of the network after torch.export."""
    run = torch.export.export(model, (x,)).module()
    return lambda: run(x)


def in_onnx_runtime(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Return a run of the network in ONNX Runtime, one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and onnxscript warn of each other
        path = Path(folder) / "network.onnx"
        torch.onnx.export(model, (x,), path, dynamo=True, external_data=False, verbose=False)
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


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


if __name__ == "__main__":
    main()
