"""The largest compression for an allowed drop, by laws and a metric of known shape; no Trainer."""

import math

import pytest
import torch
from torch import nn

from lightning_muws import MicroStructure, NMStructure
from lightning_muws.errors import SettingError, StateError
from lightning_muws.structure.budget import RECOVERY
from lightning_muws.structure.plan import LayerRule, make_plan
from lightning_muws.training.budget import Budget
from lightning_muws.training.drop import LEAST, Drop, DropReport, choose_compression, compressed
from tests.support.strategies import same_bytes


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 8))


def covered(module: nn.Module, rules=()):
    return make_plan(module, MicroStructure(), rules, open_ratios=True).covered


@pytest.mark.parametrize(
    ("monitor", "metric", "value", "drop"),
    [
        ("val_accuracy", "val_accuracy", 0.4, 0.1),
        ("val_loss", "val_loss", 0.6, 0.1),
        ("MeanAbsoluteError", "MeanAbsoluteError", 0.4, -0.1),
        ("-val_rmse", "val_rmse", 0.7, 0.2),
        ("-val_loss", "val_loss", 0.7, 0.2),
        ("val_rmse", "val_rmse", 0.7, -0.2),
    ],
)
def test_a_drop_is_how_much_worse_the_metric_is(monitor, metric, value, drop):
    allowed = Drop(0.1, monitor)
    assert allowed.metric == metric
    assert allowed.of(0.5, value) == pytest.approx(drop)
    assert allowed.of(0.5, math.nan) == math.inf


@pytest.mark.parametrize("wrong", [-0.1, math.nan, math.inf, True, "0.01", None])
def test_a_drop_that_is_none_is_refused(wrong):
    with pytest.raises(SettingError, match=r"max_drop=.* is not allowed: give how much the metric may drop, such as"):
        Drop(wrong, "val_accuracy")


@pytest.mark.parametrize("wrong", ["", "-", None, 3])
def test_a_monitor_that_is_none_is_refused(wrong):
    with pytest.raises(SettingError, match=r"monitor=.* is not allowed: with max_drop, give the name of a metric"):
        Drop(0.01, wrong)


@pytest.mark.parametrize(
    ("most", "power", "share"),
    [(0.004, 1.0, 0.0), (0.01, 0.5, 0.3), (0.05, 2.0, 0.1), (0.2, 0.3, 0.5), (0.001, 1.5, 0.0)],
)
def test_the_largest_compression_whose_predicted_drop_is_allowed_is_found(most, power, share):
    module = network()
    entries = covered(module)

    def drops(compression: float) -> tuple[float, float]:
        both = 0.01 * compression**power
        return both, share * both

    def measure(allocation, recovery):
        if allocation is None:
            return 0.9
        both, rounding = drops(round(allocation.compression, 6))
        return 0.9 - (both if recovery else rounding)

    def predicted(compression: float) -> float:
        both, rounding = drops(Budget(compression).allocate(module, entries).compression)
        return rounding + RECOVERY * (both - rounding)

    found = choose_compression(Drop(most, "val_accuracy"), measure, module, entries)
    assert found.baseline == 0.9
    if found.predicted > most:
        assert found.compression == LEAST
        assert "even this is more than" in found.doubt
    else:
        assert predicted(found.compression) == pytest.approx(found.predicted, rel=1e-5, abs=1e-9)
        rejected = [compression for compression, drop in found.probes if drop > most]
        assert all(compression > found.compression for compression in rejected)
        highest = Budget(LEAST).allocate(module, entries).reachable[1]
        # six bisections: the next compression up is this close
        assert min([*rejected, highest]) <= found.compression * (highest / LEAST) ** (1 / 2**6) * 1.02
        assert not found.doubt
    assert len(found.probes) <= 7
    assert dict(found.probes)[found.compression] == found.predicted


def test_a_compression_that_is_too_much_even_without_rounding_costs_one_measurement():
    module, seen = network(), []

    def measure(allocation, recovery):
        seen.append((allocation, recovery))
        return 0.9 if allocation is None else 0.0

    found = choose_compression(Drop(0.01, "val_accuracy"), measure, module, covered(module))
    assert [recovery for _, recovery in seen] == [1.0] * 8  # the dense network, six probes, and the least
    assert found.predicted == pytest.approx(RECOVERY * 0.9)


def test_a_metric_that_no_compression_harms_is_doubted():
    module = network()
    found = choose_compression(
        Drop(0.01, "rmse"), lambda allocation, _: 0.9 if allocation else 0.5, module, covered(module)
    )
    assert found.compression > 20
    assert found.doubt == "; no compression did any harm: if rmse is better where it is smaller, put '-' before it"


def test_a_metric_that_is_nan_is_too_far_or_refused():
    module = network()
    entries = covered(module)
    found = choose_compression(Drop(0.01, "a"), lambda allocation, _: math.nan if allocation else 0.5, module, entries)
    assert found.predicted == math.inf
    with pytest.raises(StateError, match="a is nan when the method starts"):
        choose_compression(Drop(0.01, "a"), lambda *_: math.nan, module, entries)


def test_a_network_that_cannot_be_two_times_smaller_is_refused():
    module = nn.Linear(16, 8)
    with pytest.raises(SettingError, match=r"max_drop=0.01 needs a network that can be made at least 2 x smaller"):
        Drop(0.01, "a").check(module, covered(module))


@pytest.mark.parametrize("recovery", [0.0, 1.0])
def test_a_compressed_module_holds_the_structure_and_the_steps_and_gets_its_bits_back(recovery):
    module = network()
    rules = [LayerRule("3.weight", structure=NMStructure(2, 4)), LayerRule("4.*", skip=True)]
    entries = covered(module, rules)
    allocation = Budget(8).allocate(module, entries)
    before = {name: x.clone() for name, x in module.state_dict().items()}
    with compressed(module, entries, allocation, recovery):
        now = {name: x.clone() for name, x in module.state_dict().items()}
    assert all(same_bytes(x, before[name]) for name, x in module.state_dict().items())
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert same_bytes(now[name], before[name])
    share = allocation.shares["0.weight"]
    assert share.counts[1] + share.counts[2] > 0
    moved = (now["0.weight"] - before["0.weight"]).abs().max()
    if recovery:
        blocks = MicroStructure().grid.split(now["0.weight"])
        same = (blocks.abs() == blocks[:, :1].abs()).all(1)
        assert int(same.sum()) >= share.counts[1] + share.counts[2]
        assert int((blocks == 0).all(1).sum()) >= share.counts[2]
        torch.testing.assert_close(now["0.weight"] / share.step, (now["0.weight"] / share.step).round())
        assert int((now["3.weight"] == 0).sum()) >= 64 * 64 // 2
        assert moved > share.step
    else:
        assert 0 < moved <= share.step
    step = allocation.shares["4.weight"].step
    torch.testing.assert_close(now["4.weight"] / step, (before["4.weight"] / step).round())


def test_a_block_shape_that_the_budget_chose_is_the_one_that_is_compressed():
    module = network()
    with torch.no_grad():  # blocks of 2 x 8 are what suits
        module[3].weight.copy_(torch.randn(32, 8).repeat_interleave(2, 0).repeat_interleave(8, 1))
    entries = make_plan(module, MicroStructure("auto"), open_ratios=True).covered
    allocation = Budget(8).allocate(module, entries)
    shapes = {name: structure.block_shape for name, structure in allocation.structures.items()}
    assert set(shapes.values()) != {(4, 4)}
    with compressed(module, entries, allocation):
        for name, structure in allocation.structures.items():
            blocks = structure.grid.split(module.get_parameter(name).detach())
            same = (blocks.abs() == blocks[:, :1].abs()).all(1)
            assert int(same.sum()) >= sum(allocation.shares[name].counts[1:])


def test_a_module_gets_its_bits_back_after_an_exception():
    module = network()
    entries, before = covered(module), {name: x.clone() for name, x in module.state_dict().items()}
    allocation = Budget(4).allocate(module, entries)
    with pytest.raises(RuntimeError, match="stop"), compressed(module, entries, allocation):
        raise RuntimeError("stop")
    assert all(same_bytes(x, before[name]) for name, x in module.state_dict().items())
    module[4].weight.data[0, 0] = math.nan
    before["4.weight"][0, 0] = math.nan
    with pytest.raises(StateError, match=r"4\.weight"), compressed(module, entries, allocation):
        pass
    assert all(same_bytes(x, before[name]) for name, x in module.state_dict().items())


def test_the_report_is_a_sentence():
    report = DropReport("val_accuracy", 0.005, 0.9, 20.0, 0.003, ((20.0, 0.003),))
    assert (report.drop, report.is_kept) == (None, None)
    assert str(report).startswith("max_drop=0.005 of val_accuracy: compression=20 was chosen, with a predicted drop of")
    kept = DropReport("val_accuracy", 0.005, 0.9, 20.0, 0.003, (), 0.896)
    assert kept.is_kept
    assert str(kept).startswith("max_drop=0.005 of val_accuracy was kept: 0.8960 after 0.9000 is a drop of 0.004; ")
    missed = DropReport("-val_rmse", 0.005, 0.9, 20.0, 0.003, (), 0.91)
    assert not missed.is_kept
    assert "was missed" in str(missed)
