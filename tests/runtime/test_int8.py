"""The kernels of 8 bits equal whole-number arithmetic, on every level of this CPU; skipped where they are not built."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_muws.errors import StateError
from lightning_muws.runtime.kernels import native_int8
from lightning_muws.runtime.kernels.base import matrix_of
from lightning_muws.runtime.kernels.native_int8 import Activation, Int8Sparse, assemble, build_static
from lightning_muws.runtime.native import library
from lightning_muws.runtime.native.quantize import choose_rows, pack8, quantized
from tests.runtime.test_native import layers, pruned
from tests.support.strategies import normal

pytestmark = pytest.mark.skipif(library.level() is None, reason="the native kernels are not built")
LEVELS = library.levels()


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture
def at_level(monkeypatch):
    return lambda name: monkeypatch.setenv("MUWS_LEVEL", name)


def rounded(x: Tensor, inverse: Tensor, zero: Tensor) -> Tensor:
    """Return ``q - zero`` in float64: whole numbers from -255 to 255."""
    shifted = (x * inverse).clamp(-zero, 255 - zero).round()  # in float32, as the kernel does
    return shifted.double()


def exact(layer: nn.Module, x: Tensor, activation: Activation | None, relu: bool, onto: Tensor | None = None) -> Tensor:
    """Return the layer by sums of whole numbers, which float64 holds exactly, then scaled as float32 does."""
    weights = quantized(matrix_of(layer))
    if activation is None:
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = high / 255 - low / 255
        scale[scale < torch.finfo(torch.float32).tiny] = 0
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        zero = (-low * inverse).clamp(max=255).round()
    else:
        scale, zero = torch.tensor(activation.scale), torch.tensor(float(activation.zero))
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
    whole = copy.deepcopy(layer).double()
    whole.weight.data = weights.whole.double().view_as(layer.weight)
    if layer.bias is not None:
        whole.bias.data.zero_()
    sums = whole(rounded(x, inverse, zero)).float()
    axis = {nn.Linear: -1, nn.Conv1d: -2, nn.Conv2d: -3}[type(layer)]
    shape = [1] * sums.dim()
    shape[axis] = -1
    y = sums.double() * (scale * weights.scales.view(shape)).double()
    if layer.bias is not None:
        y = y + layer.bias.double().view(shape)
    y = y if onto is None else y.float().double() + onto
    return y.relu() if relu else y


def assert_exact(y: Tensor, want: Tensor) -> None:
    """Check that only the last roundings differ, of which there are two: product and bias may be one instruction."""
    assert y.shape == want.shape
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), want, rtol=3e-7, atol=float(want.abs().max()) * 3e-7 if y.numel() else 0)


def variant(layer: nn.Module, rows: int, loose: bool, activation: Activation | None) -> Int8Sparse:
    return assemble(layer, pack8(quantized(matrix_of(layer)), rows, loose), activation)


def activation_of(x: Tensor, share: float = 1.0) -> Activation:
    """Return the rounding for a share of the range of ``x``: what is outside saturates."""
    return Activation.of(float(x.min()) * share, float(x.max()) * share) if x.numel() else Activation(0.0, 0)


def test_a_product_one_can_do_by_hand():
    layer = nn.Linear(4, 2)
    layer.weight.data = torch.tensor([[127.0, 2.0, 0.0, 0.0], [0.0, -127.0, 0.0, 0.0]])
    layer.bias.data = torch.tensor([10.0, 0.0])
    x = torch.tensor([[1.0, 2.0, 3.0, 300.0]])
    fast = build_static(layer, x, Activation.of(-1.0, 254.0))
    assert fast(x).tolist() == [[127.0 + 4.0 + 10.0, -254.0]]
    assert fast.with_relu()(x).tolist() == [[141.0, 0.0]]


@pytest.mark.parametrize("name", LEVELS)
def test_equals_whole_numbers_over_all_layers(name, at_level):
    at_level(name)

    @given(layers(), st.booleans(), st.sampled_from([0.0, 0.3, 1.0]))
    def law(case, relu, share):
        layer, x, _ = case
        roundings = [activation_of(x, share)] + ([None] if isinstance(layer, nn.Linear) else [])
        for activation in roundings:
            want = exact(layer, x, activation, relu)
            per_group = len(layer.weight) // getattr(layer, "groups", 1)
            for rows in (1, 2, 4):
                if getattr(layer, "groups", 1) > 1 and per_group % rows:
                    continue
                for loose in (False, True):
                    fast = variant(layer, rows, loose, activation)
                    assert_exact((fast.with_relu() if relu else fast)(x), want)

    law()


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("batch", [1, 2, 15, 16, 31, 64, 257])
def test_equals_whole_numbers_at_any_batch(name, batch, at_level):
    at_level(name)
    for layer, shape in (
        (nn.Linear(50, 33), (batch, 50)),
        (nn.Conv2d(5, 9, 3, padding=1), (batch, 5, 7, 7)),
        (nn.Conv2d(8, 8, 1), (batch, 8, 5, 4)),
        (nn.Conv2d(4, 6, 3, 2, 1), (batch, 4, 9, 17)),
    ):
        x = normal(batch, *shape, dtype=torch.float32)
        pruned(layer, (4, 4), 0.5)
        for loose in (False, True):
            assert_exact(variant(layer, 4, loose, activation_of(x))(x), exact(layer, x, activation_of(x), relu=False))


@pytest.mark.parametrize("size", [(4, 4), (7, 7), (16, 16), (31, 33), (3, 130), (64, 160)])
def test_equals_whole_numbers_at_any_image(size):
    """The last has more planes than an item may hold: it is cut into bands."""
    layer = pruned(nn.Conv2d(24, 16, 3, padding=1), (4, 4), 0.7)
    x = normal(0, 3, 24, *size, dtype=torch.float32)
    for loose in (False, True):
        assert_exact(variant(layer, 4, loose, activation_of(x))(x), exact(layer, x, activation_of(x), relu=False))


@pytest.mark.parametrize("name", LEVELS)
def test_threads_give_the_bits_of_one(name, at_level):
    at_level(name)
    before = torch.get_num_threads()
    cases = [
        (nn.Linear(64, 300), (1, 64)),
        (nn.Linear(64, 300), (200, 64)),
        (nn.Conv2d(8, 36, 3, padding=1), (1, 8, 40, 33)),
        (nn.Conv2d(8, 12, 5, 3, 2), (2, 8, 50, 50)),
        (nn.Conv2d(8, 36, 3, padding=1), (40, 8, 5, 5)),
    ]
    try:
        for layer, shape in cases:
            x = normal(0, *shape, dtype=torch.float32)
            fast = variant(pruned(layer, (4, 4), 0.5), 4, False, activation_of(x))
            torch.set_num_threads(1)
            once = fast(x)
            for threads in (2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(fast(x), once)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", LEVELS)
def test_the_largest_sums_do_not_overflow(name, at_level):
    """Every product is the largest, of either sign; an instruction that saturates sums of two would stop at 32,767."""
    at_level(name)
    layer = nn.Linear(65536, 8, bias=False)
    layer.weight.data.fill_(1.0)
    layer.weight.data[1::2] = -1.0
    for value, activation in ((255.0, Activation.of(0.0, 255.0)), (-255.0, Activation.of(-255.0, 0.0))):
        for batch in (1, 20):
            x = torch.full((batch, 65536), value)
            want = value * 65536.0 * layer.weight[:, 0]
            for loose in (False, True):
                y = variant(layer, 4, loose, activation)(x)
                torch.testing.assert_close(y, want.expand(batch, 8), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", LEVELS)
def test_extreme_inputs_saturate(name, at_level):
    at_level(name)
    layer, activation = nn.Conv2d(4, 4, 1, bias=False), Activation.of(-1.0, 2.0)
    layer.weight.data.copy_(torch.eye(4)[:, :, None, None])
    x = torch.tensor([1e30, -1e30, 1.0, 0.0]).view(1, 4, 1, 1).expand(1, 4, 3, 5)
    y = build_static(layer, x, activation)(x)
    low, high = activation.scale * (0 - activation.zero), activation.scale * (255 - activation.zero)
    assert_exact(y[0, :, 1, 2], torch.tensor([high, low, 1.0, 0.0]).double())


def test_a_range_of_zero_and_equal_channels():
    layer = pruned(nn.Linear(12, 8), (4, 4), 0.5)
    for activation in (None, Activation(0.0, 0)):
        for batch in (1, 20):
            y = variant(layer, 4, False, activation)(torch.zeros(batch, 12))
            assert torch.equal(y, layer.bias.expand(batch, 8))
    for value in (3.0, -3.0, 1e-41):
        x = torch.full((20, 12), value)
        assert_exact(variant(layer, 4, False, None)(x), exact(layer, x, None, relu=False))


def test_a_row_of_zeros_or_of_tiny_weights_has_a_scale():
    found = quantized(torch.tensor([[0.0, 0.0], [1e-45, -1e-45], [1.0, -3e38]]))
    assert found.scales.tolist()[:2] == [1.0, 1.0]
    assert found.whole.tolist() == [[0, 0], [0, 0], [0, -127]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", LEVELS)
def test_no_number_comes_out_where_nan_or_infinity_goes_in(name, bad, at_level):
    at_level(name)
    layer = pruned(nn.Linear(9, 8), (4, 4), 0.0)
    for batch in (1, 3, 40):
        x = normal(0, batch, 9, dtype=torch.float32)
        clean = x.clone()
        x[0, 5] = bad
        for activation in (None, activation_of(clean)):
            y = variant(layer, 4, False, activation)(x)
            assert y[0].isnan().all()
            assert_exact(y[1:], exact(layer, clean, activation, relu=False)[1:])
    conv = pruned(nn.Conv2d(5, 8, 3, 2, 1), (4, 4), 0.0)
    x = normal(0, 2, 5, 9, 11, dtype=torch.float32)
    want = exact(conv, x, activation_of(x), relu=True)
    fast = variant(conv, 4, False, activation_of(x)).with_relu()
    x[1, 3, 4, 6] = bad
    y = fast(x)
    assert y[1, :, 2].isnan().all()  # rows 3, 4 and 5 of the image
    y[1, :, 2] = want[1, :, 2].float()
    assert_exact(y, want)


@pytest.mark.parametrize("activation", ["dynamic", "static"])
def test_adds_onto_before_relu(activation):
    for layer, shape in (
        (nn.Linear(20, 13), (1, 20)),
        (nn.Linear(20, 16), (33, 20)),
        (nn.Linear(20, 16), (2, 3, 20)),
        (nn.Conv2d(5, 9, 3, padding=1), (2, 5, 7, 7)),
        (nn.Conv2d(5, 8, 3, padding=1), (1, 5, 16, 16)),
        (nn.Conv2d(5, 8, 3, padding=1), (5, 16, 16)),
        (nn.Conv1d(5, 8, 3, padding=1), (2, 5, 16)),
    ):
        if activation == "dynamic" and not isinstance(layer, nn.Linear):
            continue
        x = normal(0, *shape, dtype=torch.float32)
        rounding = None if activation == "dynamic" else activation_of(x)
        fast = variant(pruned(layer, (4, 4), 0.4), 4, False, rounding).with_relu()
        onto = normal(1, *layer(x).shape, dtype=torch.float32)
        want = exact(layer, x, rounding, relu=True, onto=onto)
        before = onto.clone()
        assert_exact(fast(x, onto), want)
        turned = onto.transpose(0, -1).contiguous().transpose(0, -1)
        assert_exact(fast(x, turned), want)
        assert torch.equal(onto, before)


def test_blocks_of_four_by_four_and_four_by_one_leave_no_byte_empty():
    for block_shape, loose in (((4, 4), False), ((4, 1), True)):
        matrix = matrix_of(pruned(nn.Linear(256, 64), block_shape, 0.75))
        rows, found = choose_rows(matrix, 64)
        packed = pack8(quantized(matrix), rows, found)
        assert (rows, found) == (4, loose)
        empty = int((packed.weights == 0).sum()) - int((quantized(matrix).whole[matrix != 0] == 0).sum())
        assert empty <= (4 * 3 * 16 if loose else 0)  # at most three columns of each of the sixteen block rows


def test_compile_and_export_see_one_node_a_layer():
    conv, linear = pruned(nn.Conv2d(4, 8, 3, padding=1), (4, 4), 0.5), pruned(nn.Linear(8, 12), (4, 4), 0.5)
    x = normal(0, 2, 4, 3, 3, dtype=torch.float32)
    first = variant(conv, 4, False, activation_of(x)).with_relu()
    net = nn.Sequential(first, nn.AvgPool2d(3), nn.Flatten(), variant(linear, 4, True, None)).eval()
    want, graphs = net(x), []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        assert torch.equal(torch.compile(net, backend=backend, fullgraph=True)(x), want)
        exported = torch.export.export(net, (x,))
    assert torch.equal(exported.module()(x), want)
    for graph in (graphs[0].graph, exported.graph):
        assert len([node for node in graph.nodes if "int8_sparse" in str(node.target)]) == 2


def test_the_operator_obeys_torchs_own_checks():
    conv = pruned(nn.Conv2d(4, 8, 3, padding=1), (4, 4), 0.5)
    x = normal(0, 16, 4, 3, 3, dtype=torch.float32)
    fast = variant(conv, 4, False, activation_of(x))
    with torch.inference_mode(False):
        plain = [None if t is None else t.clone() for t in fast._blocks()]
        torch.library.opcheck(
            torch.ops.lightning_muws.int8_sparse.default,
            (x.clone(), *plain, list(fast.geometry)),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_pickle_copy_and_state_dict_keep_the_layer():
    layer = pruned(nn.Conv2d(4, 8, 3, padding=1), (4, 1), 0.5)
    x = normal(0, 3, 4, 5, 5, dtype=torch.float32)
    fast = variant(layer, 4, True, activation_of(x))
    once = fast(x)
    again = pickle.loads(pickle.dumps(fast))  # noqa: S301  our own bytes
    assert torch.equal(again(x), once)
    assert torch.equal(copy.deepcopy(fast)(x), once)
    file = io.BytesIO()
    torch.save(fast.state_dict(), file)
    file.seek(0)
    again.weights.zero_()
    again.activation.mul_(2)
    assert not torch.equal(again(x), once)
    nn.Sequential(again).load_state_dict({f"0.{name}": value for name, value in torch.load(file).items()})
    assert torch.equal(again(x), once)


def test_a_convolution_is_not_built_from_one_example():
    conv, x = nn.Conv2d(4, 8, 3), torch.zeros(1, 4, 5, 5)
    assert native_int8.build(conv, (4, 4), x) is None
    assert native_int8.build(nn.Linear(4, 8), (4, 4), torch.zeros(1, 4)) is not None
    broken = nn.Linear(4, 8)
    broken.weight.data[0, 0] = float("nan")
    assert native_int8.build(broken, (4, 4), torch.zeros(1, 4)) is None
    assert build_static(nn.Conv2d(4, 8, 3, dilation=2), x, Activation.of(0, 1)) is None


def test_refusals(at_level):
    fast = native_int8.build(nn.Linear(4, 8), (4, 4), torch.zeros(1, 4))
    with pytest.raises(StateError, match=r"computes in float32 on the CPU; got torch.float64 on cpu"):
        fast(torch.zeros(1, 4, dtype=torch.float64))
    with torch.inference_mode(False), torch.enable_grad(), pytest.raises(StateError, match="has no gradient"):
        fast(torch.zeros(1, 4, requires_grad=True))
    at_level("none")
    assert native_int8.build(nn.Linear(4, 8), (4, 4), torch.zeros(1, 4)) is None
    with pytest.raises(StateError, match="needs the native kernels"):
        copy.deepcopy(fast)(torch.zeros(2, 4))
