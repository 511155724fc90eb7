"""The small steps of a program against torch in float64, on every level, for any width."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_muws.errors import StateError
from lightning_muws.runtime.kernels.native_int8 import Activation, build_static
from lightning_muws.runtime.native import library
from lightning_muws.runtime.native.program import Program
from lightning_muws.runtime.native.steps import Affine, Call, Norm, Simple
from lightning_muws.runtime.native.views import target
from tests.support.strategies import normal

LEVELS = library.levels()
ULP = 2.0**-23
NAN, INF = float("nan"), float("inf")
SPECIAL = [0.0, -0.0, 1e-42, -1e-38, 5.5999, -5.5999, 5.6, -5.6, 5.61, -12.0, 87.5, -88.9, 3e38, -3e38, INF, -INF, NAN]
pytestmark = pytest.mark.skipif(library.level() is None, reason="the native kernels are not built")


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(params=LEVELS)
def level(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MUWS_LEVEL", request.param)
        yield request.param


def run(operation, *inputs):
    """Return the output of a program of one step."""
    program = Program([Call(operation, tuple(range(len(inputs))))], [tuple(x.shape) for x in inputs], [len(inputs)])
    (y,) = program([x.contiguous() for x in inputs])
    return y


def f32(seed, *shape):
    return normal(seed, *shape, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["none", "tanh"])
def test_gelu_is_within_four_units_in_the_last_place_of_its_input(kind, level):
    wide = torch.linspace(-13, 13, 40_001)
    x = torch.cat([wide, wide * 1e-3, torch.logspace(-30, 30, 999), -torch.logspace(-30, 30, 999)])
    y = run(Simple("gelu" if kind == "none" else "gelu_tanh"), x)
    want = F.gelu(x.double(), approximate=kind)
    assert ((y.double() - want).abs() <= 4 * ULP * x.double().abs()).all()
    assert ((y.double() - want).abs() <= 6 * ULP * want.abs())[x > 0].all()


@pytest.mark.parametrize("kind", ["none", "tanh"])
@pytest.mark.parametrize("n", [1, 3, 16, 17, 40])
def test_gelu_of_nan_and_infinity_is_that_of_torch(kind, n, level):
    x = torch.tensor(SPECIAL).repeat(n)
    y = run(Simple("gelu" if kind == "none" else "gelu_tanh"), x)
    want = F.gelu(x.double(), approximate=kind).float()  # in float32, torch makes NaN of 3e38 and of infinity
    assert torch.equal(y.isnan(), want.isnan())
    finite = x.isfinite()
    assert torch.equal(y[x == INF], want[x == INF])
    assert ((y - want).abs() <= 4 * ULP * x.abs())[finite].all()


def norm_of(width, seed, has_weight=True, has_bias=True, epsilon=1e-5):
    weight, bias = f32(seed, width), f32(seed + 1, width)
    return Norm(Affine(weight if has_weight else None, bias if has_bias else None), width, epsilon)


def layer_norm(x, norm):
    """Return LayerNorm in float64, and the size of its terms."""
    weight, bias = (None if t is None else t.double() for t in norm.tensors)
    plain = F.layer_norm(x.double(), (norm.width,), None, None, norm.epsilon)
    size = plain.abs().amax(-1, keepdim=True) * (1.0 if weight is None else weight.abs())
    return F.layer_norm(x.double(), (norm.width,), weight, bias, norm.epsilon), size + (
        0 if bias is None else bias.abs()
    )


def test_layer_norm_is_within_some_units_in_the_last_place(level):
    @given(
        st.integers(1, 90), st.integers(1, 40), st.sampled_from([1e-12, 1e-3, 1.0, 1e3, 1e9]),
        st.sampled_from([0.0, 1.0, -1e3]), st.booleans(), st.booleans(), st.integers(0, 99),
    )  # fmt: skip
    def law(width, rows, size, shift, has_weight, has_bias, seed):
        norm = norm_of(width, seed, has_weight, has_bias)
        x = size * (f32(seed + 2, rows, width) + shift)
        want, sizes = layer_norm(x, norm)
        assert ((run(norm, x).double() - want).abs() <= 16 * ULP * sizes).all()

    law()


@pytest.mark.parametrize("width", [1, 5, 16, 63, 768])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e4, 3e9])
def test_layer_norm_of_a_constant_row_is_its_bias(width, value, level):
    norm = norm_of(width, 0)
    y = run(norm, torch.full((3, width), value))
    assert ((y - norm.tensors.bias).abs() <= 4 * ULP * abs(value) * norm.tensors.weight.abs() + ULP).all()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_layer_norm_of_a_row_with_nan_or_infinity_is_nan(bad, level):
    norm, x = norm_of(37, 0), f32(1, 4, 37)
    x[2, 35] = bad
    y = run(norm, x)
    assert torch.equal(y.isnan(), F.layer_norm(x, (37,), *norm.tensors).isnan())
    assert y[2].isnan().all()


def attention_error(q, k, v, y, scale=None):
    """Return the error of attention, relative to the largest value and to the size of the scores' terms."""
    q, k, v = q.double(), k.double(), v.double()
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    terms = (q.abs() @ k.abs().mT).amax() * abs(factor)
    return float(
        (y.double() - F.scaled_dot_product_attention(q, k, v, scale=scale)).abs().max() / v.abs().max() / (4 + terms)
    )


def test_attention_is_that_of_torch(level):
    @given(
        st.integers(1, 3), st.integers(1, 3), st.integers(1, 37), st.integers(1, 90), st.integers(1, 37),
        st.integers(1, 70), st.sampled_from([0.01, 1.0, 30.0]), st.sampled_from([None, 0.3]), st.integers(0, 99),
    )  # fmt: skip
    def law(n, heads, t, s, d, w, size, scale, seed):
        q, k, v = size * f32(seed, n, heads, t, d), f32(seed + 1, n, heads, s, d), f32(seed + 2, n, heads, s, w)
        y = run(Simple("attention", (), 0.0 if scale is None else scale), q, k, v)
        assert attention_error(q, k, v, y, scale) <= 4 * ULP

    law()


def test_attention_takes_extreme_scores(level):
    q, k, v = f32(0, 1, 2, 5, 8), f32(1, 1, 2, 21, 8), f32(2, 1, 2, 21, 8)
    for size in (1e4, -1e4, 1e6):
        y = run(Simple("attention"), size * q, k, v)
        assert attention_error(size * q, k, v, y) <= 4 * ULP
    assert torch.equal(run(Simple("attention"), 0 * q, k, v).isfinite(), torch.ones(1, 2, 5, 8, dtype=torch.bool))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_attention_passes_nan_on_as_torch_does(place, bad, level):
    inputs = [f32(0, 2, 2, 5, 8), f32(1, 2, 2, 21, 8), f32(2, 2, 2, 21, 8)]
    inputs[place][1, 0, 3, 4] = bad
    y, want = run(Simple("attention"), *inputs), F.scaled_dot_product_attention(*(x.double() for x in inputs)).float()
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_max_pooling_is_that_of_torch_bit_for_bit(level):
    @given(
        st.tuples(*[st.integers(1, 4)] * 4), st.tuples(st.integers(0, 2), st.integers(0, 2)),
        st.integers(1, 3), st.integers(1, 4), st.integers(0, 40), st.integers(0, 70), st.booleans(), st.integers(0, 99),
    )  # fmt: skip
    def law(window, border, n, c, h, w, has_nan, seed):
        kh, kw, sh, sw = window
        ph, pw = min(border[0], kh // 2), min(border[1], kw // 2)
        x = f32(seed, n, c, h + kh, w + kw)
        if has_nan:
            x.view(-1)[:: 7 + seed] = NAN
            x.view(-1)[3 :: 11 + seed] = -INF
        y = run(Simple("pool", (kh, kw, sh, sw, ph, pw)), x)
        assert torch.equal(y.nan_to_num(9e9), F.max_pool2d(x, (kh, kw), (sh, sw), (ph, pw)).nan_to_num(9e9))

    law()


VIEWS = [
    (Simple("transpose", (-1, 1)), lambda x: x.transpose(-1, 1)),
    (Simple("permute", (2, 0, 1)), lambda x: x.permute(2, 0, 1)),
    (Simple("unflatten", (-1, 2, -1)), lambda x: x.unflatten(-1, (2, -1))),
    (Simple("flatten", (0, 1)), lambda x: x.flatten(0, 1)),
    (Simple("flatten", (1, -1)), lambda x: x.flatten(1, -1)),
    (Simple("select", (1, -2)), lambda x: x.select(1, -2)),
    (Simple("chunk", (2, -1, 1)), lambda x: x.chunk(2, -1)[1]),
    (Simple("reshape", (0, 0, 1, 2, -1, 0, -1, 1)), lambda x: x.reshape(x.shape[0] // 2, -1)),
]


@given(st.lists(st.sampled_from(VIEWS), min_size=1, max_size=4), st.tuples(*[st.integers(1, 9)] * 3), st.booleans())
def test_views_are_those_of_torch(views, sizes, squares):
    x = f32(0, *sizes)
    calls, y = [], x
    for i, (operation, in_torch) in enumerate(views):
        try:
            y = in_torch(y)
        except (RuntimeError, IndexError):  # it has other dimensions
            with pytest.raises(StateError, match="does not fit"):
                Program([*calls, Call(operation, (i,))], [sizes], [i + 1])
            return
        calls.append(Call(operation, (i,)))
    if squares:  # a step that reads numbers in order
        calls.append(Call(Simple("add"), (len(views), len(views))))
        y = y + y
    if 0 in y.shape:
        return
    (got,) = Program(calls, [sizes], [len(calls)])([x])
    assert torch.equal(got, y)


def test_a_view_of_an_input_is_returned_as_a_copy():
    x = f32(0, 3, 4)
    one, two = Program([Call(Simple("flatten", (0, 1)), (0,))], [(3, 4)], [1, 1])([x])
    assert torch.equal(one, x.flatten())
    assert len({x.data_ptr(), one.data_ptr(), two.data_ptr()}) == 3


def test_sizes_are_computed_from_those_of_the_inputs():
    assert target((0, 0, 1, 1, 0, 1, 1, 1, -1, 0, 3, 1, 0, 2, 1, 6), [(2, 5, 24)]) == (2, 5, 3, 4)


@pytest.mark.parametrize("shapes", [[(0, 3)], [(2, 0)]])
def test_values_without_numbers_are_refused(shapes):
    with pytest.raises(StateError, match="without numbers"):
        Program([Call(Simple("gelu"), (0,))], shapes, [1])


def test_steps_that_do_not_fit_are_refused():
    with pytest.raises(StateError, match="LayerNorm of 4"):
        Program([Call(norm_of(4, 0), (0,))], [(2, 5)], [1])
    with pytest.raises(StateError, match="attention does not take"):
        Program([Call(Simple("attention"), (0, 1, 1))], [(1, 2, 3, 4), (1, 2, 3, 5)], [2])
    with pytest.raises(StateError, match="up to 6 dimensions"):
        Program([Call(Simple("permute", (6, 5, 4, 3, 2, 1, 0)), (0,))], [(2,) * 7], [1])


MAKERS = [
    ("gelu", Simple("gelu"), 1),
    ("gelu_tanh", Simple("gelu_tanh"), 1),
    ("relu", Simple("relu"), 1),
    ("add", Simple("add"), 2),
    ("norm", norm_of(21, 3), 1),
]


@pytest.mark.parametrize(("operation", "n"), [(o, n) for _, o, n in MAKERS], ids=[name for name, _, _ in MAKERS])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_a_step_makes_the_bytes_that_the_next_layer_would_make(operation, n, rows, level):
    inputs = [2 * f32(i, rows, 21) for i in range(n)]
    layer = build_static(nn.Linear(21, 9), inputs[0], Activation.of(-1.0, 1.5))  # some saturate
    calls = [Call(operation, tuple(range(n))), Call(layer.step(21), (n,))]
    shapes = [(rows, 21)] * n
    with_bytes, with_numbers = Program(calls, shapes, [n + 1]), Program(calls, shapes, [n, n + 1])
    assert with_bytes.n_bytes < with_numbers.n_bytes + 4 * rows * 21
    (y,), (between, z) = with_bytes(inputs), with_numbers(inputs)
    assert torch.equal(y, z)
    assert torch.equal(y, layer(between))
    inputs[0][-1, -1] = NAN
    assert with_bytes(inputs) is None  # bytes cannot hold it


def test_attention_and_pooling_make_bytes_too(level):
    q, k, v = f32(0, 2, 3, 9, 8), f32(1, 2, 3, 5, 8), f32(2, 2, 3, 5, 7)
    layer = build_static(nn.Linear(21, 9), f32(3, 2, 9, 21), Activation.of(-1.0, 0.5))
    calls = [
        Call(Simple("attention"), (0, 1, 2)),
        Call(Simple("transpose", (1, 2)), (3,)),
        Call(Simple("flatten", (2, 3)), (4,)),
    ]
    (y,) = Program([*calls, Call(layer.step(21), (5,))], [q.shape, k.shape, v.shape], [6])([q, k, v])
    (given_x,) = Program(calls, [q.shape, k.shape, v.shape], [5])([q, k, v])
    assert torch.equal(y, layer(given_x))
    x = f32(4, 2, 4, 13, 18)
    conv = build_static(nn.Conv2d(4, 5, 3), f32(3, 2, 4, 6, 9), Activation.of(-1.0, 1.0))
    pool = Call(Simple("pool", (3, 3, 2, 2, 1, 1)), (0,))
    (y,) = Program([pool, Call(conv.step(4), (1,))], [x.shape], [2])([x])
    assert torch.equal(y, conv(F.max_pool2d(x, 3, 2, 1)))


def test_threads_agree_bit_for_bit(level):
    q, k, v = f32(0, 1, 2, 33, 16), f32(1, 1, 2, 70, 16), f32(2, 1, 2, 70, 16)
    x, wide = f32(3, 700, 40), f32(4, 40, 3000)
    steps = [
        (Simple("attention"), (q, k, v)), (norm_of(40, 0), (x,)), (Simple("gelu"), (wide,)),
        (Simple("pool", (3, 3, 2, 2, 1, 1)), (wide.view(1, 40, 50, 60),)),
    ]  # fmt: skip
    before = torch.get_num_threads()
    alone = [run(operation, *inputs) for operation, inputs in steps]
    try:
        torch.set_num_threads(3)
        together = [run(operation, *inputs) for operation, inputs in steps]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_math_is_not_needed_for_a_long_row(level):
    """A row longer than a task's numbers, and keys longer than the scratch's first lines."""
    x = f32(0, 2, 9001)
    want, sizes = layer_norm(x, norm := norm_of(9001, 0))
    assert ((run(norm, x).double() - want).abs() <= 16 * ULP * sizes).all()
    q, k, v = f32(1, 1, 1, 3, 64), f32(2, 1, 1, 1500, 64), f32(3, 1, 1, 1500, 64)
    assert attention_error(q, k, v, run(Simple("attention"), q, k, v)) <= 4 * ULP
    assert math.isfinite(float(want.sum()))
