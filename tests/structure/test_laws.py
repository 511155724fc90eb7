"""Laws that hold for every grid and every structure."""

import copy
import pickle

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_muws import MicroStructure
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.pieces import pack, unpack
from lightning_muws.structure.support import MEMORY_RATIO, _Kept
from tests.support.strategies import any_structures, grids, normal, same_bits, structures, weights

F32_AND_F64 = (torch.float32, torch.float64)
BLOCK_SHAPES = st.sampled_from([(1, 1), (2, 3), (4, 1), (3, 3), (20, 20)])


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.double() * b.double()).sum()


# ---- geometry


@given(st.data(), weights(), BLOCK_SHAPES)
def test_merge_undoes_split(data, w, shape):
    grid = data.draw(grids(w, shape))
    assert same_bits(grid.merge(grid.split(w), like=w), w)


@given(st.data(), weights(), BLOCK_SHAPES)
def test_weight_undoes_matrix(data, w, shape):
    grid = data.draw(grids(w, shape))
    assert tuple(grid.matrix(w).shape) == grid.matrix_shape(w.shape)
    assert same_bits(grid.weight(grid.matrix(w), w.shape), w)


@given(st.data(), weights(), BLOCK_SHAPES)
def test_blocks_and_edges_are_the_whole_weight(data, w, shape):
    grid = data.draw(grids(w, shape))
    below, right = grid.edges(grid.matrix(w))
    assert grid.split(w).numel() + below.numel() + right.numel() == w.numel()
    assert len(grid.split(w)) == grid.counts(w.shape)[0] * grid.counts(w.shape)[1]


@given(st.data(), weights((torch.float64,)), BLOCK_SHAPES)
def test_sum_is_the_adjoint_of_spread(data, w, shape):
    grid = data.draw(grids(w, shape))
    tall = grid.tall(grid.covered(grid.matrix(w)))
    values = normal(1, *grid.counts(w.shape), dtype=w.dtype)
    torch.testing.assert_close(dot(grid.sum(tall), values), dot(tall, grid.spread(values).expand_as(tall)))
    torch.testing.assert_close(grid.sum(tall).flatten(), grid.split(w).sum(1))


@given(st.floats(allow_nan=False, allow_infinity=False, width=32), BLOCK_SHAPES)
def test_mean_of_a_constant_block_is_that_constant(value, shape):
    weight = torch.full((20, 20), value, dtype=torch.float32)
    assert torch.equal(MicroStructure(shape, unify_ratio=1.0, signs="shared").support(weight).project(weight), weight)


@given(st.lists(st.booleans(), max_size=70))
def test_unpack_undoes_pack(flags):
    flags = torch.tensor(flags, dtype=torch.bool)
    packed = pack(flags)
    assert len(packed) == (len(flags) + 7) // 8
    assert torch.equal(unpack(packed, flags.shape), flags)
    assert packed.tolist() == np.packbits(flags.numpy(), bitorder="little").tolist()  # as files pack signs


# ---- nearest point


@given(st.data(), weights(), any_structures())
def test_project_twice_is_project_once_to_the_bit(data, w, s):
    grid = data.draw(grids(w, s.block_shape))
    z = s.project(w, grid)
    assert z.shape == w.shape
    assert z.dtype == w.dtype
    assert same_bits(s.project(z, grid), z)


@given(st.data(), weights(), structures())
def test_the_projection_is_in_the_structure(data, w, s):
    grid = data.draw(grids(w, s.block_shape))
    blocks = grid.split(s.project(w, grid))
    n_pruned, n_unified = s.quotas(len(blocks))
    support = s.support(w, grid)
    kinds = support.kinds.flatten()
    assert support.counts() == {
        Kind.PRUNED: n_pruned,
        Kind.UNIFIED: n_unified,
        Kind.DENSE: len(blocks) - n_pruned - n_unified,
    }
    assert same_bits(blocks[kinds == Kind.PRUNED], torch.zeros_like(blocks[kinds == Kind.PRUNED]))
    unified = blocks[kinds == Kind.UNIFIED]
    unified = unified.abs() if s.signs == "free" else unified
    assert (unified == unified[:, :1]).all()
    assert same_bits(blocks[kinds == Kind.DENSE], grid.split(w)[kinds == Kind.DENSE])


@given(st.data(), weights(), any_structures())
def test_edges_keep_every_bit(data, w, s):
    grid = data.draw(grids(w, s.block_shape))
    for before, after in zip(grid.edges(grid.matrix(w)), grid.edges(grid.matrix(s.project(w, grid))), strict=True):
        assert same_bits(before, after)


@given(weights(), any_structures())
def test_the_projection_does_not_depend_on_the_memory_layout(w, s):
    assert same_bits(s.project(w), s.project(w.contiguous()))


@given(weights(F32_AND_F64), any_structures(), st.integers(-20, 20))
def test_the_projection_of_a_scaled_weight_is_the_scaled_projection(w, s, exponent):
    assert same_bits(s.project(w * 2.0**exponent), s.project(w) * 2.0**exponent)


@given(st.data(), weights(), any_structures())
def test_no_negative_zero_is_written(data, w, s):
    grid = data.draw(grids(w, s.block_shape))
    kinds, blocks = s.nearest(w, grid).support.kinds.flatten(), grid.split(s.project(w, grid))
    written = blocks[kinds != Kind.DENSE]
    assert not torch.signbit(written[written == 0]).any()


# ---- the subspace


@given(st.data(), weights(), any_structures())
def test_support_repeats_the_projection_to_the_bit(data, w, s):
    grid = data.draw(grids(w, s.block_shape))
    assert same_bits(s.nearest(w, grid).support.project(w), s.project(w, grid))


@given(st.data(), weights(F32_AND_F64), any_structures(), st.integers(0, 99))
def test_support_is_linear_and_self_adjoint(data, w, s, seed):
    support = s.nearest(w, data.draw(grids(w, s.block_shape))).support
    x, y = normal(seed, *w.shape, dtype=w.dtype), normal(seed + 1, *w.shape, dtype=w.dtype)
    torch.testing.assert_close(
        support.project(x + 3 * y), support.project(x) + 3 * support.project(y), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(dot(support.project(x), y), dot(x, support.project(y)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        dot(x - support.project(x), support.project(y)), torch.zeros(()).double(), atol=1e-4, rtol=0
    )


@given(st.data(), weights(), any_structures(), st.integers(0, 99))
def test_support_project_twice_is_once_to_the_bit(data, w, s, seed):
    support = s.nearest(w, data.draw(grids(w, s.block_shape))).support
    once = support.project(normal(seed, *w.shape, dtype=w.dtype))
    assert same_bits(support.project(once), once)
    assert same_bits(support.place(once, support.first(once)), once)
    assert support.error(once) == 0


@given(st.data(), weights(), any_structures(), st.integers(0, 99))
def test_projecting_in_place_gives_the_same(data, w, s, seed):
    support = s.nearest(w, data.draw(grids(w, s.block_shape))).support
    x = normal(seed, *w.shape, dtype=w.dtype)
    expected = support.project(x)
    assert support.project_(x) is x
    assert same_bits(x, expected)


@given(st.data(), weights(), any_structures())
def test_a_support_is_restored_from_its_state(data, w, s):
    grid = data.draw(grids(w, s.block_shape))
    support = s.nearest(w, grid).support
    again = type(support).from_state_dict(support.state_dict(), grid)
    assert torch.equal(again.kinds, support.kinds)
    assert torch.equal(again.negative, support.negative)


@given(st.data(), weights(), any_structures())
def test_what_a_support_keeps_changes_nothing_and_stays_small(data, w, s):
    support = s.nearest(w, data.draw(grids(w, s.block_shape))).support
    fresh = pickle.loads(pickle.dumps(support))  # noqa: S301 our own
    first = support.project(w)
    covered = support.kinds.numel() * support.grid.block_numel * w.element_size()
    needed = support.kinds.numel() + support.negative.numel() + support.n_unified * 8
    kept = sum(mask.numel() * mask.element_size() for mask in support._kept.masks.values())
    assert kept == 0 or kept + needed <= MEMORY_RATIO * covered
    for other in (fresh, support.copy(), copy.copy(support), copy.deepcopy(support)):
        assert set(vars(other)) == {"grid", "kinds", "negative", "_kept"}
        assert other._kept == _Kept()
    assert same_bits(support.project(w), first)
    assert same_bits(fresh.project(w), first)


@given(st.data(), weights(), structures())
def test_rows_of_a_support_are_the_support_of_rows(data, w, s):
    grid = s.grid
    support, size = s.support(w, grid), s.block_shape[0]
    down = support.kinds.shape[0]
    start = data.draw(st.integers(0, down))
    stop = data.draw(st.integers(start, down))
    mine, ours = support.rows(slice(start, stop))
    assert same_bits(mine.project(w[start * size : stop * size]), support.project(w)[start * size : stop * size])
    assert torch.equal(mine.first(w[start * size : stop * size]), support.first(w)[ours])
