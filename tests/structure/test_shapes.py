"""block_shape="auto": the candidates, the sample that they are tried on, and the cheapest one of each weight."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_muws import MicroStructure, save_compressed
from lightning_muws.errors import PlanError, SettingError, StateError
from lightning_muws.structure.budget import allocate
from lightning_muws.structure.cost import SAMPLED
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.layer import Bounds, measure
from lightning_muws.structure.plan import LayerRule, make_plan
from lightning_muws.structure.shapes import SHAPES, TILE, fitting, nearest_grid, tiles
from lightning_muws.structure.tolerance import within
from tests.support.strategies import normal

AUTO = MicroStructure("auto")


def of_shape(seed: int, block_shape: tuple[int, int], *shape: int) -> torch.Tensor:
    """Return a float32 weight of which two thirds of the blocks of a shape have one magnitude each."""
    grid, w = BlockGrid(block_shape), normal(seed, *shape, dtype=torch.float32)
    blocks = grid.split(w)
    magnitudes = normal(seed + 1, len(blocks), 1, dtype=torch.float32).abs() + 0.1
    even = torch.arange(len(blocks))[:, None] % 3 > 0
    return 0.1 * grid.merge(torch.where(even, blocks.sign() * magnitudes, blocks), w)


def bounds_of(tensors: dict[str, torch.Tensor], is_auto: bool = True) -> dict[str, Bounds]:
    return {name: Bounds(BlockGrid(), is_auto=is_auto) for name, x in tensors.items() if x.ndim > 1}


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 1))
@settings(max_examples=100, deadline=None)
def test_the_candidates_are_the_shapes_that_cut_the_weight_and_else_the_grid_itself(n_out, n_in, out_axis):
    grid = BlockGrid((4, 4), out_axis=out_axis)
    shape = (n_out, n_in) if out_axis == 0 else (n_in, n_out)
    found = fitting(grid, shape)
    expected = [(r, c) for r, c in SHAPES if r <= n_out and c <= n_in] or [(4, 4)]
    assert [candidate.block_shape for candidate in found] == expected
    assert {candidate.out_axis for candidate in found} == {out_axis}


@pytest.mark.parametrize("shape", [(64, 9), (15, 9000), (300, 300), (1000, 70), (16, 5000)])
def test_every_candidate_cuts_the_tiles_as_it_cuts_the_weight(shape):
    matrix = torch.arange(shape[0] * shape[1], dtype=torch.float64).view(shape)
    sample = tiles(matrix)
    assert sample.numel() <= max(SAMPLED, shape[0] * shape[1] if min(shape) < TILE else 0)
    assert len(sample.unique()) > 0.9 * sample.numel()  # a spread sample may have a tile twice
    for grid in fitting(BlockGrid(), shape):
        blocks = {tuple(block) for block in grid.split(matrix).tolist()}
        assert all(tuple(block) in blocks for block in grid.split(sample).tolist())
    rows = sample[:, 0] // shape[1]
    assert rows.max() - rows.min() >= shape[0] // 2 - TILE  # from all parts of it


@pytest.mark.parametrize("block_shape", SHAPES)
def test_a_weight_gets_the_shape_in_which_it_was_made(block_shape):
    tensors = {"w": of_shape(0, block_shape, 96, 192), "bias": normal(5, 96, dtype=torch.float32)}
    found = allocate(tensors, bounds_of(tensors), 6)
    assert found.structures["w"].block_shape == block_shape


@pytest.mark.parametrize("block_shape", [(1, 16), (16, 1), (2, 2)])
@pytest.mark.parametrize("kind", ["conv", "transposed", "batch"])
def test_large_weights_of_any_geometry_get_it_from_their_sample(block_shape, kind):
    made = of_shape(1, block_shape, 512, 576)
    if kind == "conv":
        w, grid = made.view(512, 64, 3, 3), BlockGrid()
    elif kind == "transposed":
        w, grid = made.view(512, 64, 3, 3).transpose(0, 1).contiguous(), BlockGrid((4, 4), out_axis=1)
    else:
        w, grid = made.view(8, 64, 576), BlockGrid((4, 4), batched=True)
    assert w.numel() > SAMPLED
    found = allocate({"w": w}, {"w": Bounds(grid, is_auto=True)}, 8)
    assert found.structures["w"].block_shape == block_shape
    assert found.compression >= 8


@pytest.mark.parametrize("compression", [6, 15, 40])
def test_no_other_shape_is_cheaper_at_the_multiplier_by_brute_force(compression):
    shapes = itertools.cycle([(1, 4), (4, 4), (16, 1), (2, 2)])
    tensors = {f"w{i}": of_shape(i, next(shapes), 48 + i, 130) * 3.0**i for i in range(5)}
    tensors["bias"] = normal(5, 200, dtype=torch.float32)
    found = allocate(tensors, bounds_of(tensors), compression)
    assert compression <= found.compression <= 1.02 * compression
    for name in tensors:
        if name != "bias":
            costs = {}
            for grid in fitting(BlockGrid(), tensors[name].shape):
                layer = measure(name, tensors[name], Bounds(grid), found.importance[name])
                layer = replace(layer, recovery=0.1)
                costs[grid.block_shape] = layer.cost(found.multiplier)
            assert costs[found.structures[name].block_shape] <= 1.01 * min(costs.values())  # the multiplier moved a bit
    for share in found.shares.values():
        assert not share.structure or sum(share.counts) > 0


def test_one_candidate_gives_the_same_as_its_fixed_shape():
    tensors = {"w": of_shape(0, (1, 4), 1, 4000), "bias": normal(5, 96, dtype=torch.float32)}
    narrow = {"w": Bounds(BlockGrid((1, 4)), is_auto=True)}
    shapes = {(1, 4), (1, 8), (1, 16)}
    assert {bound.grid.block_shape for bound in narrow["w"].fitting((1, 4000))} == shapes
    found = allocate(tensors, narrow, 6)
    fixed = allocate(tensors, {"w": Bounds(BlockGrid(found.structures["w"].block_shape))}, 6)
    assert found.structures == fixed.structures
    assert found.reachable == fixed.reachable
    assert found.n_bytes == pytest.approx(fixed.n_bytes, rel=0.005)


def test_the_file_has_the_predicted_size(tmp_path):
    tensors = {f"w{i}": of_shape(i, shape, 96, 128) for i, shape in enumerate(((1, 16), (16, 1), (4, 4), (2, 2)))}
    found = allocate(tensors, bounds_of(tensors), 9, recovery=1.0)
    state, grids = {}, {}
    for name, structure in found.structures.items():
        state[name], grids[name] = structure.project(tensors[name]), structure.grid
    report = save_compressed(state, tmp_path / "m.muws", blocks=grids, compression=9)
    assert report.compression_ratio >= 9
    for tensor in report.tensors:
        assert tensor.block_shape == found.structures[tensor.name].block_shape
        assert tensor.counts == found.shares[tensor.name].counts


def test_a_smaller_file_than_any_one_shape_gives_is_reached():
    tensors = {f"w{i}": of_shape(i, shape, 96, 128) for i, shape in enumerate(((1, 16), (8, 8)))}
    most = {grid.block_shape: allocate(tensors, dict.fromkeys(tensors, Bounds(grid)), 2).reachable[1]
            for grid in fitting(BlockGrid(), (96, 128))}  # fmt: skip
    bounds = bounds_of(tensors)
    assert allocate(tensors, bounds, 0.99 * max(most.values())).compression >= 0.99 * max(most.values())
    with pytest.raises(SettingError, match=r"compression=100000 cannot be reached.* allows [\d.]+ to [\d.e+]+"):
        allocate(tensors, bounds, 100000)


@given(
    st.integers(0, 10**6), st.sampled_from([(0.5, 0.0), (0.3, 0.5), (0.0, 1.0)]), st.sampled_from(["free", "shared"])
)
@settings(max_examples=30, deadline=None)
def test_set_ratios_get_the_nearest_of_the_shapes_of_16_weights(seed, ratios, signs):
    w = normal(seed, 32, 48) * normal(seed + 1, 32, 1).exp()
    structure = MicroStructure("auto", *ratios, signs)
    found = nearest_grid(w, structure, BlockGrid())
    moved = {shape: float((structure.project(w, BlockGrid(shape)) - w).norm()) for shape in ((4, 4), (1, 16), (16, 1))}
    assert moved[found.block_shape] == min(moved.values())


def test_shapes_that_cut_fewer_blocks_are_not_nearer_for_that():
    w = of_shape(0, (1, 16), 32, 15 + 16)  # 1x16 and 4x4 leave edges, 16x1 leaves none
    assert nearest_grid(w, MicroStructure("auto", unify_ratio=0.5), BlockGrid()).block_shape == (16, 1)
    assert nearest_grid(torch.ones(3, 5), MicroStructure("auto", unify_ratio=1.0), BlockGrid()).block_shape == (4, 4)
    bad = torch.full((32, 32), float("nan"))
    with pytest.raises(StateError, match="layer holds 1024 values"):
        nearest_grid(bad, MicroStructure("auto", unify_ratio=0.5), BlockGrid(), "layer")


@pytest.mark.parametrize("block_shape", [(1, 4), (16, 1), (8, 8)])
@pytest.mark.parametrize("rows", [64, 640])
def test_a_relative_error_gets_the_shape_that_makes_a_lossless_file_smallest(block_shape, rows, tmp_path):
    w = of_shape(0, block_shape, rows, 320)
    found = within("w", w, Bounds(BlockGrid(), is_auto=True), 0.01)
    assert found.block_shape == block_shape
    assert found == within("w", w, Bounds(BlockGrid(block_shape)), 0.01)


def test_an_open_shape_is_in_the_plan_and_small_weights_are_covered_if_any_shape_fits():
    model = torch.nn.Sequential(torch.nn.Linear(32, 2), torch.nn.Linear(2, 32), torch.nn.Linear(3, 1))
    plan = make_plan(model, AUTO, open_ratios=True)
    assert set(plan.covered) == {"0.weight", "1.weight"}
    assert [plan.covered[name].grid.block_shape for name in plan.covered] == [(1, 4), (4, 1)]
    assert "smaller than one block" in plan.left_out["2.weight"].reason
    assert str(plan).count("auto") == 2
    for entry in plan.covered.values():
        assert Bounds.of(entry).is_auto
    experts = torch.nn.Module()
    experts.w = torch.nn.Parameter(torch.zeros(3, 6, 32))
    assert make_plan(experts, AUTO, open_ratios=True).covered["w"].grid == BlockGrid((1, 4), batched=True)


def test_a_range_bounds_what_a_budget_chooses_and_nothing_else_may_have_one():
    layer = torch.nn.Linear(64, 64)
    layer.weight.data = of_shape(0, (4, 4), 64, 64)
    entry = make_plan(layer, MicroStructure(prune_ratio=(0.1, 0.25)), open_ratios=True).covered["weight"]
    assert Bounds.of(entry) == Bounds(BlockGrid(), prune_ratio=(0.1, 0.25), unify_ratio=(0.0, 1.0))
    both = MicroStructure(prune_ratio=(0, 0), unify_ratio=0.5)
    entry = make_plan(layer, both, open_ratios=True).covered["weight"]
    assert Bounds.of(entry) == Bounds(BlockGrid(), prune_ratio=(0.0, 0.0), unify_ratio=(0.5, 0.5))
    free = allocate({"w": layer.weight}, {"w": Bounds(BlockGrid())}, 12).shares["w"].counts
    assert free[Kind.PRUNED] > 64
    bound = allocate({"w": layer.weight}, {"w": Bounds(BlockGrid(), prune_ratio=(0.1, 0.25))}, 12)
    assert 26 <= bound.shares["w"].counts[Kind.PRUNED] <= 64
    assert bound.compression >= 12
    for given_ in ((both, ()), (MicroStructure(), [LayerRule(structure=both)])):
        with pytest.raises(SettingError, match=r"unify_ratio=0.5.* has a range, from which only a budget chooses"):
            make_plan(layer, *given_)
    with pytest.raises(PlanError, match="prune_ratio and unify_ratio are 0"):
        make_plan(layer, MicroStructure())


def test_a_bound_that_cannot_be_met_is_refused_with_the_best_that_can_be_had():
    w = of_shape(0, (4, 4), 256, 256)
    most = allocate({"w": w}, {"w": Bounds(BlockGrid())}, 2).reachable[1]
    bounds = {"w": Bounds(BlockGrid(), prune_ratio=(0.0, 0.3))}
    best = allocate({"w": w}, bounds, 2).reachable[1]
    assert best < most / 1.1
    with pytest.raises(SettingError, match=rf"cannot be reached.* this model allows [\d.]+ to {best:.3g}, so ask"):
        allocate({"w": w}, bounds, most)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"prune_ratio": (0.5, 0.1)}, r"prune_ratio=\(0.5, 0.1\) is not allowed"),
        ({"unify_ratio": (0, 1.1)}, r"unify_ratio=\(0, 1.1\) is not allowed"),
        ({"prune_ratio": (0, 0.1, 0.2)}, r"prune_ratio=\(0, 0.1, 0.2\)"),
        ({"prune_ratio": (0, "x")}, r"prune_ratio=\(0, 'x'\)"),
        ({"prune_ratio": (0, True)}, r"prune_ratio=\(0, True\)"),
        ({"prune_ratio": (0.6, 0.7), "unify_ratio": (0.6, 1.0)}, "sum to more than 1"),
        ({"block_shape": "best"}, "block_shape='best' is not allowed: give two whole numbers >= 1.*or 'auto'"),
    ],
)
def test_wrong_ranges_and_shapes_are_refused(wrong, says):
    with pytest.raises(SettingError, match=says):
        MicroStructure(**wrong)


def test_lists_of_a_file_become_ranges():
    assert MicroStructure(prune_ratio=[0, 1]) == MicroStructure(prune_ratio=(0.0, 1.0))
    assert hash(MicroStructure(prune_ratio=[0, 1])) == hash(MicroStructure(prune_ratio=(0.0, 1.0)))
