"""Choices for one time of a network: against brute force on small tables, and against the tensors by hand."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_muws import MicroStructure
from lightning_muws.errors import SettingError, StateError
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.layer import Bounds
from lightning_muws.structure.speed import (
    Choice,
    Curve,
    LayerTimes,
    NetworkTimes,
    allocate_time,
    falling,
    hull,
    walk,
)
from tests.support.strategies import normal

DENSE = MicroStructure()


def curve(shape=(4, 1), shares=(0.25, 0.5, 0.75, 1.0), seconds=(4.0, 3.0, 2.0, 1.0), is_unified=False):
    return Curve(shape, shares, seconds, is_unified)


def network(*shapes, seed=0):
    """Return weights, their bounds, and times in which each layer takes 5 seconds dense and 1 without blocks."""
    weights = {f"w{i}": normal(seed + i, *shape, dtype=torch.float32) for i, shape in enumerate(shapes)}
    times = {name: LayerTimes(5.0, (curve(), curve((4, 4)))) for name in weights}
    bounds = {name: Bounds(BlockGrid()) for name in weights}
    return weights, bounds, NetworkTimes(2.0 + 5.0 * len(weights), 1.0, times)


# By hand


def test_one_layer_prunes_its_smallest_blocks_until_it_is_in_time():
    weight = torch.tensor([[1.0], [2.0], [3.0], [4.0]]).repeat_interleave(2, 0)  # four blocks of two rows
    times = NetworkTimes(5.0, 1.0, {"w": LayerTimes(4.0, (curve((2, 1)),))})
    found = allocate_time({"w": weight}, {"w": Bounds(BlockGrid((2, 1)))}, times, 5 / 4)
    assert found.structures == {"w": MicroStructure((2, 1), prune_ratio=0.5)}
    assert found.seconds == 4.0
    assert found.distance == pytest.approx(2 * (1 + 4) / (2 * (1 + 4 + 9 + 16)))
    assert found.reachable == (5 / 5, 5 / 2)
    assert times.speedup(found.structures) == found.speedup == 5 / 4


def test_unified_blocks_are_chosen_where_they_are_faster_and_nearer():
    weight = torch.tensor([[1.0, -1.0, 1.0, 1.0], [3.0, 2.9, 3.0, -3.0]]).repeat(4, 1)
    pruned, unified = curve((1, 4), seconds=(3.0,) * 4), curve((1, 4), seconds=(1.0, 0.9, 0.8, 0.7), is_unified=True)
    times = NetworkTimes(6.0, 1.0, {"w": LayerTimes(5.0, (pruned, unified))})
    found = allocate_time({"w": weight}, {"w": Bounds(BlockGrid((1, 4)))}, times, 3)
    structure = found.structures["w"]
    assert (structure.prune_ratio, structure.unify_ratio) == (0.25, 0.75)
    projected = structure.project(weight)
    assert found.distance == pytest.approx(float((projected - weight).square().sum() / weight.square().sum()))


def test_the_whole_network_is_read_between_the_networks_that_were_timed():
    weight = torch.tensor([[1.0], [2.0], [3.0], [4.0]]).repeat_interleave(2, 0)
    layers = {"w": LayerTimes(4.0, (curve((2, 1)),))}  # sums of 5 dense, and 5 to 2 by the share of blocks
    times = NetworkTimes(5.0, 1.0, layers, timed=((3.0, 1.5), (4.0, 3.5)))
    assert [times.whole(x) for x in (1.5, 3.0, 3.5, 4.0, 8.0)] == [0.75, 1.5, 2.5, 3.5, 7.0]
    found = allocate_time({"w": weight}, {"w": Bounds(BlockGrid((2, 1)))}, times, 2)  # in 2.5: a sum of 3.5
    assert found.structures["w"].prune_ratio == 0.75
    assert found.seconds == times.seconds(found.structures) == 1.5
    assert found.reachable == (5 / 4.375, 5 / 1)


@given(st.lists(st.tuples(st.floats(0.01, 10), st.floats(0.01, 10)), min_size=1, max_size=5), st.floats(0.001, 100))
def test_a_total_that_takes_given_seconds_takes_them(steps, seconds):
    sums, totals = (list(itertools.accumulate(column)) for column in zip(*steps, strict=True))
    times = NetworkTimes(1.0, 0.0, {}, timed=tuple(zip(sums, totals, strict=True)))
    assert times.whole(times.total(seconds)) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "timed", [((1.0, 2.0), (1.0, 3.0)), ((1.0, 2.0), (2.0, 1.0)), ((0.0, 1.0),), ((1.0, math.inf),)]
)
def test_times_of_networks_that_do_not_rise_are_refused(timed):
    with pytest.raises(SettingError, match="positive seconds that rise"):
        NetworkTimes(1.0, 0.0, {}, timed=timed)


# Laws on tables


@st.composite
def tables(draw):
    """Return choices of a few layers, and an allowance between the least and the largest sum of seconds."""
    numbers = st.integers(1, 40)
    layers = {}
    for name in "abc"[: draw(st.integers(1, 3))]:
        rest = draw(st.lists(st.tuples(numbers, numbers), min_size=0, max_size=6))
        layers[name] = [Choice(draw(st.integers(20, 60)), 0, DENSE), *(Choice(s, d, DENSE) for s, d in rest)]
    least = sum(min(c.seconds for c in choices) for choices in layers.values())
    most = sum(choices[0].seconds for choices in layers.values())
    return layers, draw(st.integers(least, max(least, most)))


def best(layers, allowed):
    """Return the least sum of distances in time, by trying everything."""
    sums = ([sum(c.seconds for c in way), sum(c.distance for c in way)] for way in itertools.product(*layers.values()))
    return min(distance for seconds, distance in sums if seconds <= allowed)


def walked(layers, allowed):
    return walk(layers, {name: hull(choices) for name, choices in layers.items()}, allowed)


def cost(picked):
    return sum(c.seconds for c in picked.values()), sum(c.distance for c in picked.values())


@given(tables())
def test_the_choices_are_in_time_and_lose_at_most_one_move_more_than_the_best(case):
    layers, allowed = case
    multiplier, picked = walked(layers, allowed)
    seconds, distance = cost(picked)
    assert seconds <= allowed
    assert distance >= best(layers, allowed)
    edges = [b.distance - a.distance for choices in layers.values() for a, b in itertools.pairwise(hull(choices))]
    assert distance - best(layers, allowed) <= max(edges, default=0)
    # no choice is cheaper at the multiplier, up to the layer that moved last
    lagrangian = sum(min(c.distance + multiplier * c.seconds for c in choices) for choices in layers.values())
    assert lagrangian - multiplier * allowed <= best(layers, allowed) + 1e-9


@given(tables())
def test_a_time_that_corners_meet_exactly_gets_the_best_choices_of_all(case):
    layers, allowed = case
    _, picked = walk(hulls := {name: hull(choices) for name, choices in layers.items()}, hulls, allowed)
    seconds, distance = cost(picked)
    assert walked(layers, seconds)[1].keys() == picked.keys()
    assert cost(walked(layers, seconds)[1])[1] == pytest.approx(best(layers, seconds))
    assert distance == pytest.approx(best(layers, seconds))


@given(tables())
def test_less_time_never_costs_less_distance(case):
    layers, _ = case
    most = sum(choices[0].seconds for choices in layers.values())
    least = sum(min(c.seconds for c in choices) for choices in layers.values())
    distances = [cost(walked(layers, t)[1])[1] for t in range(least, most + 1)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] == 0


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=8), st.floats(0, 10))
def test_the_cheapest_choice_at_any_multiplier_is_a_corner(points, multiplier):
    choices = [Choice(s, d, DENSE) for s, d in points]
    least = min(c.distance + multiplier * c.seconds for c in choices)
    assert min(c.distance + multiplier * c.seconds for c in hull(choices)) == pytest.approx(least)
    corners = hull(choices)
    assert all(a.distance < b.distance and a.seconds > b.seconds for a, b in itertools.pairwise(corners))


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=7))
def test_falling_values_fall_and_are_nearer_than_others_that_fall(values):
    found = falling(values)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(found))
    assert sum(found) == pytest.approx(sum(values))
    # optimality of a projection onto a cone of falling values: the residual is orthogonal, and against all corners
    residual = [v - f for v, f in zip(values, found, strict=True)]
    assert sum(r * f for r, f in zip(residual, found, strict=True)) == pytest.approx(0, abs=1e-9)
    for n in range(1, len(values)):  # (1, .., 1, 0, .., 0) falls
        assert sum(residual[:n]) <= 1e-9


# Laws on tensors


@pytest.mark.parametrize("speedup", [1.1, 1.3, 2.0, 3.0, 4.2])
def test_the_structures_have_the_predicted_time_and_the_distance_of_their_projections(speedup):
    weights, bounds, times = network((16, 24), (32, 8, 3, 3), (8, 20))
    found = allocate_time(weights, bounds, times, speedup)
    assert found.speedup >= speedup
    assert times.speedup(found.structures) == pytest.approx(found.speedup)
    lost = [
        float((s.project(w, BlockGrid(s.block_shape)) - w).square().sum() / w.square().sum())
        for w, s in ((weights[name], s) for name, s in found.structures.items())
    ]
    assert found.distance == pytest.approx(math.fsum(lost), rel=1e-5)


def test_a_larger_speedup_costs_more_and_is_met_closely():
    weights, bounds, times = network((64, 64), (64, 96), (96, 64))
    found = [allocate_time(weights, bounds, times, speedup) for speedup in (1.2, 1.5, 2.0, 3.0, 4.0)]
    assert [f.distance for f in found] == sorted(f.distance for f in found)
    assert [f.multiplier for f in found] == sorted(f.multiplier for f in found)
    assert all(f.speedup <= 1.02 * s for f, s in zip(found, (1.2, 1.5, 2.0, 3.0, 4.0), strict=True))


def test_what_matters_more_is_pruned_less():
    weights, bounds, times = network((64, 64), (64, 64))
    even = allocate_time(weights, bounds, times, 2.0, {"w0": 1.0, "w1": 1.0}).structures
    skewed = allocate_time(weights, bounds, times, 2.0, {"w0": 1.0, "w1": 9.0}).structures
    assert skewed["w1"].prune_ratio < even["w1"].prune_ratio
    assert skewed["w0"].prune_ratio > even["w0"].prune_ratio


def test_bounds_hold():
    weights, bounds, times = network((64, 64), (64, 64), (64, 64))
    bounds["w0"] = Bounds(BlockGrid(), prune_ratio=(0.0, 0.0))
    bounds["w1"] = Bounds(BlockGrid(), prune_ratio=(0.5, 0.75))
    for speedup in (1.25, 1.5, 1.8):
        found = allocate_time(weights, bounds, times, speedup).structures
        assert found["w0"].is_open
        assert 0.5 <= found["w1"].prune_ratio <= 0.75
    with pytest.raises(SettingError, match="speedup=3 cannot be reached on this machine"):
        allocate_time(weights, bounds, times, 3)


def test_a_weight_without_curves_keeps_its_time():
    weights, bounds, times = network((64, 64), (64, 64))
    times.layers["w1"] = LayerTimes(3.0)
    found = allocate_time(weights, bounds, times, 2.0)
    assert found.structures.keys() == {"w0"}
    assert found.seconds == pytest.approx(1 + 3 + times.layers["w0"].at(found.structures["w0"]))


def test_a_block_shape_that_does_not_fit_is_not_chosen():
    weights, bounds, times = network((2, 50))
    times.layers["w0"] = LayerTimes(5.0, (curve((4, 4), seconds=(0.1,) * 4), curve((2, 1))))
    assert allocate_time(weights, bounds, times, 2.0).structures["w0"].block_shape == (2, 1)


def test_the_same_bits_and_times_choose_the_same():
    weights, bounds, times = network((64, 64), (64, 64))
    copies = {name: w.clone() for name, w in weights.items()}
    assert allocate_time(weights, bounds, times, 2.5) == allocate_time(copies, bounds, times, 2.5)


def test_scale_does_not_matter():
    weights, bounds, times = network((64, 64), (64, 64))
    scaled = {name: w * 2.0**60 for name, w in weights.items()}
    assert allocate_time(weights, bounds, times, 2.5) == allocate_time(scaled, bounds, times, 2.5)


def test_a_weight_of_zeros_costs_nothing():
    weights, bounds, times = network((64, 64), (64, 64))
    weights["w0"].zero_()
    found = allocate_time(weights, bounds, times, 1.5)
    assert found.distance == 0
    assert found.structures["w1"].is_open


# Refusals


def test_what_cannot_be_reached_is_refused_with_the_range():
    weights, bounds, times = network((64, 64))
    with pytest.raises(SettingError, match=r"speedup=9 cannot be reached.*measured times allow 1\.17 to 3\.5, so ask"):
        allocate_time(weights, bounds, times, 9)


@pytest.mark.parametrize("wrong", [1, 0, -3, float("nan"), float("inf"), True, "2", None, [2]])
def test_a_speedup_that_is_none_is_refused(wrong):
    with pytest.raises(SettingError, match=r"speedup=.* is not allowed: give a finite number above 1, such as 2"):
        allocate_time(*network((64, 64)), wrong)


def test_a_weight_with_nan_is_refused_by_name():
    weights, bounds, times = network((64, 64))
    weights["w0"][3, 3] = float("nan")
    with pytest.raises(StateError, match="w0 has NaN or Inf"):
        allocate_time(weights, bounds, times, 2)


@pytest.mark.parametrize(
    ("shares", "seconds"),
    [((), ()), ((0.5,), (1.0, 2.0)), ((0.5, 0.4), (1.0, 1.0)), ((0.5, 1.5), (1.0, 1.0)), ((0.5,), (0.0,))],
)
def test_a_curve_of_no_times_is_refused(shares, seconds):
    with pytest.raises(SettingError, match="give rising shares from 0 to 1, and positive seconds"):
        Curve((4, 4), shares, seconds)


def test_a_structure_that_was_not_measured_has_no_time():
    with pytest.raises(SettingError, match="no time was measured for"):
        LayerTimes(1.0, (curve(),)).at(MicroStructure((8, 8), 0.5))


def test_counts_are_whole_numbers_of_blocks():
    weights, bounds, times = network((12, 7), (20, 9))
    found = allocate_time(weights, bounds, times, 2.0).structures
    for name, structure in found.items():
        grid = BlockGrid(structure.block_shape)
        n = math.prod(grid.counts(weights[name].shape))
        assert structure.counts(grid, weights[name].shape)[Kind.PRUNED] == pytest.approx(structure.prune_ratio * n)
