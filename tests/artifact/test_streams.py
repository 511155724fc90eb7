"""Patterns and streams: each kind by its definition, values within their bound, everything else to the bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_muws import MicroStructure
from lightning_muws.artifact import block_shape, streams
from lightning_muws.artifact.block_shape import shared_shapes, smallest_shape
from lightning_muws.artifact.source import Stored
from lightning_muws.artifact.streams import Parts, join, pack_kinds, pack_signs, split, unpack_kinds, unpack_signs
from lightning_muws.artifact.values import STEPS, Form, Loss, bits, choose
from lightning_muws.errors import FormatError, SettingError
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.pieces import pack
from tests.support.strategies import DTYPES, normal, same_bits, small_integers

SHAPES = st.sampled_from([(1, 1), (1, 2), (2, 2), (3, 2), (4, 1), (2, 5), (4, 4)])


def test_the_kinds_of_five_blocks():
    w = torch.tensor([[1.0, -1.0, 0.0, 0.0, 2.0, 2.0, -3.0, -3.0, 1.0, 2.0]])
    parts = split(bits(w), (1, 2))
    assert parts.kinds.tolist() == [1, 2, 3, 4, 0]
    assert parts.signs.reshape(-1).tolist() == [False, True]
    assert parts.magnitudes.view(np.float32).tolist() == [1.0, 2.0, 3.0]
    assert parts.free.view(np.float32).reshape(-1).tolist() == [1.0, 2.0]


@st.composite
def matrices(draw):
    """Return patterns of a matrix of whole blocks, full of equal magnitudes, and the block shape."""
    rows, cols = draw(SHAPES)
    shape = rows * draw(st.integers(1, 5)), cols * draw(st.integers(1, 5))
    make = draw(st.sampled_from([normal, small_integers]))
    w = make(draw(st.integers(0, 10**6)), *shape, dtype=draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()):
        w = MicroStructure((rows, cols), 0.3, 0.4).project(w)
    if draw(st.booleans()):
        w = torch.where(normal(draw(st.integers(0, 99)), *shape) > 0, w, -torch.zeros_like(w))  # full of -0.0
    return bits(w), (rows, cols)


@given(matrices())
def test_join_undoes_split(given_):
    u, shape = given_
    out = np.empty_like(u)
    join(split(u, shape), out, shape)
    assert np.array_equal(out, u)


@given(matrices())
def test_kinds_are_what_they_say(given_):
    u, (rows, cols) = given_
    sign = np.array(1 << (8 * u.itemsize - 1), u.dtype)
    kinds = iter(split(u, (rows, cols)).kinds)
    for i in range(0, len(u), rows):
        for j in range(0, u.shape[1], cols):
            block = u[i : i + rows, j : j + cols]
            magnitudes, negative = block & ~sign, (block & sign) != 0
            if not block.any():
                expected = 2
            elif (magnitudes != magnitudes[0, 0]).any():
                expected = 0
            else:
                expected = 3 if not negative.any() else 4 if negative.all() else 1
            assert next(kinds) == expected


@given(st.integers(0, 10**6))
def test_the_kinds_are_those_of_a_support(seed):
    structure = MicroStructure((4, 4), 0.4, 0.3)
    w = normal(seed, 16, 24, dtype=torch.float32)
    support, projected = structure.support(w), structure.project(w)
    kinds = split(bits(projected), (4, 4)).kinds
    assert np.array_equal(np.where(kinds > 2, 1, kinds), support.kinds.flatten().numpy())
    assert [int((kinds == kind).sum()) for kind in (Kind.DENSE, Kind.PRUNED)] == [7, 10]


@given(st.lists(st.integers(0, 4), max_size=20))
def test_kinds_three_a_byte(kinds):
    kinds = np.array(kinds, np.uint8)
    assert len(pack_kinds(kinds)) == -(-len(kinds) // 3)
    assert np.array_equal(unpack_kinds(pack_kinds(kinds), len(kinds)), kinds)


def test_a_byte_of_no_kinds_is_refused():
    with pytest.raises(FormatError, match="125 stands for no kinds"):
        unpack_kinds(np.array([124, 125], np.uint8), 6)


@given(st.lists(st.booleans(), max_size=40))
def test_signs_lie_as_in_checkpoints(signs):
    signs = np.array(signs, bool)
    assert pack_signs(signs).tolist() == pack(torch.from_numpy(signs)).tolist()
    assert np.array_equal(unpack_signs(pack_signs(signs), len(signs)), signs)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
def test_rotate_moves_the_sign_to_the_end(dtype):
    u = np.array([1, 1 << (8 * np.dtype(dtype).itemsize - 1)], dtype)
    assert streams.rotate(u).tolist() == [2, 1]
    assert np.array_equal(streams.rotate_back(streams.rotate(u)), u)
    assert [int(streams.plane(u, i)[0]) for i in range(u.itemsize)] == [1] + [0] * (u.itemsize - 1)


def test_an_empty_matrix_has_no_parts():
    u = np.zeros((0, 8), np.uint32)
    assert all(len(part) == 0 for part in split(u, (4, 4)))
    join(Parts(*(part for part in split(u, (4, 4)))), u, (4, 4))


# ---- values


@given(st.integers(0, 10**6), st.sampled_from(DTYPES), st.integers(1, 127), st.floats(1e-3, 1e3))
def test_whole_multiples_of_a_step_are_found_and_exact(seed, dtype, largest, step):
    wide = torch.promote_types(dtype, torch.float32)
    steps = torch.randint(-largest, largest + 1, (40, 30), generator=torch.Generator().manual_seed(seed))
    steps[0, 0] = 1
    w = (steps.to(wide) * torch.tensor(step, dtype=wide)).to(dtype)
    form = choose(w, None, Loss(), 1.0)
    if dtype in (torch.float32, torch.float64):
        assert form.stored == STEPS
    assert same_bits(form.values(form.patterns(w), dtype), w)


@given(st.integers(0, 10**6), st.sampled_from(DTYPES))
def test_a_lossless_form_is_exact_and_ordinary_weights_stay_as_they_are(seed, dtype):
    w = normal(seed, 30, 20, dtype=dtype)
    form = choose(w, BlockGrid(), Loss(), 1.0)
    assert same_bits(form.values(form.patterns(w), dtype), w)
    if dtype in (torch.float32, torch.float64):
        assert form == Form(str(dtype).removeprefix("torch."))


@given(st.integers(0, 10**6), st.sampled_from(DTYPES), st.sampled_from([0.3, 0.05, 2**-8, 2**-11, 1e-4]), st.booleans())
def test_a_lossy_form_keeps_its_bound_and_every_unified_block(seed, dtype, max_error, is_tiny):
    structure = MicroStructure((2, 2), 0.3, 0.4)
    w = structure.project(normal(seed, 16, 20, dtype=dtype))
    if is_tiny:  # unified blocks far below the bound
        w = torch.where(split_mask(w), w / 64, w)
    largest = float(w.abs().max())
    form = choose(w, BlockGrid((2, 2)), Loss(max_error), largest)
    u = form.patterns(w, (2, 2))
    decoded = form.values(u, dtype)
    assert (decoded.double() - w.double()).abs().max() <= max_error * largest
    before, after = split(bits(w), (2, 2)).kinds, split(u, (2, 2)).kinds
    unified = streams.is_unified(before)
    assert streams.is_unified(after)[unified].all()
    assert (after[before == Kind.PRUNED] == Kind.PRUNED).all()
    zero = BlockGrid((2, 2)).split(decoded).abs().sum(1) == 0
    assert not zero[torch.from_numpy(unified)].any()


def split_mask(w: torch.Tensor) -> torch.Tensor:
    kinds = torch.from_numpy(streams.is_unified(split(bits(w), (2, 2)).kinds))
    return BlockGrid((2, 2)).merge(kinds[:, None].expand(-1, 4), torch.zeros(w.shape, dtype=torch.bool))


def test_a_coarse_bound_rounds_small_free_weights_to_plain_zeros():
    w = torch.tensor([[1.0, -0.01], [0.02, -0.5]])
    form = choose(w, None, Loss(0.1), 1.0)
    decoded = form.values(form.patterns(w), torch.float32)
    assert decoded[0, 1] == 0
    assert not torch.signbit(decoded[0, 1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_exact(value):
    w = torch.tensor([[1.0, value]])
    for lossy in (Loss(), Loss(0.1), Loss(value_dtype="float16")):
        assert choose(w, None, lossy, 1.0) == Form("float32")


def test_a_dtype_that_would_overflow_or_lose_a_block_is_not_taken():
    half = Loss(value_dtype="float16")
    assert choose(torch.full((4, 4), 1e6), BlockGrid(), half, 1.0) == Form("float32")
    assert choose(torch.full((4, 4), 1e-9), BlockGrid(), half, 1.0) == Form("float32")
    assert choose(torch.full((4, 4), 1e-9), None, half, 1.0) == Form("float16")
    assert choose(torch.full((4, 4), 1e-9), BlockGrid(), Loss(value_dtype="bfloat16"), 1.0) == Form("bfloat16")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_error": -1.0}, "max_error=-1.0"),
        ({"max_error": float("nan")}, "max_error=nan"),
        ({"max_error": True}, "max_error=True"),
        ({"max_error": "1"}, "max_error='1'"),
        ({"relative_to": "norm"}, "relative_to='norm' is not allowed: give 'tensor_max' or 'model_max' or 'absolute'"),
        ({"value_dtype": "int8"}, "value_dtype='int8'"),
        ({"lossy": "norms"}, "lossy='norms'"),
        ({"max_error": 0.1, "value_dtype": "float16"}, "give one of them"),
    ],
)
def test_wrong_settings_are_refused(settings, says):
    with pytest.raises(SettingError, match=says):
        Loss(**settings)


# ---- block shapes


@pytest.mark.parametrize("shape", [(2, 2), (1, 4), (4, 1), (4, 4), (8, 8), (1, 16), (16, 4)])
@pytest.mark.parametrize("size", [(64, 96), (4096, 512)])
def test_the_shape_that_was_trained_is_found(shape, size):
    w = MicroStructure(shape, 0.5, 0.3).project(normal(0, *size, dtype=torch.float32))
    assert smallest_shape(w) == shape


def test_zeros_anywhere_are_found_and_dense_weights_left_flat():
    w = normal(0, 64, 96, dtype=torch.float32)
    assert smallest_shape(w) is None
    assert smallest_shape(torch.where(w.abs() > 1.5, w, 0.0)) == (1, 1)
    assert smallest_shape(torch.zeros(0, 4)) is None
    assert smallest_shape(torch.zeros(2, 1 << 20)) is None


def test_tiny_tensors_of_one_shape_share_the_work_and_the_block_shape(monkeypatch):
    structure = MicroStructure((2, 2), 0.5, 0.25)
    tensors = {f"s{i}": structure.project(normal(i, 8, 8, dtype=torch.float32)) for i in range(300)}
    tensors |= {f"d{i}": normal(i, 8, 8, dtype=torch.float32) for i in range(300)}
    tensors |= {f"c{i}": structure.project(normal(i, 8, 3, 3, 3)).half() for i in range(20)}
    tensors |= {f"b{i}": torch.ones(8) for i in range(20)} | {f"n{i}": torch.ones(8, 8).int() for i in range(20)}
    tensors |= {f"few{i}": torch.zeros(4, 4) for i in range(15)} | {f"big{i}": torch.zeros(64, 64) for i in range(20)}
    calls, smallest = [], block_shape._smallest
    monkeypatch.setattr(block_shape, "_smallest", lambda u: calls.append(u.shape) or smallest(u))
    found = shared_shapes({name: Stored.of(x) for name, x in tensors.items()})
    assert calls == [(300, 8, 8), (300, 8, 8), (20, 8, 27)]
    expected = {"s": (2, 2), "d": None, "c": (2, 2)}
    assert found == {name: expected[name[0]] for name in tensors if name[0] in expected}
