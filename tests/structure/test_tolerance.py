"""A relative error in place of ratios: which blocks are within it, and how far the weight then moves."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_muws import MicroStructure
from lightning_muws.errors import SettingError, StateError
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.layer import Bounds
from lightning_muws.structure.tolerance import within
from tests.support.strategies import normal, weights

GRIDS = [BlockGrid((2, 2)), BlockGrid((1, 4)), BlockGrid((4, 4)), BlockGrid((3, 2), out_axis=1)]
ERRORS = st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.7, 0.99])


def spread(seed: int, grid: BlockGrid, *shape: int) -> torch.Tensor:
    """Return a weight whose blocks differ in size and in evenness, as those of trained networks do."""
    w = normal(seed, *shape)
    blocks = grid.split(w)
    even = normal(seed + 1, len(blocks), 1).exp()
    return grid.merge((blocks.sign() + even * blocks) * normal(seed + 2, len(blocks), 1).exp(), w)


def counts(structure: MicroStructure, grid: BlockGrid, w: torch.Tensor) -> tuple[int, int, int]:
    found = structure.counts(grid, w.shape)
    return found[Kind.DENSE], found[Kind.UNIFIED], found[Kind.PRUNED]


@pytest.mark.parametrize("signs", ["free", "shared"])
@pytest.mark.parametrize("grid", GRIDS)
@given(st.integers(0, 10**6), ERRORS)
@settings(max_examples=50, deadline=None)
def test_a_block_is_pruned_or_unified_where_its_own_error_is_within(grid, signs, seed, e):
    w = spread(seed, grid, 13, 12)
    blocks = grid.split(w)
    q = math.sqrt(float(blocks.square().sum(1).mean()))
    expected = [0, 0, 0]
    for block in blocks:
        values = block.abs() if signs == "free" else block
        unify_error = float((values - values.mean()).norm())
        is_pruned = float(block.norm()) <= e * q
        expected[Kind.PRUNED if is_pruned else int(unify_error <= e * float(block.norm()))] += 1
    found = within("w", w, Bounds(grid, signs), e)
    assert (found.block_shape, found.signs) == (grid.block_shape, signs)
    assert counts(found, grid, w) == tuple(expected)


@given(weights(), st.sampled_from([(1, 2), (2, 2), (4, 1)]), ERRORS)
@settings(max_examples=200, deadline=None)
def test_the_nearest_weight_is_as_near_as_the_error_promises(w, block_shape, e):
    grid = BlockGrid(block_shape)
    structure = within("w", w, Bounds(grid), e)
    exact = w.to(torch.float64)
    moved = float((structure.project(exact, grid) - exact).norm())
    covered = float(grid.covered(grid.matrix(exact)).norm())
    assert moved <= math.sqrt(1 + structure.prune_ratio) * e * covered * (1 + 1e-5)


@pytest.mark.parametrize(("dtype", "exponents"), [(torch.float32, (-90, 110)), (torch.float64, (-960, 1000))])
@given(st.data(), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_the_scale_of_a_weight_changes_nothing(dtype, exponents, data, seed):
    w, bounds = spread(seed, GRIDS[0], 16, 12).to(dtype), Bounds(GRIDS[0])
    scale = 2.0 ** data.draw(st.integers(*exponents))
    assert within("w", w * scale, bounds, 0.3) == within("w", w, bounds, 0.3)


def test_a_larger_error_leaves_fewer_blocks_dense_and_prunes_more():
    w = spread(3, GRIDS[2], 64, 64)
    found = [counts(within("w", w, Bounds(GRIDS[2]), e), GRIDS[2], w) for e in (0.01, 0.1, 0.2, 0.3, 0.5, 0.8)]
    dense, _, pruned = zip(*found, strict=True)
    assert list(dense) == sorted(dense, reverse=True)
    assert list(pruned) == sorted(pruned)
    assert dense[0] > dense[-1]
    assert pruned[0] < pruned[-1]


def test_squares_of_many_large_blocks_do_not_overflow():
    w = torch.full((64, 64), 1.7e308, dtype=torch.float64)
    w[:, ::2] /= 1.5
    assert counts(within("w", w, Bounds(GRIDS[2]), 0.1), GRIDS[2], w) == (256, 0, 0)
    assert counts(within("w", w, Bounds(GRIDS[2]), 0.2), GRIDS[2], w) == (0, 256, 0)


def test_bounds_come_before_the_error():
    w = spread(3, GRIDS[2], 64, 64)
    free = counts(within("w", w, Bounds(GRIDS[2]), 0.5), GRIDS[2], w)
    assert min(free) > 10
    never = counts(within("w", w, Bounds(GRIDS[2], prune_ratio=(0.0, 0.0)), 0.5), GRIDS[2], w)
    assert never[Kind.PRUNED] == 0
    assert never[Kind.UNIFIED] >= free[Kind.UNIFIED]
    fixed = counts(within("w", w, Bounds(GRIDS[2], "free", (0.5, 0.5), (0.25, 0.25)), 0.01), GRIDS[2], w)
    assert fixed == (64, 64, 128)


def test_blocks_of_one_magnitude_and_of_zeros_are_within_any_error():
    w = torch.ones(8, 8)
    w[0, 0] = -1
    assert counts(within("w", w, Bounds(GRIDS[2]), 1e-9), GRIDS[2], w) == (0, 4, 0)
    assert counts(within("w", torch.zeros(8, 8), Bounds(GRIDS[2]), 1e-9), GRIDS[2], w) == (0, 0, 4)
    small = torch.zeros(3, 3)
    assert within("w", small, Bounds(GRIDS[2]), 0.5).is_open


@pytest.mark.parametrize("wrong", [0, 1, -0.1, float("nan"), float("inf"), True, "0.3", None, [0.3]])
def test_an_error_that_is_none_is_refused(wrong):
    with pytest.raises(SettingError, match=r"max_relative_error=.* is not allowed: give a number above 0 and below 1"):
        within("w", torch.ones(4, 4), Bounds(GRIDS[2]), wrong)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad):
    w = torch.ones(4, 4)
    w[1, 1] = bad
    with pytest.raises(StateError, match="layer has NaN or Inf"):
        within("layer", w, Bounds(GRIDS[2]), 0.3)
