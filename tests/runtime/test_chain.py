"""A chain computes what its layers compute one by one: bit for bit, for any shape, and from several threads."""

import copy
import io
import pickle
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_muws.errors import StateError
from lightning_muws.runtime.accelerate import accelerate
from lightning_muws.runtime.kernels import native
from lightning_muws.runtime.kernels.base import LAYER_TYPES
from lightning_muws.runtime.kernels.native_int8 import Activation, build_static
from lightning_muws.runtime.measure import network
from lightning_muws.runtime.native import library
from lightning_muws.runtime.native.arena import LINE, SLACK, Life, place
from lightning_muws.runtime.rewrite.chain import PROGRAMS, Chain, chain
from lightning_muws.runtime.rewrite.graph import fuse
from lightning_muws.runtime.rewrite.observe import Example, Root, observe, replace_module
from tests.runtime.test_native import pruned
from tests.support.strategies import normal

LEVELS = library.levels()
needs_kernels = pytest.mark.skipif(library.level() is None, reason="the native kernels are not built")


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    with torch.inference_mode():
        yield


class Residual(nn.Module):
    """What a chain can be made of: layers, sums, ReLUs, a shortcut with weights, a mean."""

    def __init__(self, kernel=3, stride=2):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, kernel, padding=kernel // 2)
        self.one = nn.Sequential(nn.Conv2d(8, 12, 3, stride, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1))
        self.shortcut = nn.Conv2d(8, 12, 1, stride)
        self.two = nn.Conv2d(12, 12, 3, padding=1, groups=2)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.one(x) + self.shortcut(x))
        return self.head(torch.relu(self.two(x) + x))


def mlp():
    return nn.Sequential(nn.Linear(19, 70), nn.ReLU(), nn.Linear(70, 33), nn.Linear(33, 6))


def swapped(model: nn.Module, x: Tensor, kinds: str = "8") -> Root:
    """Return the network with every layer pruned and native; ``kinds`` names each in turn: 8 bits, or float32."""
    root = Root(model.eval())
    for i, layer in enumerate(m for m in root.modules() if isinstance(m, LAYER_TYPES)):
        pruned(layer, (4, 4), 0.5, i)
    seen = [(m, calls.inputs[0]) for m, calls in observe(root, Example.of(x)).items() if type(m) in LAYER_TYPES]
    for i, (layer, y) in enumerate(seen):
        rounding = Activation.of(float(y.min()), 0.9 * float(y.max()))
        as_float = kinds[i % len(kinds)] == "f"
        kernel = native.build(layer, (4, 4), y) if as_float else build_static(layer, y, rounding)
        replace_module(root, layer, kernel)
    return root


def both(model: nn.Module, x: Tensor, kinds: str = "8") -> tuple[Root, Root]:
    """Return the network with fused steps, and with chains."""
    root = swapped(model, x, kinds)
    fused, chained = copy.deepcopy(root), copy.deepcopy(root)
    fuse(fused, Example.of(x))
    assert chain(chained, Example.of(x)) == 1
    return fused, chained


def chains_of(root: nn.Module) -> list[Chain]:
    forwards = [m.forward.__self__ for m in root.modules() if "forward" in vars(m)]
    return [m for forward in forwards for m in forward.modules() if isinstance(m, Chain)]


def at_once(call, n):
    """Call a function with 0 to n - 1, each in a thread of its own, and wait."""
    threads = [threading.Thread(target=call, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def images(seed, *shape):
    return normal(seed, *shape, dtype=torch.float32)


@given(st.lists(st.builds(Life, st.integers(0, 500), st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_values_that_live_at_once_do_not_overlap(lives):
    lives = [Life(n, min(a, b), max(a, b)) for n, a, b in lives]
    starts, size = place(lives)
    for i, (one, start) in enumerate(zip(lives, starts, strict=True)):
        assert start % LINE == 0
        assert start + one.n_bytes + SLACK <= size
        for other, place_of in list(zip(lives, starts, strict=True))[:i]:
            together = one.first <= other.last and other.first <= one.last
            apart = start + one.n_bytes + SLACK <= place_of or place_of + other.n_bytes + SLACK <= start
            assert apart or not together


def test_the_arena_is_no_larger_than_what_lives_at_once_in_a_row_of_layers():
    lives = [Life(1000, i, i + 1) for i in range(50)]
    assert place(lives)[1] == 2 * 1088


@needs_kernels
@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("kinds", ["88888f", "f", "8f", "f8888f"])  # the mean has another order of sums than torch's
def test_a_chain_equals_its_layers_one_by_one(name, kinds, monkeypatch):
    monkeypatch.setenv("MUWS_LEVEL", name)
    x = images(0, 2, 3, 12, 20)
    fused, chained = both(Residual(), x, kinds)
    (found,) = chains_of(chained)
    assert len(found.links) == 8  # six layers, the mean and flatten: sums and ReLUs are fused
    for shape in [(2, 3, 12, 20), (1, 3, 12, 20), (5, 3, 12, 20), (1, 3, 33, 17), (3, 3, 3, 3)]:
        x = images(1, *shape)
        torch.testing.assert_close(chained(x), fused(x), rtol=1e-6, atol=1e-6)
    assert all(program for (program,) in found._programs.values())


@needs_kernels
@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("batch", [1, 3, 4, 16, 33])
def test_a_chain_of_linear_layers_is_equal_bit_for_bit(name, batch, monkeypatch):
    monkeypatch.setenv("MUWS_LEVEL", name)
    for shape in [(batch, 19), (batch, 2, 19)]:
        x = images(2, *shape)
        fused, chained = both(mlp(), x)
        assert torch.equal(chained(x), fused(x))
        assert torch.equal(chained(3 * x), fused(3 * x))  # saturates


@needs_kernels
def test_images_through_layers_of_8_bits_are_equal_bit_for_bit():
    model = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 4, 5))
    fused, chained = both(model, images(0, 2, 8, 12, 20))
    for shape in [(2, 8, 12, 20), (1, 8, 32, 32), (3, 8, 11, 9)]:
        assert torch.equal(chained(x := images(1, *shape)), fused(x))


@needs_kernels
def test_nan_goes_where_the_layers_one_by_one_take_it():
    x = images(0, 3, 3, 12, 20)
    fused, chained = both(Residual(), x, "88888f")
    for bad in (float("nan"), float("inf")):
        x[1, 2, 3, 4] = bad
        want = fused(x)
        assert want[1].isnan().any()
        assert torch.equal(chained(x).isnan(), want.isnan())
        torch.testing.assert_close(chained(x), want, rtol=1e-6, atol=1e-6, equal_nan=True)


@needs_kernels
def test_layers_that_round_one_value_in_two_ways_get_their_own_bytes():
    model, x = Residual(), images(0, 2, 3, 12, 20)
    root = swapped(model, x, "88888f")
    root.model.shortcut.activation.copy_(torch.tensor([0.05, 3.0]))
    fused, chained = copy.deepcopy(root), copy.deepcopy(root)
    fuse(fused, Example.of(x))
    chain(chained, Example.of(x))
    torch.testing.assert_close(chained(x), fused(x), rtol=1e-6, atol=1e-6)


@needs_kernels
def test_what_a_program_does_not_know_runs_between_two():
    model = nn.Sequential(*mlp(), nn.Tanh(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7))
    x = images(3, 4, 19)
    root = swapped(model, x)
    fused, chained = copy.deepcopy(root), copy.deepcopy(root)
    fuse(fused, Example.of(x))
    assert chain(chained, Example.of(x)) == 2
    assert torch.equal(chained(x), fused(x))


class Twice(nn.Module):
    """A forward whose ReLU works in place on a value that is read again, and that returns two values."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.b(self.a(x))
        z = F.relu(y, inplace=True)
        return self.c(y), z


@needs_kernels
def test_a_relu_in_place_changes_what_others_read():
    x = images(4, 5, 8)
    root = swapped(Twice(), x)
    chained = copy.deepcopy(root)
    chain(chained, Example.of(x))
    for got, want in zip(chained(x), root(x), strict=True):
        assert torch.equal(got, want)


@needs_kernels
def test_threads_may_call_at_once():
    x = [images(i, 2, 3, 12, 20) for i in range(4)]
    fused, chained = both(Residual(), x[0], "88888f")
    want, failed = [fused(v) for v in x], []

    def call(i):
        with torch.inference_mode():
            right = [torch.allclose(chained(x[i]), want[i], rtol=1e-5, atol=1e-5) for _ in range(30)]
            failed.extend([i] * right.count(False))

    at_once(call, 4)
    assert not failed


@needs_kernels
def test_it_can_be_copied_and_pickled_and_given_other_weights():
    x = images(0, 2, 3, 12, 20)
    _, chained = both(Residual(), x)
    want = chained(x)
    saved = io.BytesIO()
    torch.save(chained, saved)
    saved.seek(0)
    twins = [copy.deepcopy(chained), pickle.loads(pickle.dumps(chained)), torch.load(saved, weights_only=False)]  # noqa: S301  ours
    for twin in twins:
        assert torch.equal(twin(x), want)
    twin = twins[0]
    state = {name: 2 * t if name.endswith("bias") else t for name, t in twin.state_dict().items()}
    twin.load_state_dict(state)
    changed = twin(x)
    assert not torch.equal(changed, want)
    assert torch.equal(chained(x), want)  # the original has its own
    (found,) = chains_of(twin)
    assert torch.equal(found.steps(x), changed)


@needs_kernels
def test_a_chain_keeps_few_programs():
    x = images(0, 1, 3, 9, 9)
    _, chained = both(Residual(), x)
    for n in range(2 * PROGRAMS):
        chained(images(n, n + 1, 3, 9, 9))
    assert len(chains_of(chained)[0]._programs) <= PROGRAMS


@needs_kernels
def test_other_dtypes_and_missing_kernels_are_refused_as_by_the_layers(monkeypatch):
    x = images(0, 1, 3, 9, 9)
    fused, chained = both(Residual(), x)
    for root in (fused, chained):
        with pytest.raises(StateError, match="float32 on the CPU"):
            root(x.double())
    with torch.inference_mode(False), pytest.raises(StateError, match="no gradient"):
        chained(images(0, 1, 3, 9, 9).requires_grad_())


@needs_kernels
def test_it_can_be_exported():
    with torch.inference_mode(False), torch.no_grad():
        x = images(0, 2, 3, 12, 20)
        _, chained = both(Residual(), x, "88888f")
        want = chained(x)
        exported = torch.export.export(chained, (x,)).module()
        torch.testing.assert_close(exported(x), want, rtol=1e-6, atol=1e-6)


@needs_kernels
def test_accelerate_returns_the_chain_if_it_is_fastest_and_reuses_the_choice(monkeypatch):
    def fake(tasks, clock, timing=None, keep=(), between=None):
        seconds = {"native_int8": 0.5, "native": 0.9, "onednn": 0.3, "fast_native": 0.1}
        return {name: [seconds.get(name, 1.0)] * 5 for name in tasks}

    monkeypatch.setattr("lightning_muws.runtime.measure.layer.race", fake)
    monkeypatch.setattr(network, "race", fake)
    with torch.inference_mode(False), torch.no_grad():
        model, x = Residual().eval(), images(0, 2, 3, 12, 20)
        for i, layer in enumerate(m for m in model.modules() if isinstance(m, LAYER_TYPES)):
            pruned(layer, (4, 4), 0.5, i)
        fast, report = accelerate(model, x, dtype=torch.int8, calibration=[x], max_error=0.1)
        assert report.chosen == "fast_native"  # each layer alone is fastest by oneDNN
        assert {layer.winner for layer in report.layers} == {"native_int8"}
        assert len(chains_of(fast)) == 1
        again, _ = accelerate(model, x, dtype=torch.int8, calibration=[x], max_error=0.1, plan=report)
        assert torch.equal(again(x), fast(x))
        assert float((fast(x) - model(x)).abs().max()) < 0.1 * float(model(x).abs().max())


class Attention(nn.Module):
    """A transformer's layer, as the benchmarks have it."""

    def __init__(self, width=24, heads=3):
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 40), nn.GELU(), nn.Linear(40, width))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Sized(nn.Module):
    """A block as timm writes it: sizes from the input's shape, unbind, dropout."""

    def __init__(self, width=24, heads=3):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(0.1)
        self.norm, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.one, self.two, self.act = nn.Linear(width, 40), nn.Linear(40, width), nn.GELU("tanh")

    def attend(self, x):
        B, N, C = x.shape  # noqa: N806  timm's names
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout.p if self.training else 0.0)
        return self.dropout(self.out(x.transpose(1, 2).reshape(B, N, C)))

    def forward(self, x):
        x = x + self.attend(self.norm(x))
        return x + self.two(F.dropout(self.act(self.one(self.norm2(x))), 0.1, self.training))


class Chunked(nn.Module):
    """Attention over parts of one Linear, by names and by methods that a program has to read."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x):
        n, t = x.size(0), x.shape[1]
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = [y.view(n, t, 3, 8).transpose(1, 2) for y in (q, k, v)]
        y = F.scaled_dot_product_attention(query=q, key=k, value=v, scale=0.2)
        y = self.out(y.permute(0, 2, 1, 3).contiguous().view(n, t, -1))
        return F.gelu(y, approximate="tanh")[:, 0]


class Stem(nn.Module):
    """The first layers of a ResNet for large images."""

    def __init__(self):
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 8, 7, 2, 3), nn.MaxPool2d(3, 2, 1)
        self.one, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.one(self.pool(F.relu(self.stem(x))))), 2)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


SMALL_STEPS = {
    "bench": (lambda: nn.Sequential(Attention(), Attention(), nn.LayerNorm(24)), [(2, 9, 24), (1, 9, 24), (5, 1, 24)]),
    "timm": (Sized, [(2, 9, 24), (1, 17, 24), (3, 1, 24)]),
    "chunked": (Chunked, [(2, 9, 24), (4, 3, 24)]),
    "stem": (Stem, [(2, 3, 32, 40), (1, 3, 35, 33), (3, 3, 18, 18)]),
}


@needs_kernels
@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("kinds", ["f", "8", "8f"])
@pytest.mark.parametrize("network", SMALL_STEPS)
def test_the_steps_between_layers_join_the_chain(network, kinds, name, monkeypatch):
    monkeypatch.setenv("MUWS_LEVEL", name)
    make, shapes = SMALL_STEPS[network]
    torch.manual_seed(0)
    fused, chained = both(make(), images(0, *shapes[0]), kinds)
    (found,) = chains_of(chained)
    for shape in shapes:
        x = images(1, *shape)
        want = fused(x)
        # in 8 bits a last bit of an input may be another byte, a step of its layer's inputs
        size = 1e-5 if kinds == "f" else 0.03
        assert float((chained(x) - want).abs().max()) <= size * float(want.abs().max())
    assert len(found._programs) == len(shapes)
    assert all(program for (program,) in found._programs.values())


@needs_kernels
def test_a_network_of_such_steps_is_one_chain_and_nothing_else():
    torch.manual_seed(0)
    _, chained = both(nn.Sequential(Attention(), Attention(), nn.LayerNorm(24)), images(0, 2, 9, 24))
    (outer,) = [m.forward.__self__ for m in chained.modules() if "forward" in vars(m)]
    assert [node.op for node in outer.steps.graph.nodes] == ["placeholder", "call_module", "output"]


@needs_kernels
def test_a_view_that_is_read_after_the_chain_shares_memory_as_in_torch():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            y = self.b(self.a(x))
            flat = y.flatten(1)
            F.relu(y, inplace=True)
            return flat.tanh(), y.tanh()

    x = images(0, 3, 2, 8)
    root = swapped(Shared(), x)
    chained = copy.deepcopy(root)
    assert chain(chained, Example.of(x)) == 1
    for got, want in zip(chained(x), root(x), strict=True):
        assert torch.equal(got, want)


@needs_kernels
def test_a_layer_norm_may_get_other_tensors():
    torch.manual_seed(0)
    x = images(0, 2, 9, 24)
    fused, chained = both(Sized(), x, "f")
    chained(x)
    for root in (fused, chained):
        root.model.norm.weight.data.mul_(-2)  # in place
        root.model.norm2.weight = nn.Parameter(torch.linspace(-1, 1, 24), requires_grad=False)
        root.model.norm2.bias.data = torch.linspace(1, -1, 24)
    torch.testing.assert_close(chained(x), fused(x), rtol=1e-5, atol=1e-5)
    chained.double()
    with pytest.raises(StateError, match="float32 on the CPU"):
        chained(x.double())


@needs_kernels
def test_a_layer_norm_that_wants_a_gradient_is_refused_as_by_the_layers():
    torch.manual_seed(0)
    x = images(0, 2, 9, 24)
    _, chained = both(Sized(), x, "f")
    chained(x)
    with torch.inference_mode(False):
        copied = copy.deepcopy(chained)
        for module in copied.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight = nn.Parameter(torch.ones(24))
        with pytest.raises(StateError, match="no gradient"):
            copied(x.clone())


@needs_kernels
@pytest.mark.parametrize("kinds", ["f", "8"])
def test_small_steps_are_copied_pickled_exported_and_called_at_once(kinds):
    with torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(0)
        x = [images(i, 2, 9 + i, 24) for i in range(3)]
        _, chained = both(Sized(), x[0], kinds)
        want = [chained(v) for v in x]
        for twin in (copy.deepcopy(chained), pickle.loads(pickle.dumps(chained))):  # noqa: S301  ours
            assert all(torch.equal(twin(v), w) for v, w in zip(x, want, strict=True))
        exported = torch.export.export(chained, (x[0],)).module()
        size = 1e-5 if kinds == "f" else 0.03
        assert float((exported(x[0]) - want[0]).abs().max()) <= size * float(want[0].abs().max())
        wrong = []

        def call(i):
            with torch.no_grad():
                wrong.extend(i for _ in range(20) if not torch.equal(chained(x[i]), want[i]))

        at_once(call, 3)
        assert not wrong


@needs_kernels
def test_nan_passes_through_small_steps_as_through_torch():
    torch.manual_seed(0)
    x = images(0, 3, 9, 24)
    for kinds in ("f", "8"):
        fused, chained = both(Sized(), x, kinds)
        bad = x.clone()
        bad[1, 2, 3] = float("nan")
        assert torch.equal(chained(bad).isnan(), fused(bad).isnan())
        assert chained(bad)[1].isnan().any()
        assert not chained(bad)[0].isnan().any()


class ByName(nn.Module):
    """Modules, functions and methods that are called by the names of their arguments."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.drop, self.act = nn.Linear(24, 48), nn.Linear(24, 24), nn.Dropout(0.5), nn.GELU()

    def forward(self, x):
        a, b = torch.chunk(input=self.one(x), chunks=2, dim=-1)
        return self.two(self.act(self.drop(input=a))) + torch.flatten(input=b.unsqueeze(1), start_dim=0, end_dim=1)


@needs_kernels
def test_calls_by_name_are_left_to_torch():
    x = images(0, 5, 24)
    root = swapped(ByName(), x, "f")
    want = root(x)
    chain(root, Example.of(x))
    torch.testing.assert_close(root(x), want, rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("between", [nn.GELU, nn.ReLU, nn.Identity, lambda: nn.LayerNorm(24), lambda: nn.Dropout(0.5)])
def test_a_step_with_a_hook_stays_in_torch(between):
    module = between().eval()
    module.register_forward_hook(lambda module, inputs, y: 2 * y)
    x = images(0, 5, 24)
    root = swapped(nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24), module, nn.Linear(24, 24), nn.Linear(24, 24)), x)
    want = root(x)
    chain(root, Example.of(x))
    torch.testing.assert_close(root(x), want)


class Scalar(nn.Module):
    """A value without dimensions among the inputs of a chain."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x):
        mean = F.gelu(x.mean())
        return self.two(F.gelu(self.one(x))) * mean


@needs_kernels
def test_a_number_beside_a_batch_runs_as_in_torch():
    x = images(0, 5, 24)
    root = swapped(Scalar(), x, "f")
    want = root(x)
    chain(root, Example.of(x))
    torch.testing.assert_close(root(x), want, rtol=1e-5, atol=1e-5)
