"""Writes a fast network as two ONNX files, and runs both in ONNX Runtime. It needs: pip install '.[onnx]'

The first file has our operators and needs the library beside it, the second is plain ONNX. All go to output/deploy.
"""

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_muws import MicroStructure, accelerate, export_onnx, onnx_library

FOLDER = Path("output/deploy")


def network() -> nn.Module:
    """Return a network whose weights are pruned by 80 %, as after training with the callback."""
    layers = [nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, 2, padding=1)]
    steps = [step for layer in layers for step in (layer, nn.ReLU())]
    for layer in layers[1:]:
        layer.weight.data = MicroStructure((4, 4), prune_ratio=0.8).project(layer.weight.data)
    return nn.Sequential(*steps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


def session(model: Path, library: Path | None) -> Any:
    """Return a session of one thread; a program in C, C# or Java does the same in its language."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def main() -> None:
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    x = torch.randn(1, 3, 32, 32)
    fast, report = accelerate(network(), x, kernels=["native"])
    print(report.summary())
    library = Path(shutil.copy(onnx_library(), FOLDER / "lightning_muws_onnx.so"))
    packed = session(export_onnx(fast, FOLDER / "packed.onnx", x), library)
    dense = session(export_onnx(fast, FOLDER / "dense.onnx", x, custom_ops=False), None)
    with torch.no_grad():
        expected = fast(x).numpy()
    for name, one in (("packed", packed), ("dense", dense)):
        given = {one.get_inputs()[0].name: x.numpy()}
        error = np.abs(one.run(None, given)[0] - expected).max() / np.abs(expected).max()
        times = []
        for _ in range(20):
            start = time.perf_counter()
            one.run(None, given)
            times.append(time.perf_counter() - start)
        n_bytes = (FOLDER / f"{name}.onnx").stat().st_size
        print(f"{name}.onnx {n_bytes:,} bytes, relative error {error:.0e}, {1e3 * sorted(times)[10]:.2f} ms")


if __name__ == "__main__":
    main()
