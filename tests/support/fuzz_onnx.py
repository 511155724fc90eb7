"""Damages layers of ONNX files at random, and runs those that are not refused: ``python fuzz_onnx.py 300``.

It prints how many were refused, and how many ran. A crash of the process is the finding.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_muws import MicroStructure
from lightning_muws.runtime.kernels import native, native_int8, signs
from tests.support.onnx_models import Layer, layer_of, session

NUMBERS = (-1, 0, 1, 2, 3, 4, 5, 8, 16, 17, 63, 1 << 16, 1 << 20, 1 << 31, 1 << 62, -(1 << 63))


def layers() -> list[tuple[Layer, tuple[int, ...]]]:
    """Return good layers and the shapes of their inputs."""
    linear, convolution = nn.Linear(32, 24).eval(), nn.Conv2d(8, 8, 3, 2, 1, groups=2).eval()
    linear.weight.data = MicroStructure((8, 8), 0.2, 0.8).project(torch.randn(24, 32))
    image = torch.randn(2, 8, 7, 9)
    found = [
        (native.build(linear, (4, 4), torch.randn(2, 32)), (2, 32)),
        (native.build(linear, (4, 4), torch.randn(2, 32)), (9, 32)),
        (native.build(convolution, (4, 4), image), tuple(image.shape)),
        (signs.build(linear, (8, 8), torch.zeros(1, 32)), (1, 32)),
        (native_int8.build(linear, (1, 1), torch.randn(2, 32)), (5, 32)),
        (native_int8.build_static(convolution, image, native_int8.Activation.of(-2, 2)), tuple(image.shape)),
    ]
    return [(layer_of(kernel), shape) for kernel, shape in found]


def damaged(layer: Layer, rng: random.Random) -> Layer:
    """Change a number of the geometry, or the numbers or the size of a constant."""
    if rng.random() < 0.5:
        return layer.with_number(rng.randrange(len(layer.geometry)), rng.choice(NUMBERS))
    name = rng.choice([name for name, array in layer.constants.items() if array is not None])
    array = layer.constants[name].copy()
    if rng.random() < 0.3:
        return layer.with_constant(name, array.ravel()[: rng.randrange(array.size + 1)].copy())
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(array.size)
        array.reshape(-1)[place] = np.array(rng.choice(NUMBERS)).astype(array.dtype)
    return layer.with_constant(name, array)


def main(count: int) -> None:
    """Damage so many layers."""
    torch.manual_seed(0)
    rng, good = random.Random(0), layers()  # noqa: S311  no secret
    refused = ran = 0
    for _ in range(count):
        layer, shape = rng.choice(good)
        if layer.kind == "SignedLinear":
            layer = Layer(layer.kind, layer.geometry, {n: a for n, a in layer.constants.items() if n != "bias"})
        try:
            session(damaged(layer, rng).model()).run(None, {"x": np.ones(shape, np.float32)})
            ran += 1
        except Exception as error:  # ONNX Runtime has a class for each code
            if not type(error).__module__.startswith(onnxruntime.capi.onnxruntime_pybind11_state.__name__):
                raise
            refused += 1
    print(refused, ran)  # noqa: T201  what the test reads


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(int(sys.argv[1]))
