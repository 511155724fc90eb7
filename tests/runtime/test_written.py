"""A chain as one operator of torch: it computes what the chain does, traced, compiled, saved and loaded."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_muws.errors import StateError
from lightning_muws.runtime.kernels import native
from lightning_muws.runtime.native import library
from lightning_muws.runtime.native import written as module
from lightning_muws.runtime.native.ops import program_op
from lightning_muws.runtime.native.written import one_by_one, program, read, tensors_of, traced, written
from tests.runtime.test_chain import SMALL_STEPS, Residual, both, chains_of, images, mlp
from tests.runtime.test_native import pruned
from tests.support.strategies import normal

pytestmark = pytest.mark.skipif(library.level() is None, reason="the native kernels are not built")
OPERATOR = "lightning_muws.program.default"
KINDS = st.text("8f", min_size=1, max_size=6)


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    with torch.no_grad():  # torch.export takes no tensors of inference mode
        yield


def operators(exported: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in exported.graph.nodes if "lightning_muws" in str(node.target)]


@settings(max_examples=15)
@given(KINDS, st.integers(1, 4), st.integers(6, 20), st.integers(0, 99))
def test_the_operator_computes_what_the_chain_does_for_every_shape(kinds, n, width, seed):
    _, chained = both(Residual(), images(0, 2, 3, 9, 12), kinds)
    (chain,) = chains_of(chained)
    large, small = tensors_of(chain._calls())
    x = images(seed, n, 3, 9, width)
    (y,) = program_op([x], large, small, chain.text)
    assert torch.equal(y, chained(x))
    assert [like.shape for like in traced([x], large, small, chain.text)] == [y.shape]
    (again,) = one_by_one([x], *read(chain.text, large, small))
    assert torch.equal(again, chain.steps(x))


@settings(max_examples=20)
@given(KINDS, st.sampled_from(sorted(SMALL_STEPS)))
def test_what_is_written_is_read(kinds, network):
    make, (shape, *_) = SMALL_STEPS[network]
    _, chained = both(make(), images(0, *shape), kinds)
    (chain,) = chains_of(chained)
    calls = chain._calls()
    found, outputs = read(written(calls, chain.outputs), *tensors_of(calls))
    assert outputs == list(chain.outputs)
    assert [call.inputs for call in found] == [call.inputs for call in calls]
    assert all(a is b for a, b in zip(flat(tensors_of(found)), flat(tensors_of(calls)), strict=True))
    assert written(found, outputs) == chain.text
    assert [type(call.operation) for call in found] == [type(call.operation) for call in calls]


def flat(lists):
    return [tensor for tensors in lists for tensor in tensors]


NETWORKS = {"residual": (Residual, [(2, 3, 12, 20)]), "mlp": (mlp, [(2, 19)]), **SMALL_STEPS}


@pytest.mark.parametrize("kinds", ["8", "f", "88f"])
@pytest.mark.parametrize("network", NETWORKS)
def test_an_exported_chain_is_one_operator_with_the_same_bits(kinds, network):
    torch.manual_seed(0)
    make, (shape, *_) = NETWORKS[network]
    x = images(0, *shape)
    _, chained = both(make(), x, kinds)
    (chain,) = chains_of(chained)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(chained, (x,), dynamic_shapes=(({0: batch},),))  # Root takes *args
    assert operators(exported) == [OPERATOR]
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n in (2, 3, 7):
        y = images(n, n, *shape[1:])
        assert torch.equal(loaded(y), chained(y))
        one = one_by_one([y], *read(chain.text, *tensors_of(chain._calls())))
        assert torch.equal(one[0], chain.steps(y))


def test_a_compiled_chain_is_one_operator_and_follows_new_weights():
    x = images(0, 2, 3, 12, 20)
    _, chained = both(Residual(), x, "8f")
    _, other = both(Residual(), x, "8f")
    for name, buffer in other.named_buffers():
        if name.endswith(("weights", "bias")) and buffer.is_floating_point():
            buffer.mul_(0.5)
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if "lightning_muws" in str(node.target))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(chained, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), chained(x))
    assert seen == [OPERATOR]
    before = compiled(x).clone()
    chained.load_state_dict(other.state_dict())
    assert torch.equal(compiled(x), other(x))
    assert not torch.equal(before, other(x))


def test_nan_goes_through_as_in_the_chain():
    x = images(0, 2, 3, 12, 20)
    _, chained = both(Residual(), x, "8")
    exported = torch.export.export(chained, (x,)).module()
    broken = x.clone()
    broken[1, 2, 3, 4] = float("nan")
    y = exported(broken)
    assert y.isnan().any()
    torch.testing.assert_close(y, chained(broken), rtol=0, atol=0, equal_nan=True)


def test_small_tensors_are_known_by_their_numbers():
    x = images(0, 2, 19)
    _, chained = both(mlp(), x, "8")
    (chain,) = chains_of(chained)
    large, small = tensors_of(chain._calls())
    assert small
    module._programs.clear()
    for _ in range(3):  # other memory each time, as in a program of AOTInductor
        (y,) = program([x], large, [t.clone() for t in small], chain.text)
        assert torch.equal(y, chained(x))
    assert len(module._programs) == 1
    wider = [2 * t if t.dtype == torch.float32 and t.numel() == 2 else t for t in small]
    (y,) = program([x], large, wider, chain.text)
    (expected,) = one_by_one([x], *read(chain.text, large, wider))
    assert torch.equal(y, expected)
    assert not torch.equal(y, chained(x))


def test_what_a_program_cannot_take_is_refused():
    x = images(0, 2, 19)
    _, chained = both(mlp(), x, "f")
    (chain,) = chains_of(chained)
    tensors = tensors_of(chain._calls())
    with pytest.raises(StateError, match="float32 on the CPU"):
        program_op([x.double()], *tensors, chain.text)
    with pytest.raises(StateError, match="19 inputs or channels got 20"):
        program_op([images(0, 2, 20)], *tensors, chain.text)
    with torch.enable_grad(), pytest.raises(StateError, match="no gradient"):
        program_op([x.clone().requires_grad_()], *tensors, chain.text)


def bfloat16(seed):
    layer = torch.nn.Linear(64, 64)
    pruned(layer, (4, 4), 0.5, seed)
    return layer


@pytest.mark.skipif(library.level() != library.BFLOAT16_LEVEL, reason="this CPU has no bfloat16 dot product")
def test_a_bfloat16_layer_follows_columns_that_are_loaded_in_place():
    x = normal(0, 8, 64, dtype=torch.float32)
    layer, other = bfloat16(0), bfloat16(0)
    other.weight.data = layer.weight.data.roll(8, 1).contiguous()  # as many blocks, elsewhere
    kernel, wanted = native.build_bfloat16(layer, (4, 4), x), native.build_bfloat16(other, (4, 4), x)
    with_relu = kernel.with_relu()
    kernel(x), with_relu(x)  # makes plans
    assert kernel.geometry.mark != wanted.geometry.mark
    kernel.load_state_dict(wanted.state_dict())
    assert torch.equal(kernel(x), wanted(x))
    assert torch.equal(with_relu(x), wanted(x).relu())
    assert torch.equal(copy.deepcopy(kernel)(x), wanted(x))
