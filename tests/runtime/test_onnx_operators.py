"""Our operators in ONNX Runtime compute what the kernels compute, bit for bit, and refuse what does not fit."""

import copy
import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_muws.runtime.kernels import native, native_int8, signs
from lightning_muws.runtime.kernels.native import BlockSparse
from lightning_muws.runtime.kernels.native_int8 import Activation
from lightning_muws.runtime.native import library
from lightning_muws.runtime.native.packing import pack
from lightning_muws.runtime.native.plan import Geometry
from lightning_muws.runtime.onnx.dense import make_dense
from lightning_muws.structure.micro import MicroStructure
from tests.support.strategies import normal

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
if library.level() is None:
    pytest.skip("the native kernels are not built", allow_module_level=True)

from tests.support.onnx_models import Layer, layer_of, run, session  # noqa: E402  needs what is checked above

ERRORS = onnxruntime.capi.onnxruntime_pybind11_state
REFUSED = (ERRORS.Fail, ERRORS.InvalidArgument, ERRORS.RuntimeException)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Let the kernels in torch run on one thread, as the operators do: with more, they cut images otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def at_level(name: str):
    before = os.environ.get("MUWS_LEVEL")
    os.environ["MUWS_LEVEL"] = name
    try:
        yield
    finally:
        del os.environ["MUWS_LEVEL"]
        if before is not None:
            os.environ["MUWS_LEVEL"] = before


def single(seed: int, *shape: int) -> torch.Tensor:
    return normal(seed, *shape, dtype=torch.float32)


def sparse_matrix(seed: int, n_out: int, n_in: int) -> torch.Tensor:
    matrix = single(seed, n_out, n_in)
    return matrix * (torch.rand(n_out, n_in, generator=torch.Generator().manual_seed(seed)) < 0.4)


@st.composite
def blocks(draw: st.DrawFn) -> tuple[BlockSparse, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Return a kernel, an input, what to add, and the layer's weight."""
    dims, rows, cols = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 4]))
    small = st.integers(1, 3)
    kh, sh, ph = (draw(small), draw(small), draw(st.integers(0, 2))) if dims == 3 else (1, 1, 0)
    kw, sw, pw = (draw(small), draw(small), draw(st.integers(0, 2))) if dims > 1 else (1, 1, 0)
    groups = draw(st.integers(1, 2)) if dims > 1 else 1
    n_in = groups * 4 * draw(small)
    n_out = groups * rows * draw(small) if groups > 1 else draw(st.integers(1, 20))
    seed, relu, lanes = draw(st.integers(0, 10**6)), draw(st.integers(0, 1)), draw(st.integers(0, 2))
    matrix = sparse_matrix(seed, n_out, n_in // groups * kh * kw)
    geometry = Geometry(n_out, kh, kw, sh, sw, ph, pw, groups, rows, cols, relu, batch_lanes=lanes, n_in=n_in)
    bias = single(seed + 1, n_out) if draw(st.booleans()) else None
    kernel = BlockSparse(pack(matrix, rows, cols), bias, geometry, dims)
    n, h, w = draw(st.sampled_from([0, 1, 2, 5, 17])), draw(st.integers(kh, 9)), draw(st.integers(kw, 20))
    shape = {1: (n, n_in), 2: (n, n_in, w), 3: (n, n_in, h, w)}[dims]
    x = single(seed + 2, *shape)
    onto = single(seed + 3, *kernel(x).shape) if draw(st.booleans()) else None
    kernel = copy.deepcopy(kernel)  # without the plan that it made for the level of now
    return kernel, x, onto, matrix.view(n_out, n_in // groups, *(kh, kw)[-(dims - 1) :] if dims > 1 else ())


def in_float64(kernel: BlockSparse, x: torch.Tensor, onto: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    g, d = kernel.geometry, kernel.n_dims - 1
    x, weight = x.double(), weight.double()
    bias = None if kernel.bias is None else kernel.bias[: g.out].double()
    if d == 0:
        y = F.linear(x, weight, bias)
    else:
        convolve = F.conv2d if d == 2 else F.conv1d
        stride, padding = (g.stride_h, g.stride_w)[-d:], (g.pad_h, g.pad_w)[-d:]
        y = convolve(x, weight, bias, stride, padding, 1, g.groups)
    y = y if onto is None else y + onto
    return y.relu() if kernel.relu else y


def as_dense(layer: Layer):
    import onnx_ir

    model = onnx_ir.from_proto(layer.model())
    make_dense(model.graph)
    assert all(node.domain == "" for node in model.graph)
    return session(onnx_ir.to_proto(model))


@pytest.mark.parametrize("name", library.levels())
@given(case=blocks())
def test_a_layer_of_blocks_equals_the_kernel_and_dense_onnx_equals_float64(name, case):
    kernel, x, onto, weight = case
    layer = layer_of(kernel, onto is not None)
    inputs = {"x": x} if onto is None else {"x": x, "onto": onto}
    with at_level(name), torch.inference_mode():
        y = run(layer, **inputs)
        assert torch.equal(y, kernel(x) if onto is None else kernel(x, onto))
    expected = in_float64(kernel, x, onto, weight)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    if x.numel():
        if kernel.n_dims == 2:
            return  # as a Conv2d of one row: the exporter gives its input that form
        dense = as_dense(layer).run(None, {name: value.numpy() for name, value in inputs.items()})[0]
        torch.testing.assert_close(torch.from_numpy(dense).double(), expected, rtol=1e-5, atol=1e-5)


def signed(relu: bool = False, n_out: int = 24) -> tuple[nn.Linear, signs.SignedLinear]:
    layer = nn.Linear(32, n_out).eval()
    layer.weight.data = MicroStructure((8, 8), 0.2, 0.8).project(single(0, n_out, 32))
    kernel = signs.build(layer, (8, 8), torch.zeros(1, 32))
    assert kernel is not None
    assert kernel.rest is None
    return layer, kernel.with_relu() if relu else kernel


@pytest.mark.parametrize("name", library.levels())
@pytest.mark.parametrize("shape", [(32,), (1, 32), (2, 3, 32), (0, 32)])
def test_a_layer_of_signs_equals_the_kernel_and_dense_onnx(name, shape):
    layer, kernel = signed(relu=True)
    x = single(1, *shape)
    onto = kernel.bias.expand(*shape[:-1], 24).contiguous()
    node = layer_of(kernel, has_onto=True)
    node = Layer(node.kind, node.geometry, {n: a for n, a in node.constants.items() if n != "bias"}, True)
    with at_level(name), torch.inference_mode():
        y = run(node, x=x, onto=onto)
        torch.testing.assert_close(y, layer(x).relu(), rtol=1e-5, atol=1e-5)
        if len(shape) == 1:
            assert torch.equal(y, kernel(x))
    dense = as_dense(node).run(None, {"x": x.numpy(), "onto": onto.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(dense), y, rtol=1e-5, atol=1e-5)


def layers8() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    return {
        "linear": (nn.Linear(30, 21), single(0, 5, 30)),
        "one sample": (nn.Linear(30, 21), single(0, 1, 30)),
        "convolution": (nn.Conv2d(8, 12, 3, 2, 1, groups=2), single(0, 2, 8, 9, 11)),
        "no bias": (nn.Conv2d(4, 6, 1, bias=False), single(0, 1, 4, 5, 5)),
    }


@pytest.mark.parametrize("name", library.levels())
@pytest.mark.parametrize("case", list(layers8()))
@pytest.mark.parametrize("onto", [False, True])
def test_a_layer_of_8_bits_equals_the_kernel_and_dense_onnx(name, case, onto):
    layer, x = layers8()[case]
    layer.weight.data = sparse_matrix(3, len(layer.weight), layer.weight[0].numel()).view(layer.weight.shape)
    with at_level(name), torch.inference_mode():
        kernel = native_int8.build_static(layer.eval(), x, Activation.of(-2.0, 2.5)).with_relu()
        inputs = {"x": x, "onto": single(5, *kernel(x).shape)} if onto else {"x": x}
        node = layer_of(kernel, onto)
        y = run(node, **inputs)
        assert torch.equal(y, kernel(*inputs.values()))
    dense = as_dense(node).run(None, {name: value.numpy() for name, value in inputs.items()})[0]
    torch.testing.assert_close(torch.from_numpy(dense), y, rtol=1e-5, atol=1e-5)


def test_a_linear_of_8_bits_rounds_each_sample_by_its_own_range():
    layer, x = nn.Linear(30, 21).eval(), single(0, 4, 30)
    with torch.inference_mode():
        kernel = native_int8.build(layer, (1, 1), x)
        assert torch.equal(run(layer_of(kernel), x=x), kernel(x))


def test_threads_may_call_one_session_at_once_with_any_shapes():
    layer = nn.Conv2d(8, 8, 3, padding=1).eval()
    kernel = native.build(layer, (4, 4), single(0, 1, 8, 6, 6))
    one = session(layer_of(kernel).model())
    inputs = [single(i, 1 + i % 3, 8, 5 + i % 7, 4 + i % 30) for i in range(60)]
    with torch.inference_mode():
        expected = [kernel(x) for x in inputs]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda x: one.run(None, {"x": x.numpy()})[0], inputs * 4))
    for y, z in zip(found, expected * 4, strict=True):
        torch.testing.assert_close(torch.from_numpy(y), z, rtol=1e-5, atol=1e-5)


def test_a_layer_runs_on_the_threads_of_onnx_runtime():
    image, samples = single(0, 2, 8, 30, 40), single(1, 9, 32)
    layers = [nn.Conv2d(8, 64, 3, padding=1).eval(), nn.Linear(32, 400).eval()]
    cases = [
        (native.build(layers[0], (4, 4), image), image),
        (native.build(layers[1], (4, 4), samples[:1]), samples[:1]),
        (native_int8.build_static(layers[0], image, Activation.of(-2.0, 2.0)), image),
        (native_int8.build(layers[1], (4, 4), samples), samples),
        (signed(n_out=400)[1], samples[:1]),
    ]
    for kernel, x in cases:
        node, inputs = layer_of(kernel), {"x": x.numpy()}
        if node.kind == "SignedLinear":
            node = Layer(node.kind, node.geometry, {n: a for n, a in node.constants.items() if n != "bias"})
        one, three = session(node.model()), session(node.model(), threads=3)
        expected = one.run(None, inputs)[0]
        with ThreadPoolExecutor(4) as pool:
            for y in pool.map(lambda _, s=three, given=inputs: s.run(None, given)[0], range(20)):
                np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", ["0", "-1", "two", "2x", "", "100000", "9" * 40])
def test_a_number_of_threads_that_is_none_is_refused(text):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("lightning_muws.threads", text)
    with pytest.raises(REFUSED, match=r"lightning_muws\.threads is not allowed: give a whole number from 1 to 1024"):
        options.register_custom_ops_library(library.library()._name)


def convolution() -> Layer:
    geometry = Geometry(8, 3, 3, 1, 1, 1, 1, 1, 4, 4, n_in=4)
    return layer_of(BlockSparse(pack(single(0, 8, 36), 4, 4), single(1, 8), geometry, 3))


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ((1, 3, 5, 5), "has 3 channels, where the layer takes 4"),
        ((1, 4, 5), "has 3 dimensions"),
        ((4, 5, 5, 1, 1), "has 5 dimensions"),
        ((), "has 0 dimensions"),
    ],
)
def test_an_input_of_a_wrong_shape_is_refused(shape, why):
    with pytest.raises(REFUSED, match=why):
        run(convolution(), x=torch.ones(shape))


def test_an_input_smaller_than_the_kernel_is_refused():
    with pytest.raises(REFUSED, match="smaller than the kernel"):
        run(convolution().with_number(5, 0), x=torch.ones(1, 4, 2, 9))


def test_an_input_of_a_wrong_type_is_refused():
    with pytest.raises(REFUSED):
        run(convolution(), x=torch.ones(1, 4, 5, 5, dtype=torch.float64))


def test_a_second_input_of_another_shape_is_refused():
    layer = Layer("BlockSparse", convolution().geometry, convolution().constants, has_onto=True)
    with pytest.raises(REFUSED, match="onto has another shape"):
        run(layer, x=torch.ones(1, 4, 5, 5), onto=torch.ones(8, 5, 5))


@pytest.mark.parametrize("lanes", [0, 1, 2])
def test_an_image_without_columns_gives_the_bias(lanes):
    layer = convolution().with_number(6, 2).with_number(11, lanes)  # padded by two columns on each side
    y = run(layer, x=torch.ones(2, 4, 5, 0))
    bias = torch.from_numpy(layer.constants["bias"]).view(1, 8, 1, 1)
    assert torch.equal(y, bias.expand(2, 8, 5, 2))


def test_a_conv1d_has_a_kernel_of_one_row():
    geometry = Geometry(8, 1, 3, n_in=4, rows=4, cols=4)
    layer = layer_of(BlockSparse(pack(single(0, 8, 12), 4, 4), None, geometry, 2))
    assert run(layer, x=torch.ones(1, 4, 9)).shape == (1, 8, 7)
    for place, number in ((1, 3), (3, 2), (5, 1)):
        with pytest.raises(REFUSED, match="a kernel of several rows"):
            session(layer.with_number(place, number).model())


NUMBERS = [
    *((0, 0), (0, 9), (0, 1 << 40), (1, 0), (1, 1 << 16), (3, 0), (3, -1), (5, -1), (7, 3), (8, 3), (9, 2), (10, 2)),
    *((11, 3), (12, 3), (12, 1 << 62), (13, 0), (13, 4)),
]


@pytest.mark.parametrize(("place", "number"), NUMBERS)
def test_a_geometry_that_does_not_fit_is_refused(place, number):
    with pytest.raises(REFUSED, match=r"geometry|starts|columns|weights|bias"):
        session(convolution().with_number(place, number).model())


def test_a_geometry_of_another_length_is_refused():
    layer = convolution()
    with pytest.raises(REFUSED, match="geometry has 13 numbers, where 14 are needed"):
        session(Layer(layer.kind, layer.geometry[:-1], layer.constants).model())


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("starts", lambda a: a[:-1], "starts does not fit"),
        ("starts", lambda a: a + 1, "starts does not fit"),
        ("starts", lambda a: np.array([0, 99, 18], np.int32), "starts does not grow"),
        ("starts", lambda a: np.array([0, 9, 2**31 - 1], np.int32), "columns has"),
        ("columns", lambda a: a + np.int16(1), "columns has a block outside"),
        ("columns", lambda a: -a - np.int16(1), "columns has a block outside"),
        ("columns", lambda a: a[1:], "columns has 17 numbers for 18"),
        ("weights", lambda a: a[:-1], "weights does not fit"),
        ("bias", lambda a: a[:-1], "bias does not fit"),
    ],
)
def test_constants_that_do_not_fit_are_refused(name, change, why):
    layer = convolution()
    with pytest.raises(REFUSED, match=why):
        session(layer.with_constant(name, change(layer.constants[name])).model())


def test_weights_that_are_no_constants_are_refused():
    layer = convolution()
    with pytest.raises(REFUSED, match="weights is no constant"):
        session(Layer(layer.kind, layer.geometry, layer.constants, open_inputs=("weights",)).model())
    given = session(Layer(layer.kind, layer.geometry, layer.constants, open_inputs=("bias",)).model())
    with pytest.raises(REFUSED, match="bias is no constant"):
        given.run(None, {"x": np.ones((1, 4, 5, 5), np.float32), "bias": layer.constants["bias"]})


def test_a_level_that_this_machine_does_not_have_is_refused():
    with at_level("avx9000"), pytest.raises(REFUSED, match="MUWS_LEVEL=avx9000 is not allowed here"):
        session(convolution().model())


def test_an_onnx_runtime_that_is_too_old_gets_an_error():
    """A table of functions without version 17: only the first function of the first version is asked for."""
    said = []
    create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(lambda code, why: said.append(why) or 1)
    table = (ctypes.c_void_p * 1)(ctypes.cast(create, ctypes.c_void_p).value)
    find = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(lambda v: ctypes.addressof(table) if v == 1 else None)
    base = (ctypes.c_void_p * 2)(ctypes.cast(find, ctypes.c_void_p).value, None)
    register = ctypes.CDLL(library.library()._name).RegisterCustomOps
    register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
    assert register(None, ctypes.addressof(base)) == 1
    assert said == [b"lightning_muws needs ONNX Runtime 1.17 or newer"]


@pytest.mark.slow
def test_damaged_files_never_crash():
    """In another process, which would die of a write past an end."""
    fuzz = Path(__file__).parents[1] / "support" / "fuzz_onnx.py"
    done = subprocess.run(  # noqa: S603  our own code
        [sys.executable, str(fuzz), "300"], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    refused, ran = map(int, done.stdout.split())
    assert refused + ran == 300
    assert refused > 150
    assert ran > 10
