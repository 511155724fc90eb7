"""A program for a part of a batch at a time computes what the program for the whole batch computes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_muws.errors import StateError
from lightning_muws.runtime.kernels.native_int8 import Activation, build_static
from lightning_muws.runtime.native import library, parts
from lightning_muws.runtime.native.parts import Parts, is_by_sample, prepared
from lightning_muws.runtime.native.program import Program
from lightning_muws.runtime.native.steps import Affine, Call, Norm, Simple
from lightning_muws.runtime.native.views import ordered
from tests.support.strategies import normal

LEVELS = library.levels()
pytestmark = pytest.mark.skipif(library.level() is None, reason="the native kernels are not built")


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    with torch.inference_mode():
        yield


def f32(seed, *shape):
    return normal(seed, *shape, dtype=torch.float32)


def chain_of(*operations):
    return [Call(operation, (i,)) for i, operation in enumerate(operations)]


def network(heads=3, width=24):
    """Return the steps of a transformer's layer in 8 bits, by one Linear for queries, keys and values."""
    torch.manual_seed(0)
    rounding = Activation.of(-2.0, 2.0)
    example = f32(0, 1, 9, width)
    qkv, out = (build_static(nn.Linear(width, n), example, rounding).step(width) for n in (3 * width, width))
    norm = Norm(Affine(None, None), width, 1e-5)
    return [
        Call(norm, (0,)),
        Call(qkv, (1,)),
        Call(Simple("unflatten", (-1, 3, heads, -1)), (2,)),
        Call(Simple("permute", (2, 0, 3, 1, 4)), (3,)),
        *(Call(Simple("select", (0, i)), (4,)) for i in range(3)),
        Call(Simple("attention"), (5, 6, 7)),
        Call(Simple("transpose", (1, 2)), (8,)),
        Call(Simple("flatten", (2, -1)), (9,)),
        Call(out, (10, 0)),
        Call(Simple("gelu"), (11,)),
    ]


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("batch", [2, 5, 32])
def test_parts_are_the_whole_bit_for_bit(name, batch, monkeypatch):
    monkeypatch.setenv("MUWS_LEVEL", name)
    monkeypatch.setattr(parts, "PART_BYTES", 40_000)
    monkeypatch.setattr(parts, "FEWEST_ROWS", 9)
    calls, x = network(), f32(1, batch, 9, 24)
    whole, cut = Program(calls, [x.shape], [12, 11]), prepared(calls, [x.shape], [12, 11])
    assert isinstance(cut, Parts) == (batch == 32)
    for one, other in zip(whole([x]), cut([x]), strict=True):
        assert torch.equal(one, other)
    assert cut.n_bytes <= whole.n_bytes
    assert cut.is_current()
    x[-1, -1, -1] = float("nan")
    assert whole([x]) is None
    assert cut([x]) is None


def test_a_part_has_enough_rows_and_the_sizes_differ_by_one(monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 1000)
    cut = prepared(network(), [(33, 9, 24)], [12])
    sizes = [n for _, n in cut.programs]
    assert sum(sizes) == 33
    assert max(sizes) - min(sizes) <= 1
    assert 9 * min(sizes) >= parts.FEWEST_ROWS - 9
    assert isinstance(prepared(network(), [(7, 9, 24)], [12]), Program)


VIEWS = [
    Simple("transpose", (0, 1)),
    Simple("transpose", (-1, -2)),
    Simple("permute", (1, 2, 0)),
    Simple("permute", (0, 2, 1)),
    Simple("select", (0, 0)),
    Simple("select", (1, 0)),
    Simple("select", (-1, 0)),
    Simple("unflatten", (1, 2, -1)),
    Simple("unflatten", (0, 2, -1)),
    Simple("flatten", (0, 1)),
    Simple("flatten", (1, 2)),
    Simple("flatten", (-2, -1)),
    Simple("chunk", (2, 0, 1)),
    Simple("chunk", (2, 1, 0)),
    Simple("reshape", (0, 0, 1, 1, -1, 0, -1, 1)),
    Simple("reshape", (-1, 0, -1, 1, -1, 0, 2, 1)),
    Simple("reshape", (0, 0, 1, 2, -1, 0, 4, 1, -1, 0, -1, 1)),
    Simple("reshape", (0, 0, 1, 1, 0, 0, 1, 1, -1, 0, -1, 1)),
    Simple("contiguous"),
    Simple("gelu"),
]


@given(st.lists(st.sampled_from(VIEWS), min_size=1, max_size=5))
def test_what_is_said_to_be_by_sample_is(operations):
    calls, n, x = chain_of(*operations), 8, f32(0, 8, 4, 6)
    try:
        whole = Program(calls, [x.shape], [len(calls)])
    except StateError:  # the views do not fit each other
        return
    if not is_by_sample(ordered(calls, [x.shape], [len(calls)]), 1):
        return
    (want,) = whole([x])
    for size in (1, 2, 5):
        made = [Program(calls, [x[i : i + size].shape], [len(calls)])([x[i : i + size]]) for i in range(0, n, size)]
        assert torch.equal(torch.cat([y for (y,) in made]), want)


@pytest.mark.parametrize(
    ("operations", "expected"),
    [
        ([Simple("gelu"), Simple("flatten", (1, 2))], True),
        ([Simple("transpose", (0, 1)), Simple("transpose", (1, 0)), Simple("gelu")], True),
        ([Simple("permute", (1, 0, 2)), Simple("unflatten", (0, 2, -1)), Simple("permute", (2, 0, 1, 3))], True),
        ([Simple("transpose", (0, 1)), Simple("gelu"), Simple("transpose", (0, 1))], False),  # rows of another order
        ([Simple("transpose", (0, 1))], False),
        ([Simple("flatten", (0, 1))], False),
        ([Simple("select", (0, 0))], False),
        ([Simple("chunk", (2, 0, 0))], False),
        ([Simple("reshape", (-1, 0, 8, 1, -1, 0, -1, 1))], False),  # a size that holds for this batch alone
    ],
)
def test_samples_that_are_mixed_are_found(operations, expected):
    calls = chain_of(*operations)
    assert is_by_sample(ordered(calls, [(8, 4, 6)], [len(calls)]), 1) == expected


def test_inputs_of_two_batches_are_not_cut():
    calls = [Call(Simple("gelu"), (0,)), Call(Simple("gelu"), (1,))]
    assert is_by_sample(ordered(calls, [(8, 4), (8, 4)], [2, 3]), 2)
    assert not is_by_sample(ordered(calls, [(8, 4), (4, 4)], [2, 3]), 2)
    assert not is_by_sample(ordered(calls[:1], [(8,)], [1]), 1)  # one row, whose numbers are no samples


@pytest.mark.parametrize("batch", [0, -3])
def test_a_size_that_counts_the_samples_mixes_them_however_it_is_named(batch, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 1)
    step = build_static(nn.Linear(24, 48), f32(0, 1, 96, 24), Activation.of(-2.0, 2.0)).step(24)
    sizes = (0, 0, 1, 1, 0, batch, 1, 2, -1, 0, -1, 1)  # (n, n // 2, -1)
    calls = chain_of(
        step, Simple("reshape", sizes), Simple("transpose", (1, 2)), Simple("flatten", (1, 2)), Simple("gelu")
    )
    assert not is_by_sample(ordered(calls, [(64, 96, 24)], [5]), 1)
    x = f32(1, 64, 96, 24)
    assert torch.equal(prepared(calls, [x.shape], [5])([x])[0], Program(calls, [x.shape], [5])([x])[0])
