"""The times of layers: the table follows the times it is given, equal layers are timed once, and nothing is changed."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_muws import LayerRule, MicroStructure, NMStructure, layer_times
from lightning_muws.errors import SettingError
from lightning_muws.runtime import predict
from lightning_muws.runtime.accelerate import Acceleration, Settings
from lightning_muws.runtime.kernels import KERNELS
from lightning_muws.runtime.measure import shares
from lightning_muws.runtime.measure.shares import SHARES
from lightning_muws.runtime.native.library import level
from lightning_muws.runtime.predict import fit
from lightning_muws.runtime.rewrite.observe import Example
from lightning_muws.structure.layer import Bounds
from lightning_muws.structure.plan import make_plan
from lightning_muws.structure.speed import allocate_time, walk
from lightning_muws.structure.structure import Structure
from tests.support.strategies import normal, same_bytes

OPEN = MicroStructure()
NEEDS_NATIVE = pytest.mark.skipif(level() is None, reason="the native kernels are not built here")
REST = 0.5  # seconds of a network outside of its layers


def fake(monkeypatch, n_layers, dense=1.0, network=2.0, scale=1.0):
    """Let a layer take ``dense`` seconds, less by its share of pruned blocks, and networks what their layers sum to.

    The races that were run are returned.
    """
    races = []

    def of_layers(tasks, clock, timing=None, keep=(), between=None):
        races.append(list(tasks))
        last = len(shares.SHARES) - 1
        seconds = {name: dense * (1 - shares.SHARES[min(int(name), last)]) for name in tasks if name.isdecimal()}
        return {name: [seconds.get(name, dense)] * 3 for name in tasks}

    sums = []

    def recorded(choices, hulls, allowed):
        multiplier, picked = walk(choices, hulls, allowed)
        sums.append(sum(choice.seconds for choice in picked.values()) if picked else n_layers * dense)
        return multiplier, picked

    def of_networks(tasks, clock, timing=None, keep=(), between=None):
        fast = REST + scale * sums.pop(0) if "fast" in tasks else network
        return {name: [fast if name.startswith("fast") else network] * 3 for name in tasks}

    monkeypatch.setattr(shares, "race", of_layers)
    monkeypatch.setattr(predict, "walk", recorded)
    monkeypatch.setattr(predict, "race", of_networks)
    return races


def times_of(model, x, *rules, structure=OPEN, say=lambda line: None):
    return layer_times(model, x, make_plan(model, structure, rules, open_ratios=True).covered, say)


def mlp(*sizes):
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


@NEEDS_NATIVE
def test_the_table_has_the_times_that_were_measured(monkeypatch):
    fake(monkeypatch, 3)
    times = times_of(mlp(32, 32, 32, 32), torch.ones(5, 32))
    assert (times.dense, times.rest) == (2.0, pytest.approx(REST))
    assert times.layers.keys() == {"0.weight", "1.weight", "2.weight"}
    for layer in times.layers.values():
        assert layer.seconds == pytest.approx(1.0)
        assert [curve.block_shape for curve in layer.curves] == [(2, 1), (4, 1), (4, 4), (8, 8)]
        for curve in layer.curves:
            assert curve.prune_ratios == SHARES
            assert curve.seconds == pytest.approx([1 - share for share in SHARES])


@NEEDS_NATIVE
def test_layers_are_scaled_to_what_whole_networks_take(monkeypatch):
    fake(monkeypatch, 2, scale=1.4)
    times = times_of(mlp(32, 32, 32), torch.ones(5, 32))
    assert times.rest == pytest.approx(REST)
    assert times.layers["0.weight"].seconds == pytest.approx(1.4)
    assert times.layers["0.weight"].curves[0].seconds == pytest.approx([1.4 * (1 - share) for share in SHARES])


def test_equal_layers_are_measured_once(monkeypatch):
    fake(monkeypatch, 4)
    lines = []
    x = torch.ones(2, 32)
    times = times_of(mlp(32, 32, 32, 32, 16), x, say=lines.append)
    assert lines[:2] == [
        "measured 1 of 2 kinds of layers, Linear 32x32",
        "measured 2 of 2 kinds of layers, Linear 16x32",
    ]
    assert lines[2].startswith("measured the whole network")
    assert times.layers["0.weight"] == times.layers["2.weight"]
    assert len(lines) == 3
    counts = []
    for sizes in ((32, 32), (32, 32, 32, 32)):
        races = fake(monkeypatch, 1)
        times_of(mlp(*sizes), x)
        counts.append(sum("dense" in race for race in races))  # the others choose kernels for whole networks
    assert counts[0] == counts[1] > 0


def test_another_stride_input_or_structure_is_another_kind(monkeypatch):
    fake(monkeypatch, 4)
    lines = []
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, padding=1), nn.Conv2d(8, 8, 3, 2, padding=1)
    )
    times_of(model, torch.ones(1, 8, 16, 16), say=lines.append)
    assert len(lines) == 3 + 1
    lines.clear()
    model = mlp(32, 32, 32, 32)
    times_of(model, torch.ones(1, 32), LayerRule("1.*", structure=MicroStructure((4, 4), 0.5)), say=lines.append)
    assert len(lines) == 2 + 1


def test_a_kernel_that_gains_too_little_leaves_the_layer_dense(monkeypatch):
    races = fake(monkeypatch, 1)
    monkeypatch.setattr(shares, "SHARES", (0.05, 0.08))  # gains of less than accelerate's 1.1
    layer = times_of(mlp(32, 32), torch.ones(2, 32)).layers["0.weight"]
    assert races
    assert all(s == pytest.approx(layer.seconds) for curve in layer.curves for s in curve.seconds)


@NEEDS_NATIVE
def test_a_structure_set_by_a_rule_is_measured_as_it_is(monkeypatch):
    fake(monkeypatch, 2)
    rules = [LayerRule("0.*", structure=MicroStructure((4, 1), 0.5)), LayerRule("1.*", structure=NMStructure(2, 4))]
    times = times_of(mlp(32, 32, 32, 32), torch.ones(2, 32), *rules)
    for name in ("0.weight", "1.weight"):
        assert times.layers[name].curves == ()
        assert times.layers[name].seconds / times.layers["2.weight"].seconds == pytest.approx(1 - SHARES[0])


def test_a_block_shape_of_the_user_stays(monkeypatch):
    fake(monkeypatch, 1)
    times = times_of(mlp(32, 32), torch.ones(2, 32), structure=MicroStructure((4, 2)))
    assert {curve.block_shape for curve in times.layers["0.weight"].curves} == {(4, 2)}


@NEEDS_NATIVE
def test_unified_blocks_have_curves_where_a_kernel_gains_from_them(monkeypatch):
    fake(monkeypatch, 1)
    for batch, expected in ((1, {(4, 4), (8, 8), (16, 16)}), (2, set())):
        layer = times_of(mlp(32, 32), torch.ones(batch, 32)).layers["0.weight"]
        unified = [curve for curve in layer.curves if curve.is_unified]
        assert {curve.block_shape for curve in unified} == expected
        assert all(curve.prune_ratios == (0.0, *SHARES) for curve in unified)


def test_a_layer_that_runs_twice_counts_twice(monkeypatch):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.once = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.once(self.layer(self.layer(x)))

    fake(monkeypatch, 1)
    layers = times_of(Twice(), torch.ones(2, 32)).layers
    assert layers["layer.weight"].seconds == pytest.approx(2 * layers["once.weight"].seconds)


def test_a_shared_weight_takes_the_time_of_both_layers(monkeypatch):
    model = mlp(32, 32, 32, 32)
    model[2].weight = model[0].weight
    fake(monkeypatch, 3)
    layers = times_of(model, torch.ones(2, 32)).layers
    assert layers.keys() == {"0.weight", "1.weight"}
    assert layers["0.weight"].seconds == pytest.approx(2 * layers["1.weight"].seconds)
    for both, one in zip(layers["0.weight"].curves, layers["1.weight"].curves, strict=True):
        assert both.seconds == pytest.approx([2 * s for s in one.seconds])


def test_what_the_example_does_not_reach_has_no_time(monkeypatch):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.used(x)

    fake(monkeypatch, 1)
    assert times_of(Half(), torch.ones(2, 32)).layers.keys() == {"used.weight"}
    with pytest.raises(SettingError, match="the example reaches no covered weight of a Linear, Conv1d or Conv2d"):
        times_of(Half(), torch.ones(2, 32), LayerRule("used.*", skip=True))
    with pytest.raises(SettingError, match="without tensors"):
        times_of(Half(), "text")


def test_the_model_and_the_random_numbers_stay_as_they_were(monkeypatch):
    fake(monkeypatch, 1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 8, 3))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    times_of(model, torch.ones(2, 3, 9, 9))
    assert model.training
    assert all(same_bytes(x, model.state_dict()[name]) for name, x in before.items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_without_kernels_a_speedup_is_refused_with_what_can_be_reached(monkeypatch):
    races = fake(monkeypatch, 2, network=REST + 2)
    for name in [name for name in KERNELS if name != "dense"]:
        monkeypatch.setitem(KERNELS, name, lambda layer, block_shape, example: None)
    model = mlp(32, 32, 32)
    times = times_of(model, torch.ones(2, 32))
    assert all(race == ["dense"] for race in races)
    weights = {name: model.get_parameter(name) for name in times.layers}
    bounds = {name: Bounds(OPEN.grid) for name in weights}
    with pytest.raises(SettingError, match=r"speedup=2 cannot be reached on this machine.* allow 1 to 1, so"):
        allocate_time(weights, bounds, times, 2)


def test_a_kernel_that_raises_is_left_out(monkeypatch):
    def raising(layer, block_shape, example):
        raise RuntimeError("no such instruction")

    races = fake(monkeypatch, 1)
    for name in [name for name in KERNELS if name != "dense"]:
        monkeypatch.setitem(KERNELS, name, raising if name == "native" else lambda *_: None)
    times_of(mlp(32, 32), torch.ones(2, 32))
    assert all(race == ["dense"] for race in races)


@pytest.mark.parametrize("structure", [MicroStructure((4, 4), 0.5, 0.25), NMStructure(2, 4)])
def test_random_weights_are_inside_their_structure(structure: Structure):
    layer = nn.Conv2d(8, 16, 3)
    entry = make_plan(nn.Sequential(layer), structure).covered["0.weight"]
    random = shares.with_random_weights(layer, structure, entry.grid)
    assert random.weight is not layer.weight
    assert torch.equal(structure.project(random.weight, entry.grid), random.weight)
    x = normal(0, 1, 8, 5, 5, dtype=torch.float32)
    assert not torch.equal(random(x), layer(x))


@pytest.mark.parametrize(
    ("sums", "totals", "expected"),
    [
        ([1, 2, 3], [1.5, 2.5, 3.5], (0.5, 1.0)),
        ([2, 2, 2], [3, 3, 3], (1.0, 1.0)),  # nothing to tell the scale from
        ([1, 2, 3], [0.5, 2.0, 3.5], (0.0, 15 / 14)),  # a negative rest: a line through zero
        ([1, 2, 3], [9, 10, 11], (8.0, 1.0)),
        ([1, 2, 3], [9, 9, 9], (8.0, 0.5)),  # a scale out of its limits
    ],
)
def test_the_rest_and_the_scale_are_the_nearest_line(sums, totals, expected):
    assert fit(sums, totals) == pytest.approx(expected)


@NEEDS_NATIVE
def test_whole_networks_are_also_timed_with_the_kernels_of_a_chain_where_another_one_wins_alone(monkeypatch):
    forms = []
    fake(monkeypatch, 3)
    of_networks = predict.race

    def recorded(tasks, *args, **kwargs):
        forms.append(set(tasks))
        return of_networks(tasks, *args, **kwargs)

    monkeypatch.setattr(predict, "race", recorded)
    monkeypatch.setattr(shares, "SHARES", (0.05, 0.5))  # at .05 no kernel wins, so the layer stays dense
    monkeypatch.setattr(predict, "PARTS", (0.0, 1.0))
    times_of(mlp(32, 32, 32, 32), torch.ones(5, 32))
    assert "fast_native" in forms[1]
    assert "fast_native" not in forms[2]


@pytest.mark.slow
def test_real_clocks_time_layers_of_all_types(monkeypatch):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
            self.wide = nn.Conv2d(16, 16, 3, padding=1, groups=16)
            self.line = nn.Conv1d(16, 32, 3)
            self.last = nn.Linear(32, 10)

        def forward(self, x, scale=1.0):
            x = self.wide(self.one(x)).flatten(2)
            return self.last(self.line(x).mean(2) * scale)

    model = Mixed()
    times = times_of(model, torch.randn(1, 3, 8, 8))
    assert times.layers.keys() == {"one.0.weight", "wide.weight", "line.weight", "last.weight"}
    assert times.dense > 0
    assert times.rest >= 0
    for layer in times.layers.values():
        assert layer.seconds > 0
        assert all(s > 0 for curve in layer.curves for s in curve.seconds)


def test_an_auto_shape_is_open_and_set_ratios_are_not(monkeypatch):
    fake(monkeypatch, 2)
    rules = [
        LayerRule("0.*", structure=MicroStructure("auto", 0.5)),
        LayerRule("1.*", structure=MicroStructure("auto")),
    ]
    times = times_of(mlp(32, 32, 32, 32), torch.ones(2, 32), *rules)
    assert times.layers["0.weight"].curves == ()
    assert times.layers["1.weight"].curves == times.layers["2.weight"].curves


def test_compiled_parts_have_the_names_that_plans_give_them(monkeypatch):
    fake(monkeypatch, 2)
    model = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(32, 32)), backend="eager"), nn.Linear(32, 32))
    assert times_of(model, torch.ones(2, 32)).layers.keys() == {"0.0.weight", "1.weight"}
    assert times_of(torch.compile(mlp(32, 32), backend="eager"), torch.ones(2, 32)).layers.keys() == {"0.weight"}


def test_layers_of_a_small_network_are_timed_warm_and_of_a_large_one_cold():
    settings, x = Settings(), Example.of(torch.ones(1, 8))
    small = Acceleration.of(nn.Linear(8, 8).eval(), x, settings).criteria(())
    large = Acceleration.of(nn.Sequential(nn.Linear(8, 2**17), nn.ReLU()).eval(), x, settings).criteria(())
    assert (small.n_bytes, large.n_bytes) == (4 * 72, 4 * 9 * 2**17)
    assert small.timing.sample_s > large.timing.sample_s == 0
