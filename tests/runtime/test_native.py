"""The native kernels equal the dense layer in float64, on every level of this CPU; skipped where they are not built."""

import copy
import ctypes
import io
import mmap
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from lightning_muws.errors import SettingError, StateError
from lightning_muws.runtime.kernels import native, native_int8, signs
from lightning_muws.runtime.kernels.base import Kernel, bias_of, matrix_of
from lightning_muws.runtime.kernels.native import BlockSparse
from lightning_muws.runtime.native import library
from lightning_muws.runtime.native.packing import choose_block, pack, pack_pairs
from lightning_muws.runtime.native.plan import Geometry, batch_last_strides, is_batch_last
from lightning_muws.structure.micro import MicroStructure
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


def pruned(layer: nn.Module, block_shape: tuple[int, int], share: float, seed: int = 0) -> nn.Module:
    """Zero blocks of the layer at random, the edges that fill no block too, and leave one row of blocks empty."""
    (rows, cols), generator = block_shape, torch.Generator().manual_seed(seed)
    matrix = layer.weight.data.view(len(layer.weight), -1)
    matrix.copy_(torch.randn(matrix.shape, generator=generator) / matrix.shape[1] ** 0.5)
    n_out, n_in = matrix.shape
    keep = torch.rand(-(-n_out // rows), -(-n_in // cols), generator=generator) >= share
    keep[-1] = share == 0
    matrix.mul_(keep.repeat_interleave(rows, 0)[:n_out].repeat_interleave(cols, 1)[:, :n_in])
    if layer.bias is not None:
        layer.bias.data.copy_(torch.randn(n_out, generator=generator))
    return layer.eval()


def reference(layer: nn.Module, x: torch.Tensor, relu: bool = False) -> torch.Tensor:
    y = copy.deepcopy(layer).double()(x.double())
    return y.relu() if relu else y


def error(y: torch.Tensor, want: torch.Tensor, terms: float = 0.0) -> float:
    """Return the error relative to the largest output; of sums that may cancel, to an eighth of the sum of terms."""
    assert y.shape == want.shape
    return float((y - want).abs().max() / want.abs().max().clamp_min(max(1e-30, terms / 8))) if want.numel() else 0.0


def terms_of(layer: nn.Module, x: torch.Tensor) -> float:
    """Return the largest sum of the sizes of an output's terms."""
    sizes = copy.deepcopy(layer).requires_grad_(False)
    for parameter in sizes.parameters():
        parameter.abs_()
    y = reference(sizes, x.abs())
    return float(y.max()) if y.numel() else 0.0


def ended(kernel: Kernel, relu: bool) -> Kernel:
    """Return the kernel, with ReLU at its end if asked for."""
    return kernel.with_relu() if relu else kernel


def variant(layer: nn.Module, x: torch.Tensor, relu: bool = False, halves: bool = False, **changes: int) -> BlockSparse:
    """Return the layer packed as told rather than as is fastest."""
    assert native.is_native(layer, x)
    geometry = native.geometry_of(layer)._replace(relu=int(relu))
    matrix, bias = matrix_of(layer), bias_of(layer)
    rows = changes.get("rows", 4)
    packed = pack_pairs(matrix, rows) if halves else pack(matrix, rows, changes.get("cols", 1))
    geometry = geometry._replace(**{"rows": rows, **changes, "cols": packed.cols, "bfloat16": int(halves)})
    return BlockSparse(packed, bias, geometry, {nn.Linear: 1, nn.Conv1d: 2, nn.Conv2d: 3}[type(layer)])


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor, tuple[int, int]]:
    """Return a layer with zeros, an input, and the block shape of the zeros."""
    block_shape = draw(st.sampled_from([(4, 4), (4, 1), (8, 8), (1, 8), (2, 2), (3, 5), (16, 4)]))
    batch, bias = draw(st.sampled_from([1, 2, 3, 7, 16, 17, 33])), draw(st.booleans())
    kind = draw(st.sampled_from(["linear", "conv1d", "conv2d"]))
    if kind == "linear":
        n_in, n_out = draw(st.integers(1, 70)), draw(st.integers(1, 40))
        layer, shape = nn.Linear(n_in, n_out, bias), (batch, n_in)
    else:
        groups = draw(st.sampled_from([1, 1, 2]))
        inputs, outputs = groups * draw(st.integers(1, 9)), groups * draw(st.integers(4, 13))
        n = 1 if kind == "conv1d" else 2
        sides = [draw(st.sampled_from([1, 2, 3, 5])) for _ in range(n)]
        strides = [draw(st.integers(1, 3)) for _ in range(n)]
        pads = [draw(st.integers(0, side + 1)) for side in sides]
        sizes = [draw(st.one_of(st.just(side), st.integers(side, 20))) for side in sides]
        make = nn.Conv1d if n == 1 else nn.Conv2d
        layer = make(inputs, outputs, tuple(sides), tuple(strides), tuple(pads), groups=groups, bias=bias)
        shape = (batch, inputs, *sizes)
    share, seed = draw(st.sampled_from([0.0, 0.5, 0.8, 1.0])), draw(st.integers(0, 10**6))
    return pruned(layer, block_shape, share, seed), normal(seed, *shape, dtype=torch.float32), block_shape


def test_a_product_one_can_do_by_hand():
    layer = nn.Linear(4, 2)
    layer.weight.data = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, -1.0, 0.0, 0.0]])
    layer.bias.data = torch.tensor([10.0, 0.0])
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    fast = native.build(layer, (2, 2), x).with_relu()
    assert fast(x).tolist() == [[15.0, 0.0]]
    assert len(fast.columns) == 2  # of the four columns of this block row two hold anything


@pytest.mark.parametrize("name", LEVELS)
def test_equals_float64_over_all_layers(name, at_level):
    at_level(name)

    @given(layers(), st.booleans())
    def law(case, relu):
        layer, x, block_shape = case
        want, terms = reference(layer, x, relu), terms_of(layer, x)
        fast = ended(native.build(layer, block_shape, x), relu)
        assert error(fast(x), want, terms) <= 1e-5
        for lanes in (0, 1, 2):
            for rows in (1, 2, 4, 8):
                if fast.geometry.groups == 1 or fast.geometry.out // fast.geometry.groups % rows == 0:
                    assert error(variant(layer, x, relu, rows=rows, batch_lanes=lanes)(x), want, terms) <= 1e-5

    law()


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("batch", [1, 2, 15, 16, 31, 64, 257])
def test_equals_float64_at_any_batch(name, batch, at_level):
    at_level(name)
    for layer, shape in (
        (nn.Linear(50, 33), (batch, 50)),
        (nn.Conv2d(5, 9, 3, padding=1), (batch, 5, 7, 7)),
        (nn.Conv2d(8, 8, 1), (batch, 8, 5, 4)),
        (nn.Conv2d(4, 6, 3, 2, 1), (batch, 4, 9, 17)),
    ):
        x = normal(batch, *shape, dtype=torch.float32)
        pruned(layer, (4, 4), 0.5)
        for lanes in (0, 1, 2):
            assert error(variant(layer, x, batch_lanes=lanes)(x), reference(layer, x)) <= 1e-5


@pytest.mark.parametrize("name", LEVELS)
def test_reads_nothing_that_another_layer_left_behind(at_level, name):
    """Rows are packed a few ahead of the tiles that read them, into scratch that is never cleared as a whole."""
    at_level(name)
    layer = pruned(nn.Conv2d(64, 8, 3, padding=1), (4, 4), 0.5)
    for width in range(15, 62):
        x, other = normal(0, 1, 64, 20, width, dtype=torch.float32), torch.full((1, 64, 20, width + 3), torch.nan)
        for cols in (1, 4):
            assert variant(layer, other, cols=cols)(other)[:, :, 1:-1, 1:-1].isnan().any()
            assert error(variant(layer, x, cols=cols)(x), reference(layer, x)) <= 1e-5


@pytest.mark.parametrize("size", [(4, 4), (7, 7), (16, 16), (31, 33), (56, 56), (3, 130)])
def test_equals_float64_at_any_image(size):
    layer = pruned(nn.Conv2d(12, 16, 3, padding=1), (4, 4), 0.7)
    x = normal(0, 18, 12, *size, dtype=torch.float32)
    for lanes in (0, 1, 2):
        assert error(variant(layer, x, cols=4, batch_lanes=lanes)(x), reference(layer, x)) <= 1e-5


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_groups_stay_apart_where_an_image_is_one_position(batch):
    layer = pruned(nn.Conv2d(8, 16, 1, groups=2), (4, 4), 0.3)
    x = normal(0, batch, 8, 1, 1, dtype=torch.float32)
    for lanes in (0, 1):
        assert error(variant(layer, x, cols=4, batch_lanes=lanes)(x), reference(layer, x)) <= 1e-5


def test_large_bands_are_cut():
    layer = pruned(nn.Conv2d(64, 8, 3, 2, 1), (4, 4), 0.9)
    x = normal(0, 16, 64, 96, 96, dtype=torch.float32)  # more scratch than a band may have
    for lanes in (0, 1, 2):
        assert error(variant(layer, x, cols=4, batch_lanes=lanes)(x), reference(layer, x)) <= 1e-5


@pytest.mark.skipif("avx512_bf16" not in LEVELS, reason="this CPU has no dot product of bfloat16")
@given(layers())
def test_bfloat16_equals_float64_of_rounded_numbers(case):
    layer, x, block_shape = case
    rounded, x16 = copy.deepcopy(layer), x.bfloat16().float()
    rounded.weight.data = layer.weight.data.bfloat16().float()
    want = reference(rounded, x16)
    rows, _ = choose_block(matrix_of(layer), block_shape, len(layer.weight) // getattr(layer, "groups", 1))
    for lanes in (0, 1, 2):
        assert error(variant(layer, x, halves=True, rows=rows, batch_lanes=lanes)(x), want) <= 1e-5


@pytest.mark.skipif("avx512_bf16" not in LEVELS, reason="this CPU has no dot product of bfloat16")
def test_bfloat16_keeps_nan_and_infinity():
    layer = pruned(nn.Linear(8, 4, bias=False), (4, 1), 0)
    x = torch.ones(16, 8)
    x[0, 0], x[1, 1], x[2, 2] = float("nan"), float("inf"), torch.finfo(torch.float32).max
    y = native.build_bfloat16(layer, (4, 1), x)(x)
    assert y[0].isnan().all()
    assert y[1:3].isinf().all()
    assert y[3:].isfinite().all()


@pytest.mark.skipif("avx512_bf16" not in LEVELS, reason="this CPU has no dot product of bfloat16")
def test_bfloat16_refuses_a_cpu_without_it(at_level):
    layer, x = pruned(nn.Linear(8, 4), (4, 1), 0), torch.ones(16, 8)
    fast = native.build_bfloat16(layer, (4, 1), x)
    at_level("avx512")
    assert native.build_bfloat16(layer, (4, 1), x) is None
    with pytest.raises(
        StateError, match=r"needs the level avx512_bf16; this machine uses avx512: call accelerate\(\) again here"
    ):
        copy.deepcopy(fast)(x)


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv1d(6, 8, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)])
def test_takes_every_layout_and_rank_the_dense_layer_takes(layer):
    pruned(layer, (2, 2), 0.5)
    shapes = {
        nn.Linear: [(6,), (3, 6), (2, 3, 6), (0, 6)],
        nn.Conv1d: [(6, 9), (2, 6, 9), (0, 6, 9)],
        nn.Conv2d: [(6, 4, 5), (3, 6, 4, 5), (0, 6, 4, 5)],
    }[type(layer)]
    fast = native.build(layer, (2, 2), torch.zeros(2, *shapes[0]))
    for shape in shapes:
        x = normal(1, *shape, dtype=torch.float32)
        wide = torch.stack([x, x + 1], -1)[..., 0]
        turned = x.transpose(0, -1).contiguous().transpose(0, -1)
        for given_x in (x, wide, turned):
            assert error(fast(given_x), reference(layer, x)) <= 1e-5


@pytest.mark.parametrize("batch", [2, 16, 33])
def test_images_side_by_side_come_back_side_by_side(batch):
    layer = pruned(nn.Conv2d(6, 8, 3, 2, 1), (4, 1), 0.5)
    x = normal(0, batch, 6, 9, 8, dtype=torch.float32)
    turned = torch.empty_strided(x.shape, batch_last_strides(x.shape)).copy_(x)
    fast = variant(layer, x, batch_lanes=1)
    assert fast(x).is_contiguous()
    assert is_batch_last(fast(turned))
    assert is_batch_last(variant(layer, x, batch_lanes=1, batch_last=1)(x))
    assert torch.equal(fast(turned), fast(x))


def test_zeros_are_skipped_and_not_multiplied():
    layer = nn.Linear(8, 4, bias=False)
    layer.weight.data.zero_()
    layer.weight.data[:, :4] = 1
    x = torch.full((1, 8), float("nan"))
    x[:, :4] = 2
    assert native.build(layer, (4, 4), x)(x).tolist() == [[8.0] * 4]


def unified(n_out: int, n_in: int, block_shape: tuple[int, int], prune: float, free: float) -> nn.Linear:
    rows, cols = block_shape
    layer = pruned(nn.Linear(n_in, n_out), block_shape, 0)
    blocks = layer.weight.data.view(n_out // rows, rows, n_in // cols, cols)
    magnitude = blocks.abs().mean((1, 3), keepdim=True)
    drawn = torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(2))
    signed = torch.where(blocks < 0, -magnitude, magnitude)
    blocks.copy_(torch.where(drawn < prune, 0, torch.where(drawn < prune + free, blocks, signed)))
    return layer


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("block_shape", [(4, 4), (4, 8), (8, 8), (16, 16), (8, 24)])
@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.5, 0.0), (0.4, 0.3)])
def test_signs_equal_float64(name, block_shape, shares, at_level):
    at_level(name)
    layer = unified(48, 5 * block_shape[1], block_shape, *shares)
    x = normal(0, 1, layer.in_features, dtype=torch.float32)
    for relu in (False, True):
        fast = ended(signs.build(layer, block_shape, x), relu)
        assert (fast.rest is None) == (shares[1] == 0)
        assert error(fast(x), reference(layer, x, relu)) <= 1e-5
    many = normal(1, 2, 3, layer.in_features, dtype=torch.float32)
    assert error(fast(many), reference(layer, many, relu=True)) <= 1e-5
    assert fast(many[:0]).shape == (0, 3, 48)


def test_signs_are_a_bit_a_weight():
    layer = unified(64, 64, (8, 8), 0, 0)
    fast = signs.build(layer, (8, 8), torch.zeros(1, 64))
    assert fast.minus.numel() == 64 * 64 // 8
    assert fast.magnitudes.numel() == 64


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(64, 300), (1, 64)),
        (nn.Linear(64, 300), (40, 64)),
        (nn.Conv2d(8, 36, 3, padding=1), (1, 8, 12, 12)),
        (nn.Conv2d(8, 36, 3, padding=1), (1, 8, 40, 33)),
        (nn.Conv2d(8, 12, 3, padding=1), (1, 8, 70, 71)),
        (nn.Conv2d(8, 12, 3, 2, 1), (1, 8, 41, 90)),
        (nn.Conv2d(8, 12, 5, 3, 2), (2, 8, 50, 50)),
        (nn.Conv2d(8, 36, 3, padding=1), (40, 8, 12, 12)),
    ],
    ids=repr,
)
def test_threads_give_the_bits_of_one(layer, shape, name, at_level):
    """Run by more; a plan made for more cuts an image into bands, and may add up in another order."""
    at_level(name)
    x, layer = normal(0, *shape, dtype=torch.float32), pruned(layer, (4, 4), 0.5)
    before = torch.get_num_threads()
    try:
        for lanes in (0, 1, 2):
            torch.set_num_threads(1)
            alone = variant(layer, x, cols=4, batch_lanes=lanes)
            once = alone(x)
            assert error(once, reference(layer, x)) <= 1e-5
            for threads in (2, 3):
                torch.set_num_threads(threads)
                together = variant(layer, x, cols=4, batch_lanes=lanes)
                cut = together(x)
                assert error(cut, reference(layer, x)) <= 1e-5
                assert all(torch.equal(alone(x), once) and torch.equal(together(x), cut) for _ in range(5))
    finally:
        torch.set_num_threads(before)


def test_runs_in_a_fork_of_a_process_with_threads():
    code = (
        "import os, torch\n"
        "from torch import nn\n"
        "from lightning_muws.runtime.kernels import native\n"
        "torch.set_num_threads(2)\n"
        "layer, x = nn.Linear(64, 512), torch.ones(32, 64)\n"
        "with torch.inference_mode():\n"
        "    fast = native.build(layer, (4, 4), x); once = fast(x)\n"
        "    child = os.fork()\n"
        "    if not child: os._exit(0 if torch.equal(fast(x), once) else 1)\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
    )
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)  # noqa: S603  our own code


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(16, 12), (1, 16)),
        (nn.Linear(16, 12), (5, 16)),
        (nn.Conv2d(4, 8, 1), (1, 4, 5, 5)),
        (nn.Conv2d(4, 8, 3), (2, 4, 6, 7)),
    ],
)
def test_nothing_past_the_input_is_read_or_past_the_output_written(layer, shape):
    """The input ends at a page that may not be touched: one number too far ends this process."""
    pruned(layer, (4, 4), 0.3)
    numel, page = torch.Size(shape).numel(), mmap.PAGESIZE
    size = -(-numel * 4 // page) * page
    pages = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert protect(start + size, page, 0) == 0
    whole = torch.frombuffer(pages, dtype=torch.float32, count=size // 4)
    x = whole[size // 4 - numel :].view(shape)
    x.copy_(normal(0, *shape))
    try:
        for name in LEVELS:
            for lanes in (0, 1):
                fast = variant(layer, x, batch_lanes=lanes)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv("MUWS_LEVEL", name)
                    assert error(fast(x), reference(layer, x.clone())) <= 1e-5
    finally:
        protect(start + size, page, 3)


@pytest.mark.parametrize("batch", [1, 16])
def test_compile_and_export_see_one_node_a_layer(batch):
    conv = pruned(nn.Conv2d(4, 8, 3, padding=1), (4, 1), 0.5)
    linear = unified(16, 64, (8, 8), 0.3, 0)
    x = normal(0, batch, 4, 3, 3, dtype=torch.float32)
    net = nn.Sequential(native.build(conv, (4, 1), x).with_relu(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(8, 64))
    net.append(native.build(linear, (8, 8), torch.zeros(batch, 64)))
    if batch == 1:
        net.append(signs.build(unified(8, 16, (8, 8), 0, 0), (8, 8), torch.zeros(1, 16)))
    net.eval()
    want = net(x)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, backend=backend, fullgraph=True)(x), want)
        exported = torch.export.export(net, (x,))
    torch.testing.assert_close(exported.module()(x), want)
    assert len(graphs) == 1
    for graph in (graphs[0].graph, exported.graph):
        ours = [node for node in graph.nodes if "lightning_muws" in str(node.target)]
        assert len(ours) == 2 + (batch == 1)


def test_operators_obey_torchs_own_checks():
    conv = pruned(nn.Conv2d(4, 8, 3, padding=1), (4, 1), 0.5)
    x = normal(0, 16, 4, 3, 3, dtype=torch.float32)
    for batch_last in (0, 1):
        fast = variant(conv, x, batch_lanes=1, batch_last=batch_last)
        tensors = (fast.weights, fast.starts, fast.columns, None, fast.bias)
        with torch.inference_mode(False):
            plain = [None if t is None else t.clone() for t in tensors]
            torch.library.opcheck(
                torch.ops.lightning_muws.block_sparse.default,
                (x.clone(), *plain, list(fast.geometry)),
                test_utils=("test_schema", "test_faketensor"),
            )


def test_pickle_and_state_dict_keep_the_layer():
    layer = pruned(nn.Conv2d(4, 8, 3, padding=1), (4, 1), 0.5)
    x = normal(0, 3, 4, 5, 5, dtype=torch.float32)
    fast = native.build(layer, (4, 1), x)
    once = fast(x)
    again = pickle.loads(pickle.dumps(fast))  # noqa: S301  our own bytes
    assert torch.equal(again(x), once)
    assert torch.equal(copy.deepcopy(fast)(x), once)
    file = io.BytesIO()
    torch.save(fast.state_dict(), file)
    file.seek(0)
    again.weights.zero_()
    assert not torch.equal(again(x), once)
    again.load_state_dict(torch.load(file))
    assert torch.equal(again(x), once)


def test_moved_weights_are_found_again():
    layer = pruned(nn.Linear(16, 8), (4, 4), 0.5)
    x = normal(0, 5, 16, dtype=torch.float32)
    fast = native.build(layer, (4, 4), x)
    once = fast(x)
    fast.weights = fast.weights * 2
    fast.bias = fast.bias * 2
    torch.testing.assert_close(fast(x), 2 * once)


def test_the_layer_given_is_not_changed():
    layer = pruned(nn.Conv2d(4, 8, 3), (4, 4), 0.5)
    before = copy.deepcopy(layer.state_dict())
    fast = native.build(layer, (4, 4), torch.zeros(2, 4, 5, 5))
    fast.weights.zero_()
    fast.bias.zero_()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 2, padding="same"),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Conv2d(4, 4, 3).double(),
        nn.ReLU(),
    ],
)
def test_what_the_kernels_cannot_do_gives_none(layer):
    channels = getattr(layer, "in_channels", 4)
    assert native.build(layer, (4, 4), torch.zeros(1, channels, 8, 8)) is None


def test_signs_apply_to_one_sample_of_unified_blocks_alone():
    layer, x = unified(16, 32, (8, 8), 0.2, 0), torch.zeros(1, 32)
    assert signs.build(layer, (8, 8), x) is not None
    assert signs.build(layer, (8, 8), torch.zeros(2, 32)) is None
    assert signs.build(layer, (4, 1), x) is None
    assert signs.build(pruned(nn.Linear(32, 16), (8, 8), 0.5), (8, 8), x) is None
    assert signs.build(nn.Linear(31, 16), (8, 8), torch.zeros(1, 31)) is None


def test_without_the_library_nothing_is_built(at_level):
    at_level("none")
    assert native.build(nn.Linear(4, 4), (4, 4), torch.zeros(1, 4)) is None
    assert native.build_bfloat16(nn.Linear(4, 4), (4, 4), torch.zeros(8, 4)) is None
    assert signs.build(unified(8, 8, (8, 8), 0, 0), (8, 8), torch.zeros(1, 8)) is None


def test_refusals(at_level):
    layer = native.build(pruned(nn.Linear(4, 4), (4, 4), 0), (4, 4), torch.zeros(1, 4))
    with pytest.raises(StateError, match=r"computes in float32 on the CPU; got torch.float64 on cpu"):
        layer(torch.zeros(1, 4, dtype=torch.float64))
    with torch.inference_mode(False), torch.enable_grad(), pytest.raises(StateError, match="has no gradient"):
        layer(torch.zeros(1, 4, requires_grad=True))
    at_level("none")
    with pytest.raises(StateError, match="needs the native kernels, which are not installed here"):
        layer(torch.zeros(2, 4))
    at_level("sse9")
    with pytest.raises(SettingError, match=r"MUWS_LEVEL='sse9' is not allowed here: choose one of .*portable, or none"):
        library.level()


@given(st.integers(1, 20), st.integers(1, 20), st.floats(0, 1), st.integers(0, 10**6))
@example(8, 8, 0.0, 0)
def test_packing_keeps_every_weight(n_out, n_in, share, seed):
    matrix = pruned(nn.Linear(n_in, n_out), (4, 4), share, seed).weight.data
    rows, cols = choose_block(matrix, (4, 4), n_out)
    for packed in (pack(matrix, rows, cols), pack(matrix, 8, 1)):
        there = matrix.new_zeros(-(-n_out // packed.rows) * packed.rows, n_in)
        for row in range(len(packed.starts) - 1):
            for block in range(packed.starts[row], packed.starts[row + 1]):
                start = int(packed.columns[block]) & 0xFFFF
                there[row * packed.rows : (row + 1) * packed.rows, start : start + packed.cols] = packed.weights[
                    block
                ].T
        assert torch.equal(there[:n_out], matrix)


@pytest.mark.parametrize(
    ("struct", "fields"), [("MuwsLayer", library.Layer), ("MuwsSigns", library.Signs), ("MuwsInt8", library.Int8)]
)
def test_python_repeats_the_fields_of_api_h_in_order(struct, fields):
    """The two agree by name, order and kind: a library of the same size could hold them otherwise."""
    header = Path(library.__file__).parent / "src" / "api.h"
    if not header.exists():
        pytest.skip("an installed package has no sources")
    body = re.search(rf"struct {struct} {{(.*?)\n}};", re.sub("//.*", "", header.read_text()), re.S)[1]
    declared = []
    for kind, star, names in re.findall(r"(?:const )?(\w+)(\*?) ([^;]+);", body):
        found = ctypes.c_void_p if star else {"int64_t": ctypes.c_int64, "float": ctypes.c_float}[kind]
        declared += [(name.strip(), found) for name in names.split(",")]
    assert declared == list(fields._fields_)


def test_geometry_and_api_have_the_same_fields():
    assert [name for name, _ in library.Layer._fields_][7:14] == ["kh", "kw", "sh", "sw", "ph", "pw", "groups"]
    assert Geometry(1)._fields[1:8] == ("kernel_h", "kernel_w", "stride_h", "stride_w", "pad_h", "pad_w", "groups")


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("batch", [2, 3, 4])
def test_images_of_one_position_side_by_side(name, batch, at_level):
    """A few of them are samples of a Linear, whose kernel knows one layout."""
    at_level(name)
    layer = pruned(nn.Conv2d(8, 12, 1), (4, 4), 0.3)
    x = normal(0, batch, 8, 1, 1, dtype=torch.float32)
    last = torch.empty_strided(x.shape, batch_last_strides(x.shape)).copy_(x)
    fast = variant(layer, x, cols=4, batch_lanes=1)
    for way, images in ((fast.with_batch_last(), x), (fast, last)):
        assert error(way(images), reference(layer, x)) <= 1e-5


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("batch_last", [False, True])
def test_adds_onto_another_tensor_before_relu(name, batch_last, at_level):
    at_level(name)

    @given(layers(), st.booleans())
    def law(case, relu):
        layer, x, block_shape = case
        fast, want = ended(native.build(layer, block_shape, x), relu), reference(layer, x, False)
        fast = fast.with_batch_last() if batch_last and x.dim() == 4 else fast
        laid_alike = native.build(layer, block_shape, x)(x)
        for onto in (normal(1, *want.shape, dtype=torch.float32), torch.ones(()), laid_alike):
            kept, total = onto.clone(), want + onto.double()
            assert error(fast(x, onto), total.relu() if relu else total, terms_of(layer, x)) <= 1e-5
            assert torch.equal(onto, kept)

    law()


WIDTHS = {
    "linear": (nn.Linear(64, 32), (2, 64)),
    "one sample": (nn.Linear(64, 32), (1, 64)),
    "conv1d": (nn.Conv1d(64, 32, 3), (2, 64, 9)),
    "conv2d": (nn.Conv2d(64, 32, 3), (2, 64, 9, 9)),
    "grouped": (nn.Conv2d(64, 32, 3, groups=4), (2, 64, 9, 9)),
}
BUILDS = {
    "float32": native.build,
    "bfloat16": native.build_bfloat16,
    "int8": lambda layer, _, x: native_int8.build_static(layer, x, native_int8.Activation(0.01, 128)),
    "signs": signs.build,
}


@pytest.mark.parametrize("width", [1, 32, 63, 65, 128])
@pytest.mark.parametrize("case", WIDTHS)
@pytest.mark.parametrize("kind", BUILDS)
def test_an_input_of_another_width_is_refused_and_never_read_past_its_end(kind, case, width):
    layer, shape = WIDTHS[case]
    layer = copy.deepcopy(layer)
    structure = MicroStructure((4, 4), prune_ratio=0.5, unify_ratio=0.5 if kind == "signs" else 0.0)
    layer.weight.data = structure.project(layer.weight.data)
    fast = BUILDS[kind](layer, (4, 4), torch.zeros(shape))
    if fast is None:
        pytest.skip(f"{kind} does not apply")
    wrong = torch.zeros(shape[0], width, *shape[2:])
    with pytest.raises(StateError, match=f"a native layer of 64 inputs or channels got {width}, in an input of shape"):
        fast(wrong)
    if len(shape) == 2:
        with pytest.raises(StateError, match=f"a native layer of 64 inputs or channels got {width}"):
            fast(wrong[:, None])
    assert fast(torch.zeros(shape)).shape == layer(torch.zeros(shape)).shape
