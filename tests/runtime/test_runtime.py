"""The runtime: kernels equal the float64 layer, choices follow the times they are given, and nothing is ever slower."""

import copy
import dataclasses
import gc
import io
import json
import warnings
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_muws import MicroStructure, load_compressed, save_compressed
from lightning_muws.errors import MuwsError, SettingError, StateError
from lightning_muws.runtime import accelerate as accelerate_module
from lightning_muws.runtime.accelerate import accelerate
from lightning_muws.runtime.kernels import DENSE, KERNELS, ROUNDED
from lightning_muws.runtime.kernels.base import Kernel
from lightning_muws.runtime.kernels.reference import reference, relative_error
from lightning_muws.runtime.measure import network
from lightning_muws.runtime.measure.layer import pick
from lightning_muws.runtime.measure.network import pick_form
from lightning_muws.runtime.measure.report import LayerSpeed, Machine, SpeedReport
from lightning_muws.runtime.native.library import level
from lightning_muws.runtime.rewrite.graph import fold, fuse
from lightning_muws.runtime.rewrite.observe import Example, observe
from lightning_muws.runtime.shapes import infer_shape_for_kernels
from lightning_muws.runtime.timing import Timing, race
from tests.support.strategies import normal

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
EXACT = [name for name in KERNELS if name not in ROUNDED]
TORCH_ROWS = ["compact", "groups", "groups_loop", "bsr", "pooled"]


def fill(layer, seed, block_shape=(4, 4), prune=0.5, unify=0.0, signs="free"):
    """Give a layer normal weights, projected on a structure."""
    weight = normal(seed, *layer.weight.shape, dtype=layer.weight.dtype)
    layer.weight.data = MicroStructure(block_shape, prune, unify, signs).project(weight)
    if layer.bias is not None:
        layer.bias.data = normal(seed + 1, *layer.bias.shape, dtype=layer.bias.dtype)
    return layer.eval().requires_grad_(False)


def zero_rows_and_columns(layer, rows, columns):
    with torch.no_grad():
        layer.weight[rows] = 0
        layer.weight[:, columns] = 0
    return layer


# One worked example a kernel: rows that must apply, and be right


def tall(n_out, n_in, height, kept, seed=0, kernel=()):
    """Return a weight whose groups of outputs keep so many inputs each."""
    weight = normal(seed, n_out, n_in, *kernel, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, n_out, height):
        gone = torch.randperm(n_in, generator=generator)[kept:]
        weight[start : start + height, gone] = 0
    return weight


def with_weight(layer, weight):
    layer.weight.data = weight
    return layer.eval().requires_grad_(False)


APPLIES = {
    "compact": lambda: (zero_rows_and_columns(fill(nn.Linear(24, 20), 0), slice(3, 9), slice(0, 5)), (4, 4)),
    "groups": lambda: (with_weight(nn.Linear(96, 130), tall(130, 96, 64, 20)), (64, 1)),
    "groups_loop": lambda: (with_weight(nn.Conv2d(20, 64, 3), tall(64, 20, 32, 5, kernel=(3, 3))), (32, 9)),
    "bsr": lambda: (fill(nn.Linear(64, 32), 0, (8, 8), 0.8), (8, 8)),
    "pooled": lambda: (fill(nn.Linear(64, 32), 0, (4, 4), 0.5, 0.5, "shared"), (4, 4)),
    "native": lambda: (fill(nn.Linear(64, 32), 0, (4, 4), 0.75), (4, 4)),
}


@pytest.mark.parametrize("name", list(APPLIES))
def test_each_kernel_applies_where_it_should_and_equals_the_layer(name):
    layer, block_shape = APPLIES[name]()
    shape = (3, 20, 7, 6) if isinstance(layer, nn.Conv2d) else (5, layer.in_features)
    x = normal(7, *shape, dtype=torch.float32)
    kernel = KERNELS[name](layer, block_shape, x)
    if name == "native" and kernel is None:
        pytest.skip("the native kernels are not built here")
    assert kernel is not None
    assert relative_error(kernel(x), reference(layer, x)) <= 1e-5
    assert relative_error(kernel.with_relu()(x), reference(layer, x).relu()) <= 1e-5


# The law over all strategies


def error(y, expected, layer, x):
    """Return the error relative to the largest output; of sums that cancel, to an eighth of their terms' sizes."""
    sizes = copy.deepcopy(layer)
    for p in sizes.parameters():
        p.data = p.data.abs()
    terms = float(reference(sizes, x.abs()).max()) if expected.numel() else 0.0
    scale = max(terms / 8, float(expected.abs().max()) if expected.numel() else 0.0) or 1.0
    return float((y.double() - expected).abs().max()) / scale if expected.numel() else 0.0


BATCHES = st.sampled_from([1, 2, 3, 7, 17, 64, 257])


@st.composite
def layers(draw):
    """Return a layer of odd sizes inside a structure, its block shape, and an input."""
    kind = draw(st.sampled_from(["linear", "conv1d", "conv2d"]))
    side = st.sampled_from([1, 3, 8, 16, 24, 33, 64])
    n_in, n_out, bias = draw(side), draw(side), draw(st.booleans())
    batch = draw(BATCHES if kind == "linear" else st.sampled_from([1, 2, 5]))
    if kind == "linear":
        layer, shape = nn.Linear(n_in, n_out, bias), (batch, n_in)
        shape = draw(st.sampled_from([shape, (batch, 1, n_in), (n_in,)]))
    else:
        n = 1 if kind == "conv1d" else 2
        kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        padding = draw(st.sampled_from([0, 1, 2, "same"])) if stride == 1 else draw(st.integers(0, 2))
        groups = draw(st.sampled_from([1, 1, 1, n_in if n_out % n_in == 0 else 1]))
        make = (nn.Conv1d, nn.Conv2d)[n - 1]
        layer = make(n_in, n_out, kernel, stride, padding, bias=bias, groups=groups)
        size = [draw(st.integers(kernel, 9)) for _ in range(n)]
        shape = draw(st.sampled_from([(batch, n_in, *size), (n_in, *size)]))
    block_shape = draw(st.sampled_from([(4, 4), (8, 8), (4, 1), (16, 16), (16, 1), (64, 1), (2, 3), (1, 8), (8, 9)]))
    prune = draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    unify = draw(st.sampled_from([0.0, 0.5, 1.0])) * (1 - prune)
    layer = fill(layer, draw(st.integers(0, 999)), block_shape, prune, unify, draw(st.sampled_from(["free", "shared"])))
    if draw(st.booleans()):  # empty rows and columns
        rows, columns = draw(st.integers(0, n_out)), draw(st.integers(0, layer.weight.shape[1]))
        zero_rows_and_columns(layer, slice(0, rows), slice(columns, None))
    return layer, block_shape, normal(3, *shape, dtype=torch.float32)


@given(layers(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_kernel_equals_the_layer_in_float64(case, relu):
    layer, block_shape, x = case
    before, other = copy.deepcopy(layer.state_dict()), normal(4, *x.shape, dtype=torch.float32)
    for name in EXACT:
        kernel = KERNELS[name](layer, block_shape, x)
        kernel = kernel.with_relu() if relu and kernel is not None else kernel
        for given_x in (x, other) if kernel is not None else ():
            expected = reference(layer, given_x).relu() if relu else reference(layer, given_x)
            with torch.inference_mode():
                y = kernel(given_x)
            assert (y.shape, y.dtype) == (expected.shape, x.dtype), name
            assert error(y, expected, layer, given_x) <= 1e-5, name
        assert same_state(layer.state_dict(), before), name


def same_state(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["compact", "groups", "pooled"])
def test_kernels_of_dense_operations_take_any_dtype(name, dtype):
    layer, block_shape = APPLIES[name]()
    layer, x = layer.to(dtype), normal(7, 5, layer.in_features, dtype=dtype)
    kernel = KERNELS[name](layer, block_shape, x)
    limit = {torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    assert kernel(x).dtype == dtype
    assert relative_error(kernel(x), reference(layer, x)) <= limit


@pytest.mark.parametrize("name", [*TORCH_ROWS, "onednn"])
def test_a_kernel_can_be_copied_saved_and_told_new_values(name):
    layer, block_shape = APPLIES.get(name, APPLIES["compact"])()
    shape = (3, 20, 7, 6) if isinstance(layer, nn.Conv2d) else (5, layer.in_features)
    x = normal(7, *shape, dtype=torch.float32)
    kernel = KERNELS[name](layer, block_shape, x)
    y = kernel(x)
    assert torch.equal(copy.deepcopy(kernel)(x), y)
    file = io.BytesIO()
    torch.save(kernel, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), y)
    other = KERNELS[name](layer, block_shape, x)
    other.load_state_dict(
        {key: value * 2 if value.is_floating_point() else value for key, value in kernel.state_dict().items()}
    )
    torch.testing.assert_close(other(x), 2 * y)


REFUSALS = {
    "groups of inputs": (
        nn.Conv2d(8, 16, 3, groups=2),
        (2, 8, 9, 9),
        ("compact", "groups", "groups_loop", "bsr", "pooled"),
    ),
    "circular padding": (
        nn.Conv2d(8, 16, 3, padding=1, padding_mode="circular"),
        (2, 8, 9, 9),
        ("compact", "groups", "groups_loop", "bsr", "pooled", "onednn", "native", "bf16"),
    ),
    "a subclass": (type("Own", (nn.Linear,), {})(16, 16), (2, 16), (*TORCH_ROWS, "native", "onednn", "int8", "bf16")),
    "nothing pruned": (nn.Linear(64, 64), (2, 64), TORCH_ROWS),
    "half precision on a CPU": (nn.Linear(64, 64).half(), (2, 64), ("bsr", "onednn", "int8", "bf16", "native")),
}


@pytest.mark.parametrize("case", list(REFUSALS))
def test_a_kernel_refuses_what_it_cannot_do(case):
    layer, shape, names = REFUSALS[case]
    if case != "nothing pruned":
        layer.weight.data[: len(layer.weight) // 2] = 0
    x = normal(0, *shape).to(layer.weight.dtype)
    for name in names:
        assert KERNELS[name](layer.eval(), (4, 4), x) is None, name


LAYERS = {
    **APPLIES,
    "signs": lambda: (fill(nn.Linear(64, 32), 0, (8, 8), 0.25, 0.75), (8, 8)),
    "native_conv": lambda: (fill(nn.Conv2d(20, 64, 3), 0, (4, 4), 0.75), (4, 4)),
}


@pytest.mark.parametrize("case", list(LAYERS))
def test_every_kernel_keeps_the_contract(case):
    layer, block_shape = LAYERS[case]()
    shape = (2, 20, 7, 6) if isinstance(layer, nn.Conv2d) else (1, layer.in_features)
    x = normal(7, *shape, dtype=torch.float32)
    built = {name: build(layer, block_shape, x) for name, build in KERNELS.items()}
    assert case.removesuffix("_conv") in {name for name, kernel in built.items() if kernel} or level() is None
    for name, kernel in built.items():
        if kernel is None:
            continue
        assert isinstance(kernel, Kernel), name
        assert not list(kernel.parameters()) or name in ("dense", "bf16", "int8"), name
        before, y = x.clone(), kernel(x)
        twin, held = kernel.with_relu(), [t.data_ptr() for t in kernel.buffers()]
        assert (kernel.relu, twin.relu) == (False, True)
        assert [t.data_ptr() for t in twin.buffers()] == held
        assert torch.equal(twin(x), y.relu()), name
        assert torch.equal(copy.deepcopy(twin)(x), y.relu()), name
        assert torch.equal(kernel(x), y), name  # as it was
        other = kernel.with_batch_last()
        assert other is None or torch.equal(other(x), kernel(x)) or relative_error(other(x), y.double()) <= 1e-5
        onto = normal(8, *y.shape, dtype=torch.float32)
        if kernel.can_add:
            torch.testing.assert_close(twin(x, onto), (y + onto).relu())
        y.fill_(torch.nan)  # its memory is the caller's
        assert torch.equal(x, before)
        assert torch.equal(twin(x), kernel(x).relu()), name


def test_bsr_never_goes_through_linear_on_a_cpu(monkeypatch):
    layer, block_shape = APPLIES["bsr"]()
    kernel = KERNELS["bsr"](layer, block_shape, torch.zeros(2, 64))
    monkeypatch.setattr(F, "linear", None)
    kernel(torch.zeros(2, 64))


# Block shapes


@pytest.mark.parametrize("block_shape", [(4, 4), (4, 1), (8, 8), (1, 8), (16, 1), (64, 1), (8, 4)])
@pytest.mark.parametrize("kind", ["pruned", "unified", "both"])
def test_the_block_shape_is_found_from_zeros_and_magnitudes(block_shape, kind):
    prune, unify = {"pruned": (0.7, 0.0), "unified": (0.0, 0.6), "both": (0.5, 0.3)}[kind]
    weight = MicroStructure(block_shape, prune, unify).project(normal(5, 256, 256, dtype=torch.float32))
    assert infer_shape_for_kernels(weight) == block_shape


def test_a_convolution_s_blocks_are_found_on_its_matrix():
    weight = MicroStructure((32, 9), 0.7).project(normal(5, 64, 32, 3, 3, dtype=torch.float32))
    assert infer_shape_for_kernels(weight) == (32, 9)


def test_without_structure_there_is_none_to_find():
    assert infer_shape_for_kernels(normal(0, 64, 64)) == (4, 4)
    assert infer_shape_for_kernels(torch.zeros(0, 4)) == (4, 4)
    scattered = normal(0, 64, 64) * (torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.3)
    assert infer_shape_for_kernels(scattered) == (1, 1)


# Choices follow the times they are given


def test_dense_stays_unless_something_wins_by_min_gain():
    times = {"dense": [2.0, 2.0, 2.0], "compact": [1.9, 1.9, 1.9]}
    assert pick(times, 1.1) == "dense"
    assert pick(times, 1.0) == "compact"
    assert pick({**times, "bsr": [1.0, 1.0, 1.0]}, 1.1) == "bsr"


def test_a_kernel_has_to_beat_the_best_dense_form():
    times = {"dense": [2.0, 2.0], "onednn": [1.0, 1.0], "compact": [1.0, 1.0]}
    assert pick(times, 1.1) == "onednn"


def test_one_slow_round_decides_nothing():
    assert pick({"dense": [1.0, 9.0, 1.0], "compact": [1.0, 1.0, 1.0]}, 1.1) == "dense"


def test_a_network_that_gains_only_noise_stays_dense():
    assert pick_form({"dense": [1.0, 1.0], "fast": [0.99, 0.99]}, "dense", ["fast"])[0] == "dense"
    assert pick_form({"dense": [1.0, 1.0], "fast": [2.0, 2.0]}, "dense", ["fast"]) == ("dense", 0.5)


def test_a_race_runs_in_turn_and_gives_up_the_hopeless():
    now, order = [0.0], []

    def task(name, seconds):
        def run():
            order.append(name)
            now[0] += seconds

        return run

    tasks = {"a": task("a", 1.0), "slow": task("slow", 9.0), "kept": task("kept", 5.0)}
    times = race(tasks, lambda: now[0], Timing(rounds=4, budget_s=1e9), keep=["kept"])
    assert order[:6] == ["a", "slow", "kept", "a", "slow", "kept"]  # one round to warm up, which is not counted
    assert times == {"a": [1.0] * 4, "slow": [9.0], "kept": [5.0] * 4}


def slow_and_fast(monkeypatch, seconds):
    """Let the times of forms and kernels be given ones; what is not named takes a second."""

    def fake(tasks, clock, timing=None, keep=(), between=None):
        return {name: [seconds.get(name, 1.0)] * 5 for name in tasks}

    monkeypatch.setattr("lightning_muws.runtime.measure.layer.race", fake)
    monkeypatch.setattr(network, "race", fake)


def mlp(seed=0):
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    for i, layer in enumerate(m for m in model if isinstance(m, nn.Linear)):
        fill(layer, seed + i)
        layer.weight.data[:, : layer.in_features // 2] = 0
    return model


def test_a_network_that_is_not_faster_comes_back_as_it_was(monkeypatch):
    slow_and_fast(monkeypatch, {"compact": 0.1, "fast": 1.0, "fast_fused": 1.1})
    model = mlp()
    fast, report = accelerate(model, torch.zeros(4, 32))
    assert [type(m) for m in fast] == [type(m) for m in model]
    assert same_state(fast.state_dict(), model.state_dict())
    assert fast[0].weight.data_ptr() != model[0].weight.data_ptr()
    assert report.chosen == "dense"
    assert report.speedup == 1.0
    assert "came back unchanged" in report.summary()
    assert {layer.winner for layer in report.layers} == {"compact"}  # each won alone


def test_a_network_that_is_faster_than_dense_but_not_than_its_best_form_comes_back_as_it_was(monkeypatch):
    slow_and_fast(monkeypatch, {"compact": 0.1, "dense": 9.0, "onednn": 1.0, "fast": 1.0, "fast_fused": 1.0})
    assert accelerate(mlp(), torch.zeros(4, 32))[1].chosen == "dense"


def test_what_is_packed_keeps_no_dense_copy(monkeypatch, tmp_path):
    slow_and_fast(monkeypatch, {"compact": 0.1, "fast": 0.5, "fast_fused": 0.25})
    model = mlp()
    save_compressed(model, tmp_path / "model.muws")
    loaded = mlp(seed=7)
    load_compressed(tmp_path / "model.muws", into=loaded)
    fast, report = accelerate(loaded, torch.zeros(4, 32))
    assert report.is_faster
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in fast.state_dict().values()}
    dense = sum(t.untyped_storage().nbytes() for t in model.state_dict().values())
    assert sum(held.values()) < 0.7 * dense  # half of each weight's columns are zero
    weights = [weakref.ref(layer.weight) for layer in loaded if isinstance(layer, nn.Linear)]
    del loaded
    gc.collect()
    assert [weight() for weight in weights] == [None] * 3


def test_the_faster_form_comes_back(monkeypatch):
    slow_and_fast(monkeypatch, {"compact": 0.1, "fast": 0.5, "fast_fused": 0.25})
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    fast, report = accelerate(model, torch.zeros(4, 32))
    assert report.chosen == "fast_fused"
    assert report.speedup == 4.0
    x = normal(1, 9, 32, dtype=torch.float32)
    torch.testing.assert_close(fast(x), model(x))
    assert same_state(model.state_dict(), before)
    fast(x).sum()
    assert all(type(m) is nn.Linear for m in model if not isinstance(m, nn.ReLU))


def test_a_kernel_that_is_wrong_or_raises_is_not_used(monkeypatch):
    def wrong(layer, block_shape, example):
        return nn.Sequential(copy.deepcopy(layer), nn.Hardtanh(-1e-3, 1e-3))

    def raising(layer, block_shape, example):
        raise RuntimeError("no such instruction\nat all")

    monkeypatch.setitem(KERNELS, "compact", wrong)
    monkeypatch.setitem(KERNELS, "bsr", raising)
    slow_and_fast(monkeypatch, {"compact": 0.1, "bsr": 0.1})
    _, report = accelerate(mlp(), torch.ones(4, 32))
    assert all(layer.winner == "dense" for layer in report.layers)
    assert "relative error" in report.layers[0].refused["compact"]
    assert report.layers[0].refused["bsr"] == "it raised RuntimeError: no such instruction"


def test_kernels_of_lower_precision_win_only_where_they_are_asked_for(monkeypatch):
    slow_and_fast(monkeypatch, {"bf16": 0.1, "int8": 0.2, "fast": 0.5})
    model, x = mlp(), normal(1, 4, 32, dtype=torch.float32)
    _, report = accelerate(model, x)
    assert {layer.winner for layer in report.layers} == {"dense"}
    assert report.layers[0].times["bf16"] == 0.1
    assert 1e-4 < report.layers[0].errors["bf16"] < 3e-2
    fast, report = accelerate(model, x, dtype=torch.bfloat16)
    assert {layer.winner for layer in report.layers} == {"bf16"}
    assert report.chosen == "fast"
    assert fast(x).dtype == torch.float32


def test_only_the_kernels_that_were_named_are_tried():
    _, report = accelerate(mlp(), torch.zeros(4, 32), kernels=["compact"])
    assert all(set(layer.times) <= {*DENSE, "compact"} for layer in report.layers)
    assert "compact" in report.layers[0].times


# What a model may be made of


def always_fast(monkeypatch):
    """Let every kernel but the dense ones win, and the accelerated network with it."""
    quick = dict.fromkeys([n for n in KERNELS if n not in (*DENSE, *ROUNDED)], 0.1)
    slow_and_fast(monkeypatch, {**quick, "fast": 0.5, "fast_fused": 0.1, "fast_batch_last": 0.6})


class Residual(nn.Module):
    def __init__(self, n_in, n_out, stride=1):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())
        self.conv, self.bn = nn.Conv2d(n_out, n_out, 3, padding=1), nn.BatchNorm2d(n_out)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride), nn.BatchNorm2d(n_out))
            if n_in != n_out
            else nn.Sequential()
        )

    def forward(self, x):
        return F.relu(self.bn(self.conv(self.one(x))) + self.shortcut(x))


def randomised(model, prune=0.75, seed=0):
    """Give every convolution and Linear blocks, and every batch norm statistics."""
    for i, m in enumerate(model.modules()):
        if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            fill(m, seed + i, prune=prune)
            m.weight.data[:, : m.weight.shape[1] // 3] = 0
        elif isinstance(m, nn.modules.batchnorm._BatchNorm):
            for j, tensor in enumerate([m.weight.data, m.bias.data, m.running_mean, m.running_var]):
                tensor.copy_(normal(seed + i + j, *tensor.shape).abs() + 0.5)
    return model.eval()


def resnet():
    return randomised(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            Residual(16, 16),
            Residual(16, 32, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        )
    )


def test_batch_norms_are_folded_and_sums_and_relus_fused(monkeypatch):
    always_fast(monkeypatch)
    model = resnet()
    x = normal(0, 2, 3, 12, 12, dtype=torch.float32)
    fast, report = accelerate(model, x)
    assert report.n_folded == 6
    assert report.chosen == "fast_fused"
    for batch in (1, 2, 5):
        x = normal(batch, batch, 3, 12, 12, dtype=torch.float32)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    x = normal(1, 2, 3, 17, 9, dtype=torch.float32)  # another size goes the old way
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for copied in (copy.deepcopy(fast), torch.load(file, weights_only=False)):
        assert torch.equal(copied(x), fast(x))


class ReluInside(nn.Module):
    """Adds after ReLU: a kernel that adds before its own ReLU must not take the sum."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + F.relu(self.conv(x))


@pytest.mark.parametrize("name", ["native", "compact", "onednn"])
def test_a_sum_after_relu_stays_after_it(name):
    model = randomised(nn.Sequential(ReluInside()))
    x = normal(0, 2, 8, 6, 6, dtype=torch.float32)
    expected = model(x)
    kernel = KERNELS[name](model[0].conv, (4, 4), x)
    if kernel is None:
        pytest.skip(f"{name} does not apply here")
    model[0].conv = kernel
    with torch.no_grad():
        fuse(model, Example.of(x))
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_an_input_is_never_written_to():
    model = randomised(nn.Sequential(Residual(8, 8)), prune=0.0)
    x = normal(0, 2, 8, 6, 6, dtype=torch.float32)
    expected = model(x)
    assert fuse(model, Example.of(x)) > 0
    kept = x.clone()
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(x, kept)


class TwoReaders(nn.Module):
    """The output of ``conv`` is read twice: neither a norm nor a ReLU may be folded into it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y + F.relu(y)


def test_what_is_read_twice_is_not_folded():
    model = randomised(TwoReaders(), prune=0.0)
    x = normal(0, 2, 4, 3, 3, dtype=torch.float32)
    expected = model(x)
    copied = copy.deepcopy(model)
    assert fold(copied, Example.of(x)) == 0
    fuse(copied, Example.of(x))
    assert torch.equal(copied(x), expected)


def test_a_norm_is_not_folded_into_a_layer_that_runs_twice_nor_across_three_axes():
    linear = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    assert fold(copy.deepcopy(linear), Example.of(torch.zeros(3, 4))) == 1
    assert fold(linear, Example.of(torch.zeros(3, 4, 4))) == 0  # the norm runs over axis 1, not over the outputs
    shared = nn.Linear(4, 4)
    assert fold(nn.Sequential(shared, nn.BatchNorm1d(4), shared).eval(), Example.of(torch.zeros(3, 4))) == 0


class Branches(nn.Module):
    """Its path depends on the values: it cannot be traced, and is left to run as it is."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4)

    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y) if y.sum() > 0 else y


def test_a_forward_that_depends_on_values_is_not_changed():
    model = randomised(Branches(), prune=0.0)
    x = normal(0, 2, 4, 9, dtype=torch.float32)
    assert fold(model, Example.of(x)) == 0
    assert fuse(model, Example.of(x)) == 0


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.again = self.first
        self.many = nn.ModuleList([self.first, nn.Linear(16, 16)])
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.first.weight

    def forward(self, x, scale=None, *, shift=0.0):
        x = self.again(self.first(x)) + shift
        for layer in self.many:
            x = F.relu(layer(x))
        x = self.tied(x)
        return {"y": x if scale is None else x * scale, "all": [x[:1], (x, None)]}


def test_shared_modules_lists_and_any_signature(monkeypatch):
    always_fast(monkeypatch)
    model = randomised(Shared())
    x = normal(0, 3, 16, dtype=torch.float32)
    for example in (x, (x, 2.0), {"x": x, "scale": torch.tensor(2.0), "shift": 1.0}):
        fast, report = accelerate(model, example)
        assert report.is_faster
        assert fast.first is fast.again is fast.many[0]
        assert type(fast.first) is not nn.Linear
        out, expected = (Example.of(example)(m) for m in (fast, model))
        torch.testing.assert_close(out["y"], expected["y"])
        torch.testing.assert_close(out["all"][1][0], expected["all"][1][0])
    assert report.layers[0].name == "first"


def test_layers_that_may_not_be_swapped_say_why(monkeypatch):
    always_fast(monkeypatch)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    model[0].register_forward_hook(lambda module, args, y: y + 1)
    model.unused = None
    holder = nn.Module()
    holder.model, holder.unused = model, nn.Linear(8, 8)
    holder.forward = lambda x: holder.model(x)
    wrapped = Holder(model).eval()
    randomised(model[1])
    fast, report = accelerate(wrapped, torch.ones(2, 8))
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons["model.0"] == "it has hooks"
    assert "ParametrizedLinear" in reasons["model.2"]
    assert reasons["unused"] == "the example does not reach it"
    assert reasons["model.1"] == ""
    torch.testing.assert_close(fast(torch.ones(2, 8)), wrapped(torch.ones(2, 8)))


class Holder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.unused = model, nn.Linear(8, 8)

    def forward(self, x):
        return self.model(x)


class ReadsWeights(nn.Module):
    """Reads an attribute of its layer, as some transformers do: a kernel has no such weight."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        return self.layer(x.to(self.layer.weight.dtype))


def test_a_network_that_reads_its_layers_weights_stays_dense(monkeypatch):
    always_fast(monkeypatch)
    model = randomised(ReadsWeights())
    fast, report = accelerate(model, torch.ones(2, 16), kernels=["bsr"])
    assert report.layers[0].winner == "bsr"
    assert "raised AttributeError" in report.summary()
    assert report.chosen == "dense"
    torch.testing.assert_close(fast(torch.ones(2, 16)), model(torch.ones(2, 16)))


def test_one_layer_alone_is_a_model_too(monkeypatch):
    always_fast(monkeypatch)
    layer = randomised(nn.Linear(16, 16))
    fast, report = accelerate(layer, torch.ones(2, 16))
    assert report.layers[0].name == ""
    assert type(fast) is not nn.Linear
    torch.testing.assert_close(fast(torch.ones(5, 16)), layer(torch.ones(5, 16)))


def test_a_lightning_module_stays_one(monkeypatch):
    from lightning.pytorch.demos.boring_classes import BoringModel

    always_fast(monkeypatch)
    model = randomised(BoringModel())
    fast, _ = accelerate(model, torch.ones(2, 32))
    assert type(fast) is BoringModel
    assert type(fast.layer) is not nn.Linear
    torch.testing.assert_close(fast.test_step(torch.ones(2, 32), 0), model.test_step(torch.ones(2, 32), 0))


def test_a_compiled_model_is_looked_into(monkeypatch):
    always_fast(monkeypatch)
    model = mlp()
    compiled = torch.compile(model, backend="eager")
    fast, report = accelerate(compiled, torch.ones(2, 32))
    assert "compiled" in report.times
    assert report.layers[0].name == "0"
    assert type(fast) is nn.Sequential
    torch.testing.assert_close(fast(torch.ones(2, 32)), model(torch.ones(2, 32)))


def test_it_works_under_inference_mode_and_gives_ordinary_tensors(monkeypatch):
    always_fast(monkeypatch)
    with torch.inference_mode():
        fast, _ = accelerate(mlp(), torch.ones(2, 32))
        y = fast(torch.ones(3, 32))
    assert not any(t.is_inference() for t in fast.state_dict().values())
    with torch.no_grad():
        torch.testing.assert_close(fast(torch.ones(3, 32)), y.clone())


# Settings, reports, stored choices


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"min_gain": 0.5}, "min_gain=0.5 is not allowed"),
        ({"min_gain": True}, "min_gain=True"),
        ({"min_gain": float("nan")}, "min_gain=nan"),
        ({"dtype": torch.int16}, "dtype='int16' is not allowed"),
        ({"kernels": ["spars"]}, r"kernels=\['spars'\] are not in the table"),
        ({"block_shapes": {"nowhere.weight": (4, 4)}}, "block_shapes names"),
        ({"plan": {}}, "no speed report"),
        ({"plan": 3}, "no speed report"),
        ({"min_gain": "1.1"}, "min_gain='1.1' is not allowed"),
        ({"kernels": "native"}, "kernels='native' is not allowed: give a list of names"),
        ({"kernels": 3}, "kernels=3 is not allowed: give a list of names"),
        ({"kernels": [3]}, r"kernels=\[3\] are not in the table"),
        ({"block_shapes": [(4, 4)]}, "block_shapes is a list: give a dict"),
        ({"block_shapes": {3: (4, 4)}}, r"block_shapes names \[3\]"),
        ({"block_shapes": {"2.weight": 4}}, r"block_shapes\['2.weight'\]=4 is not allowed: give \(rows, columns\)"),
        ({"block_shapes": {"2.weight": (4,)}}, r"block_shapes\['2.weight'\]=\(4,\) is not allowed"),
        ({"block_shapes": {"2.weight": (4, 0)}}, r"block_shapes\['2.weight'\]=\(4, 0\) is not allowed"),
        ({"block_shapes": {"2.weight": (4, 2.0)}}, r"block_shapes\['2.weight'\]=\(4, 2.0\) is not allowed"),
    ],
)
def test_a_wrong_setting_is_one_clear_error(arguments, match):
    with pytest.raises(SettingError, match=match):
        accelerate(mlp(), torch.zeros(2, 32), **arguments)


def test_a_model_that_is_no_module_is_one_clear_error():
    with pytest.raises(SettingError, match=r"model is a str: give a torch\.nn\.Module"):
        accelerate("resnet18", torch.zeros(2, 32))


def test_a_model_in_training_mode_and_an_example_without_tensors_are_refused():
    with pytest.raises(SettingError, match=r"call model.eval\(\) first"):
        accelerate(mlp().train(), torch.zeros(2, 32))
    with pytest.raises(SettingError, match="example_input is a str without tensors"):
        accelerate(mlp(), "x")


def test_a_given_block_shape_is_used():
    _, report = accelerate(mlp(), torch.zeros(2, 32), block_shapes={"2.weight": (2, 2)})
    assert report.layers[1].block_shape == (2, 2)
    assert report.layers[0].block_shape != (2, 2)


def test_a_given_block_shape_is_used_for_a_layer_alone_and_inside_a_compiled_child():
    alone = nn.Sequential(*mlp())[0]
    _, report = accelerate(alone, torch.zeros(2, 32), block_shapes={"weight": (2, 2)})
    assert report.layers[0].block_shape == (2, 2)
    model = nn.Sequential(torch.compile(mlp(), backend="eager")).eval()
    for name in ("0.2.weight", "0._orig_mod.2.weight"):
        _, report = accelerate(model, torch.zeros(2, 32), block_shapes={name: (2, 2)})
        assert {layer.name: layer.block_shape for layer in report.layers}["0.2"] == (2, 2)


def test_a_report_survives_json_and_shows_its_numbers(tmp_path):
    from rich.console import Console

    _, report = accelerate(resnet(), torch.zeros(1, 3, 12, 12))
    path = tmp_path / "speed.json"
    report.save(path)
    assert SpeedReport.load(path) == report
    console = Console(width=200, file=io.StringIO())
    console.print(report)
    for text in (console.file.getvalue(), report.markdown(), report._repr_html_()):
        assert "Conv2d 16x3x3x3" in text
        assert "whole network" in text


def a_report(n_layers=3):
    """Return a report of long names and long numbers, as a real network has them."""
    times = dict(zip(KERNELS, (12.345678e-3 / (i + 1) for i in range(len(KERNELS))), strict=True))
    layers = [
        LayerSpeed(
            name=f"features.denseblock{i}.layers.10.conv2",
            layer="Conv2d 512x512x3x3/2 g32",
            inputs=((32, 512, 7, 7),),
            block_shape=(16, 16),
            n_weights=1000,
            n_nonzero=100,
            times=times,
            errors=dict.fromkeys(KERNELS, 1.234e-6),
            winner="groups_loop",
        )
        for i in range(n_layers)
    ]
    hooked = [LayerSpeed(f"head.{i}", "Linear 8x8", reason="it has hooks") for i in range(2)]
    machine = Machine("AMD EPYC 9V45 96-Core Processor", "AVX512", "Linux", "cpu", 2, "2.13.0+cpu", "avx512_bf16")
    whole = {"dense": 0.0123, "onednn": 0.0101, "fast": 0.004, "fast_fused": 0.0032, "bf16": 0.006}
    errors = dict.fromkeys(whole, 3.2e-7)
    layers = (*layers, *hooked)
    return SpeedReport(machine, ((1, 3, 32, 32),), 1.1, "", layers, whole, errors, "onednn", "fast_fused", 3.15)


def printed(report, width):
    from rich.console import Console

    console = Console(width=width, file=io.StringIO())
    console.print(report)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_report_fits_a_narrow_terminal_in_two_lines_a_layer(width):
    report = a_report()
    text = printed(report, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    growth = len(printed(a_report(9), width).splitlines()) - len(text.splitlines())
    assert growth <= 2 * 6  # lines, of six more layers
    for shown in ("16x16", "90%", "groups_loop", "2.469", "2.50", "onednn (best dense)", "fast_fused (chosen)"):
        assert shown in text, shown
    assert "".join(text.split()).count("it has hooks: head.0, head.1".replace(" ", "")) == 1


def test_a_wide_terminal_and_a_notebook_show_the_time_of_every_kernel():
    report = a_report()
    for text in (printed(report, 160), printed(report, 200), report._repr_html_(), report.markdown()):
        assert "…" not in text
        for name, seconds in report.layers[0].times.items():
            assert name in text, name
            assert f"{1e3 * seconds:.3f}" in text, name
    assert max(map(len, printed(report, 160).splitlines())) <= 160


def test_a_notebook_gets_html_that_escapes_names():
    report = dataclasses.replace(a_report(), note="<b>")
    report = dataclasses.replace(report, layers=(dataclasses.replace(report.layers[0], name="<script>"),))
    shown = report._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert shown.count("<table>") == shown.count("</table>") == 2


def test_print_obeys_columns(monkeypatch, capsys):
    for columns in (80, 160):
        monkeypatch.setenv("COLUMNS", str(columns))
        a_report().print()
        assert max(map(len, capsys.readouterr().out.splitlines())) <= columns
    monkeypatch.delenv("COLUMNS")
    a_report().print()
    assert "kernels, ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is no speed report"),
        ("[" * 100000, "is no speed report"),
        ("[]", "no speed report"),
        ("{}", "no speed report"),
        ('{"format": 99}', "of format 99"),
        ('{"format": 1, "machine": 3}', "no speed report"),
    ],
)
def test_a_broken_report_is_one_clear_error(tmp_path, text, match):
    path = tmp_path / "speed.json"
    path.write_text(text)
    with pytest.raises(MuwsError, match=match):
        SpeedReport.load(path)
    with pytest.raises(StateError, match="cannot be read"):
        SpeedReport.load(tmp_path / "nothing.json")


def test_a_stored_choice_is_used_without_timing(monkeypatch, tmp_path):
    always_fast(monkeypatch)
    model, x = resnet(), normal(0, 2, 3, 12, 12, dtype=torch.float32)
    _, report = accelerate(model, x)
    report.save(tmp_path / "speed.json")
    monkeypatch.setattr("lightning_muws.runtime.measure.layer.race", None)
    monkeypatch.setattr(network, "race", None)
    for plan in (report, tmp_path / "speed.json", str(tmp_path / "speed.json")):
        fast, again = accelerate(model, x, plan=plan)
        assert again.layers == report.layers
        assert again.note
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
        assert type(fast[7]) is type(accelerate_module.KERNELS[report.layers[-1].winner](model[7], (4, 4), x[:, 0, 0]))


STALE = {
    "cpu": lambda d: d["machine"].update(cpu="an abacus"),
    "torch_version": lambda d: d["machine"].update(torch_version="0.1"),
    "threads": lambda d: d["machine"].update(threads=99),
    "inputs": lambda d: d.update(inputs=[[9, 32]]),
    "min_gain": lambda d: d.update(min_gain=3.0),
    "other names": lambda d: d["layers"][0].update(name="x"),
    "other weights pruned": lambda d: d["layers"][0].update(n_nonzero=1),
    "no kernel": lambda d: d["layers"][0].update(winner="quantum"),
}


@pytest.mark.parametrize("why", list(STALE))
def test_a_stored_choice_is_stale_elsewhere_and_for_other_weights(monkeypatch, why):
    always_fast(monkeypatch)
    _, report = accelerate(mlp(), torch.zeros(2, 32))
    values = json.loads(json.dumps(report.to_dict()))
    STALE[why](values)
    with pytest.warns(UserWarning, match=f"ignoring the saved plan .*{why}.*; measuring again"):
        _, again = accelerate(mlp(), torch.zeros(2, 32), plan=SpeedReport.from_dict(values))
    assert again.note == ""
    assert again.layers == report.layers


# Export: the dense-shaped network with exact zeros


def test_an_exported_network_with_zeros_is_equal():
    model, x = resnet(), normal(0, 2, 3, 12, 12, dtype=torch.float32)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
    assert sum(int((p == 0).sum()) for p in exported.parameters()) == sum(
        int((p == 0).sum()) for p in model.parameters()
    )


def test_what_is_accelerated_can_be_compiled_and_exported_as_one_graph(monkeypatch):
    always_fast(monkeypatch)
    model, x = resnet(), normal(0, 2, 3, 12, 12, dtype=torch.float32)
    fast, report = accelerate(model, x, kernels=["native"])
    if report.machine.native == "none":
        pytest.skip("the native kernels are not built here")
    expected = fast(x)
    exported = torch.export.export(fast, (x,))
    assert sum("lightning_muws" in str(node.target) for node in exported.graph.nodes) == len(report.layers)
    torch.testing.assert_close(exported.module()(x), expected)
    torch.testing.assert_close(torch.compile(fast, backend="eager", fullgraph=True)(x), expected)


# CUDA


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", TORCH_ROWS)
def test_torch_kernels_equal_the_layer_on_cuda(name):
    if name == "bsr":
        layer, block_shape = fill(nn.Linear(256, 128), 0, (32, 32), 0.8), (32, 32)
    else:
        layer, block_shape = APPLIES[name]()
    shape = (3, 20, 7, 6) if isinstance(layer, nn.Conv2d) else (64, layer.in_features)
    layer, x = layer.cuda(), normal(7, *shape, dtype=torch.float32).cuda()
    kernel = KERNELS[name](layer, block_shape, x)
    assert kernel is not None
    assert relative_error(kernel(x), reference(layer, x)) <= 2e-3  # TF32 may be in use


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_network_is_accelerated_on_cuda():
    model, x = resnet().cuda(), normal(0, 2, 3, 12, 12, dtype=torch.float32).cuda()
    fast, report = accelerate(model, x)
    assert report.machine.device == torch.cuda.get_device_name()
    torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-3)


def test_observing_changes_nothing():
    model = mlp()
    calls = observe(model, Example.of(torch.zeros(2, 32)))
    assert calls[model[0]].n == 1
    assert not any(m._forward_pre_hooks for m in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.zeros(1, 32))
