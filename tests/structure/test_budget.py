"""A budget shares kinds and steps out among the layers: the cheapest in bounds, of the predicted size."""

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_muws import MicroStructure, save_compressed
from lightning_muws.errors import SettingError, StateError
from lightning_muws.structure.assign import choose_kinds
from lightning_muws.structure.budget import allocate, thinned
from lightning_muws.structure.cost import SEARCH, best_step, root, search, value_cost
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.layer import Bounds, measure
from lightning_muws.structure.plan import make_plan
from tests.support.strategies import normal

GRID = BlockGrid((4, 4))


def network(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return weights of four layers whose blocks differ in size, as those of trained networks do."""
    shapes = {"first": (32, 9), "conv": (64, 32, 3, 3), "linear": (128, 512), "last": (10, 128), "bias": (128,)}
    tensors = {}
    for i, (name, shape) in enumerate(shapes.items()):
        w = normal(seed + i, *shape, dtype=torch.float32)
        if len(shape) > 1:
            blocks = GRID.split(w)
            w = GRID.merge(blocks * normal(seed + 9 + i, len(blocks), 1, dtype=torch.float32).exp(), w)
        tensors[name] = 0.1 * w
    return tensors


def bounds_of(tensors: dict[str, torch.Tensor]) -> dict[str, Bounds]:
    return {name: Bounds(GRID) for name, x in tensors.items() if x.ndim > 1}


def test_the_cheapest_kinds_of_two_blocks_by_hand():
    costs = torch.tensor([[0.0, 5.0], [1.0, 4.0], [2.0, 2.0]])
    assert choose_kinds(costs, (0, 2), (0, 2)).tolist() == [Kind.DENSE, Kind.PRUNED]
    assert choose_kinds(costs, (0, 0), (0, 2)).tolist() == [Kind.DENSE, Kind.UNIFIED]
    assert choose_kinds(costs, (2, 2), (0, 0)).tolist() == [Kind.PRUNED, Kind.PRUNED]


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_no_kinds_in_bounds_are_cheaper_by_brute_force(data):
    n = data.draw(st.integers(1, 6))
    whole_numbers = st.lists(st.integers(0, 9), min_size=3 * n, max_size=3 * n)  # full of ties
    costs = torch.tensor(data.draw(whole_numbers), dtype=torch.float64).view(3, n)
    least = data.draw(st.integers(0, n)), 0
    least = least[0], data.draw(st.integers(0, n - least[0]))
    most = data.draw(st.integers(least[0], n)), data.draw(st.integers(least[1], n))
    (p0, u0), (p1, u1) = least, most

    def total(kinds):
        return float(costs[torch.tensor(kinds), torch.arange(n)].sum())

    allowed = [
        kinds
        for kinds in itertools.product(range(3), repeat=n)
        if p0 <= kinds.count(Kind.PRUNED) <= p1 and u0 <= kinds.count(Kind.UNIFIED) <= u1
    ]
    found = choose_kinds(costs, (p0, p1), (u0, u1)).tolist()
    assert tuple(found) in allowed
    assert total(found) == min(map(total, allowed))


@pytest.mark.parametrize("signs", ["free", "shared"])
@pytest.mark.parametrize("multiplier", [1e-4, 1e-3, 1e-2])
def test_a_layer_takes_the_cheapest_kinds_for_its_multiplier_and_prices_by_brute_force(signs, multiplier):
    w = normal(3, 8, 16, dtype=torch.float32)
    layer = measure("w", w, Bounds(GRID, signs))
    prices, _ = layer.settle(multiplier)
    kinds = choose_kinds(layer.costs(multiplier, prices), (0, 8), (0, 8))
    blocks, least = GRID.split(w).double(), 0.0
    k = 1 / float(w.double().square().sum())
    for block, kind in zip(blocks, kinds.tolist(), strict=True):
        one = block.abs().mean() * block.sign() if signs == "free" else block.mean().expand(16)
        alike = signs == "shared" or bool((block > 0).all() or (block < 0).all())
        rounded = [16 * cost.error * layer.unit**2 for cost in (prices.free, prices.magnitude)]
        costs = [
            k * rounded[0] / multiplier + 16 * prices.free.bits + prices.kinds[0],
            k * (float((block - one).square().sum()) + rounded[1]) / multiplier
            + prices.magnitude.bits
            + (prices.kinds[2] if alike else prices.kinds[1] + 16),
            k * float(block.square().sum()) / multiplier + prices.kinds[3],
        ]
        least += min(costs)
        assert costs[kind] == pytest.approx(min(costs), rel=1e-5)
    assert float(layer.costs(multiplier, prices).amin(0).sum()) == pytest.approx(least, rel=1e-5)


def test_a_dearer_bit_never_adds_bits_or_takes_distance_away():
    layer = measure("w", network()["linear"], Bounds(GRID))
    prices, _ = layer.settle(1e-6)
    found = []
    for multiplier in torch.logspace(-8, -3, 30).tolist():
        kinds = layer.costs(multiplier, prices).argmin(0)
        bits = layer.costs(math.inf, prices).gather(0, kinds[None]).sum()  # at an infinite price no distance counts
        distance = torch.stack([0 * layer.unify, layer.unify, layer.prune]).gather(0, kinds[None]).sum()
        rounding = 16 * (prices.free.error * (kinds == 0).sum() + prices.magnitude.error * (kinds == 1).sum())
        found.append((float(bits), float(distance + rounding)))
    assert all(a[0] >= b[0] - 1e-6 * a[0] and a[1] <= b[1] + 1e-6 * b[1] for a, b in itertools.pairwise(found))
    assert found[0] != found[-1]


def test_a_smaller_file_has_a_larger_multiplier_and_coarser_steps():
    tensors = network()
    found = [allocate(tensors, bounds_of(tensors), compression) for compression in (4, 8, 16, 32, 64)]
    assert all(a.multiplier < b.multiplier and a.n_bytes > b.n_bytes for a, b in itertools.pairwise(found))
    for name in tensors:
        steps = [a.shares[name].step for a in found]
        assert steps == sorted(steps)


@pytest.mark.parametrize("compression", [5, 10, 20, 50])
def test_the_predicted_size_is_that_of_the_requested_compression(compression):
    tensors = network()
    found = allocate(tensors, bounds_of(tensors), compression)
    assert compression <= found.compression <= 1.01 * compression
    assert found.compression == sum(x.nbytes for x in tensors.values()) / found.n_bytes


def stored(tensors, allocation, grid=GRID):
    """Return the tensors as the allocation stores them: projected, and rounded to whole steps."""
    state = {}
    for name, x in tensors.items():
        share = allocation.shares[name]
        if share.structure:
            x = share.structure.project(x, grid)
        if share.step:
            step = torch.tensor(share.step, dtype=torch.float32)
            steps = (x.abs() / step).round()
            if share.structure:
                unified = GRID.split((x != 0).float()).all(1) & (share.structure.support(x, grid).kinds.flatten() == 1)
                steps = GRID.merge(
                    torch.where(unified[:, None], GRID.split(steps).clamp(min=1), GRID.split(steps)), steps
                )
            x = torch.where(x < 0, -steps * step, steps * step) + 0.0  # no negative zeros
        state[name] = x
    return state


@pytest.mark.parametrize("compression", [5, 10, 20, 40])
@pytest.mark.parametrize("recovery", [0.1, 1.0])
def test_the_predicted_size_is_near_that_of_a_real_file_of_random_weights(compression, recovery, tmp_path):
    tensors = network()
    found = allocate(tensors, bounds_of(tensors), compression, recovery=recovery)
    grids = {name: bounds.grid for name, bounds in bounds_of(tensors).items()}
    n_bytes = save_compressed(stored(tensors, found), tmp_path / "m.muws", blocks=grids).n_bytes
    assert found.n_bytes == pytest.approx(n_bytes, rel=0.05)


@pytest.mark.parametrize("compression", [5, 10, 20])
def test_the_predicted_size_is_near_that_of_a_real_file_of_trained_weights(compression, tmp_path):
    model = trained()
    tensors = dict(model.state_dict())
    bounds = {name: Bounds(GRID) for name, x in tensors.items() if x.ndim > 1}
    found = allocate(tensors, bounds, compression)
    grids = dict.fromkeys(bounds, GRID)
    n_bytes = save_compressed(stored(tensors, found), tmp_path / "m.muws", blocks=grids).n_bytes
    assert found.n_bytes == pytest.approx(n_bytes, rel=0.05)


@functools.cache
def trained() -> torch.nn.Module:
    """Return a network that was trained for a hundred steps on digits."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 8 - 1, torch.tensor(labels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 128),
                                    torch.nn.ReLU(), torch.nn.Linear(128, 10))  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@given(st.integers(1, 100_000), st.data())
@settings(deadline=None)
def test_a_share_as_ratios_gives_back_its_counts(n_blocks, data):
    n_pruned = data.draw(st.integers(0, n_blocks))
    n_unified = data.draw(st.integers(0, n_blocks - n_pruned))
    prune_ratio = n_pruned / n_blocks
    structure = MicroStructure((4, 4), prune_ratio, min(n_unified / n_blocks, 1 - prune_ratio))
    assert structure.quotas(n_blocks) == (n_pruned, n_unified)


def test_the_structures_have_exactly_the_counts():
    tensors = network()
    found = allocate(tensors, bounds_of(tensors), 20)
    assert set(found.structures) == {"first", "conv", "linear", "last"}
    for name, structure in found.structures.items():
        dense, unified, pruned = found.shares[name].counts
        assert dense + unified + pruned == len(GRID.split(tensors[name]))
        counts = structure.support(tensors[name]).counts()
        assert (counts[Kind.DENSE], counts[Kind.UNIFIED], counts[Kind.PRUNED]) == (dense, unified, pruned)
    assert any(share.counts[Kind.PRUNED] and share.counts[Kind.UNIFIED] for share in found.shares.values())


def test_the_reachable_range_is_true():
    tensors = network()
    low, high = allocate(tensors, bounds_of(tensors), 10).reachable
    assert allocate(tensors, bounds_of(tensors), high * 0.999).compression >= high * 0.999
    with pytest.raises(SettingError, match=rf"compression={high * 1.001:g} cannot be reached.*{low:.3g} to {high:.3g}"):
        allocate(tensors, bounds_of(tensors), high * 1.001)
    assert allocate(tensors, bounds_of(tensors), low * 0.9).compression == low


def test_what_may_not_be_pruned_is_not_and_what_is_fixed_stays():
    tensors = network()
    bounds = bounds_of(tensors)
    bounds["linear"] = Bounds(GRID, prune_ratio=(0.0, 0.0))
    bounds["conv"] = Bounds(GRID, prune_ratio=(0.25, 0.25), unify_ratio=(0.5, 0.5))
    bounds["last"] = Bounds(BlockGrid((2, 8)), unify_ratio=(0.5, 0.75))
    found = allocate(tensors, bounds, 20)
    assert found.compression >= 20
    assert found.shares["linear"].counts[Kind.PRUNED] == 0
    n = sum(found.shares["conv"].counts)
    assert found.shares["conv"].counts == (n // 4, n // 2, n // 4)
    dense, unified, pruned = found.shares["last"].counts
    assert (dense + unified + pruned) == 80
    assert 40 <= unified <= 60
    assert found.structures["last"].block_shape == (2, 8)


def test_the_bounds_of_a_plan_are_the_ratios_that_its_structure_has():
    layer = torch.nn.Linear(16, 16)
    entry = make_plan(layer, MicroStructure((2, 2), prune_ratio=0.5)).covered["weight"]
    assert Bounds.of(entry) == Bounds(entry.grid, "free", (0.5, 0.5), (0.0, 0.0))
    open_entry = replace(entry, structure=MicroStructure((2, 2), signs="shared"))
    assert Bounds.of(open_entry) == Bounds(entry.grid, "shared")


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_the_unit_of_a_weight_changes_no_kind(scale):
    tensors = network()
    found = allocate(tensors, bounds_of(tensors), 20)
    scaled = allocate({n: x * scale for n, x in tensors.items()}, bounds_of(tensors), 20)
    for name, share in found.shares.items():
        assert scaled.shares[name].counts == share.counts
        assert scaled.shares[name].step == share.step * scale


def test_the_more_important_layer_keeps_more():
    tensors = network()
    energy = {name: 1 / float(x.square().sum()) for name, x in tensors.items()}
    even = allocate(tensors, bounds_of(tensors), 20, energy)
    uneven = allocate(tensors, bounds_of(tensors), 20, energy | {"linear": 10 * energy["linear"]})
    assert uneven.shares["linear"].n_bytes > even.shares["linear"].n_bytes
    assert uneven.shares["conv"].n_bytes < even.shares["conv"].n_bytes


@pytest.mark.parametrize("compression", [6, 20, 50])
def test_a_distance_costs_one_over_the_energy_that_a_layer_keeps(compression):
    tensors = network()
    found = allocate(tensors, bounds_of(tensors), compression)
    for name, x in stored(tensors, found).items():
        energy = float(tensors[name].double().square().sum())
        left = energy - float((x - tensors[name]).double().square().sum())
        if name in bounds_of(tensors):  # the search is over samples, and ends within a few percent
            assert found.importance[name] * left == pytest.approx(1, rel=0.2)
        else:
            assert found.importance[name] * energy == pytest.approx(1)


def test_no_importance_gives_a_layer_less_harm_for_its_bits_by_brute_force():
    layer = replace(measure("linear", network()["linear"], Bounds(GRID)), recovery=1.0)
    for multiplier in (1e-6, 1e-5, 4e-5):
        found = thinned(layer)

        def harm(weight, x=found.layer, scale=found.scale, multiplier=multiplier):
            tried = replace(x, importance=weight / layer.energy)
            bits = 8 * scale * tried.share(multiplier).n_bytes
            return -math.log(1 - tried.lost(multiplier)) + multiplier * bits

        best = min(harm(1.02**i) for i in range(190))
        assert harm(found.weighed(multiplier).layer.importance * layer.energy) <= best + 0.02


def test_a_large_layer_is_not_pruned_wholly_to_keep_a_small_one():
    tensors = {"large": normal(0, 512, 512, dtype=torch.float32), "small": normal(1, 64, 64, dtype=torch.float32)}
    bounds = dict.fromkeys(tensors, Bounds(GRID))
    found = allocate(tensors, bounds, 300).shares
    assert all(sum(share.counts[:2]) > 0.02 * sum(share.counts) for share in found.values())
    energy = {name: 1 / float(x.square().sum()) for name, x in tensors.items()}
    linear = allocate(tensors, bounds, 300, energy).shares  # in which all of a layer costs no more than twice its half
    assert linear["large"].counts == (0, 0, 128**2)


@given(st.floats(-3, 3), st.floats(0.2, 5), st.floats(1e-6, 0.1))
def test_a_root_is_within_its_tolerance_or_at_an_end(place, power, tolerance):
    def function(x):
        return math.copysign(abs(x - place) ** power, x - place)

    found = root(function, -2.0, 2.0, tolerance)
    if abs(place) > 2:
        nearest = math.copysign(2, place)
        assert abs(found) == 2 or abs(function(found)) <= tolerance or abs(found - nearest) <= tolerance
    else:
        assert abs(function(found)) <= tolerance or abs(found - place) <= tolerance


def test_less_recovery_keeps_more_blocks_dense():
    tensors = network()
    dense = [
        sum(share.counts[0] for share in allocate(tensors, bounds_of(tensors), 20, recovery=r).shares.values())
        for r in (0.01, 0.1, 1.0)
    ]
    assert dense[0] < dense[1] < dense[2]


def test_zeros_and_integers_cost_little_and_get_no_step():
    tensors = network() | {"zeros": torch.zeros(1000), "steps": torch.tensor(7), "empty": torch.empty(0)}
    found = allocate(tensors, bounds_of(tensors), 10)
    assert [found.shares[name].step for name in ("zeros", "steps", "empty")] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["linear", "bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_by_name(name, value):
    tensors = network()
    tensors[name].view(-1)[5] = value
    with pytest.raises(StateError, match=f"{name} has NaN or Inf"):
        allocate(tensors, bounds_of(tensors), 10)


@pytest.mark.parametrize("compression", [1, 0.5, -3, math.nan, math.inf, True, "20", None])
def test_a_compression_that_is_none_is_refused(compression):
    with pytest.raises(SettingError, match=r"compression=.* is not allowed: give a finite number above 1"):
        allocate(network(), {}, compression)


@pytest.mark.parametrize("value", [(0.5, 0.2), (-0.1, 1), (0, 1.1), 0.5, "ab", (True, True), (0, None), None])
@pytest.mark.parametrize("name", ["prune_ratio", "unify_ratio"])
def test_bounds_that_are_none_are_refused(name, value):
    with pytest.raises(SettingError, match=f"{name}=.* is not allowed: give a least and a largest share"):
        Bounds(GRID, **{name: value})
    with pytest.raises(SettingError, match="sum to"):
        Bounds(GRID, prune_ratio=(0.6, 1), unify_ratio=(0.6, 1))
    with pytest.raises(SettingError, match="signs="):
        Bounds(GRID, signs="some")


@given(st.floats(1e-9, 1e-2), st.floats(1e-3, 1e3), st.integers(1, 1000), st.integers(1, 16))
def test_no_step_near_by_is_cheaper_than_the_best_step(multiplier, importance, n_values, block_numel):
    def cost(step):
        return importance * n_values * block_numel * step**2 / 12 - multiplier * n_values * math.log2(step)

    step = best_step(multiplier, importance, n_values, n_values * block_numel)
    assert cost(step) <= min(cost(step * 1.01), cost(step / 1.01))


def test_a_value_costs_the_entropy_of_its_two_bytes_and_its_squared_error():
    values = torch.tensor([0.1, -1.2, 1.2, 300.0])
    cost = value_cost(values, 1.0)
    # steps 0, -1, 1 and 300, sign last: the low bytes are 0, 3, 2 and 88, the high ones 0, 0, 0 and 2
    assert cost.bits == pytest.approx(2.0 + 0.8112781 + 2 * 32 / 2048)
    assert cost.error == pytest.approx((0.01 + 0.04 + 0.04) / 4)
    assert value_cost(values[:1], 1.0, least=1).error == pytest.approx(0.81)


def test_a_search_ends_within_its_slack_or_at_an_end():
    def size(multiplier):
        return multiplier**-0.3

    assert 99.8 <= size(search(size, 100.0)) <= 100.0
    assert search(size, 1e7) == SEARCH[0]
    assert search(size, 1e-7) == SEARCH[1]
    steps = lambda multiplier: 10.0 if multiplier < 3e-5 else 5.0  # noqa: E731
    assert search(steps, 7.0) == pytest.approx(3e-5)
