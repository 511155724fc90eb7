"""The loss with one layer compressed alone: as measured by hand, and the model is as before afterwards."""

import json
import math

import pytest
import torch
from torch import nn

from lightning_muws import LayerRule, MicroStructure, sensitivity
from lightning_muws.errors import PlanError, SettingError, StateError
from lightning_muws.structure.budget import allocate
from lightning_muws.structure.cost import search
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.layer import Bounds, Share, measure
from lightning_muws.structure.sensitivity import LayerSensitivity, Point, SensitivityReport
from tests.support.strategies import normal, same_bytes

RATIOS = (2, 8, 20)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 64), nn.Linear(64, 4)
    )


def batches(n: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(normal(i, 16, 32, dtype=torch.float32), torch.arange(16) % 4) for i in range(n)]


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(same_bytes(x, before[name]) for name, x in model.state_dict().items())


def by_hand(weight: torch.Tensor, share: Share) -> torch.Tensor:
    """Return the weight projected and rounded, block after block."""
    grid = MicroStructure().grid
    kinds = share.structure.support(weight).kinds.flatten().tolist()
    blocks = grid.split(share.structure.project(weight)).clone()
    for block, kind in zip(blocks, kinds, strict=True):
        steps = (block.abs() / share.step).round()
        if kind == Kind.UNIFIED:
            steps = steps.clamp(1)
        block.copy_(steps * share.step * block.sign())
    return grid.merge(blocks, weight)


def test_the_report_equals_a_loop_by_hand():
    model = network()
    report = sensitivity(model, loss, batches(), RATIOS)
    assert [layer.name for layer in report.layers] == ["0.weight", "4.weight", "5.weight"]
    model.eval()
    with torch.no_grad():
        dense = sum(float(loss(model, batch)) for batch in batches()) / 3
        assert report.dense_loss == pytest.approx(dense, rel=1e-12)
        for layer in report.layers:
            weight = model.get_parameter(layer.name)
            raw, known = weight.clone(), measure(layer.name, weight, Bounds(MicroStructure().grid))
            smallest = known.share(1e4).n_bytes
            for ratio, point in zip(RATIOS, layer.points, strict=True):
                if point is None:
                    assert smallest > weight.nbytes / ratio
                    continue
                target = weight.nbytes / ratio
                share = known.share(search(lambda x, known=known: known.share(x).n_bytes, target))
                assert share.n_bytes <= target
                assert point.ratio == weight.nbytes / share.n_bytes >= ratio
                weight.copy_(by_hand(raw, share))
                assert point.loss == pytest.approx(sum(float(loss(model, batch)) for batch in batches()) / 3, rel=1e-6)
                assert point.distance == pytest.approx(float((weight - raw).double().square().sum()), rel=1e-5)
                weight.copy_(raw)
    assert sum(point is not None for layer in report.layers for point in layer.points) >= 5


@pytest.mark.parametrize("fails_at", [None, 0, 1, 7])
def test_the_model_is_as_before_also_after_an_exception(fails_at):
    model, calls = network(), []
    model[4].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[5].weight.data[0, 0] = -0.0
    before, modes = bits(model), [module.training for module in model.modules()]
    state = torch.get_rng_state()

    def failing(module, batch):
        calls.append(torch.rand(1))  # draws from the global generator
        if len(calls) - 1 == fails_at:
            raise RuntimeError("out of memory")
        assert not any(part.training for part in module.modules())
        assert not torch.is_grad_enabled()
        return loss(module, batch)

    if fails_at is None:
        sensitivity(model, failing, batches(), RATIOS)
        drawn = torch.stack(calls).view(-1, 3)
        assert (drawn == drawn[0]).all()  # each network sees the same random numbers
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            sensitivity(model, failing, batches(), RATIOS)
    assert unchanged(model, before)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[4].weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_a_shuffling_dataloader_gives_the_same_batches_to_each_layer():
    data = torch.utils.data.TensorDataset(torch.randn(48, 32), torch.arange(48) % 4)
    loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
    torch.manual_seed(5)
    one = sensitivity(network(), loss, loader, RATIOS)
    torch.manual_seed(5)
    model, held = network(), list(loader)
    torch.manual_seed(5)
    network()
    assert one.dense_loss == sensitivity(model, loss, held, RATIOS).dense_loss


def test_a_layer_that_is_harmed_more_is_more_important():
    model, held = network(), batches()
    with torch.no_grad():
        model[4].weight.mul_(1e-3)  # beside its bias, which passes
        targets = {id(batch): model.eval()(batch[0]) for batch in held}
    report = sensitivity(model, lambda module, batch: (module(batch[0]) - targets[id(batch)]).square().mean(), held)
    assert report.dense_loss == 0
    shares = {layer.name: report.importance()[layer.name] * layer.energy for layer in report.layers}
    assert shares["5.weight"] > 2 * shares["4.weight"]
    found = allocate(
        {name: x for name, x in model.state_dict().items() if x.is_floating_point()},
        {layer.name: Bounds(MicroStructure().grid) for layer in report.layers},
        4,
        report.importance(),
        recovery=1.0,
    )
    assert found.compression >= 4


def report_of(*slopes: float) -> SensitivityReport:
    def layer(i: int, slope: float) -> LayerSensitivity:
        points = tuple(Point(ratio, d, 1.0 + slope * d) for ratio, d in ((2, 0.5), (5, 1.0), (10, 2.0)))
        return LayerSensitivity(f"{i}", (8, 8), 4.0, points)

    return SensitivityReport((2.0, 5.0, 10.0), 1.0, tuple(layer(i, slope) for i, slope in enumerate(slopes)))


def test_the_importance_is_the_slope_and_the_median_layer_loses_1_with_its_energy():
    assert report_of(1.0, 2.0, 8.0).importance() == pytest.approx({"0": 0.125, "1": 0.25, "2": 1.0})
    assert report_of(-3.0, 0.0, 0.0).importance() == pytest.approx({"0": 0.25, "1": 0.25, "2": 0.25})
    assert min(report_of(-3.0, 5.0, 7.0).importance().values()) > 0


def slope_of(*points: Point | None) -> float:
    return LayerSensitivity("w", (8, 8), 4.0, points).slope(1.0)


def test_one_wild_point_of_a_small_distance_does_not_change_the_slope():
    layer = report_of(2.0).layers[0]
    assert slope_of(*layer.points) == pytest.approx(2.0)
    assert slope_of(Point(2.0, 0.5, 1e9), *layer.points[1:]) == pytest.approx(2.0)
    assert slope_of(Point(2.0, 0.5, -1e9), *layer.points[1:]) == pytest.approx(2.0)
    assert slope_of(*layer.points[:2], Point(10.0, 2.0, math.inf)) == pytest.approx(2.0)
    assert slope_of(None, None) == slope_of(Point(2.0, 0.0, 1.0)) == 0.0


def test_no_other_slope_has_a_smaller_sum_of_errors():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        distances, growths = torch.rand(2, 5, generator=generator, dtype=torch.float64)
        points = [Point(2.0, d, 1.0 + x) for d, x in zip(distances.tolist(), growths.tolist(), strict=True)]
        tried = torch.linspace(0, 50, 5001, dtype=torch.float64)
        errors = (growths - tried[:, None] * distances).abs().sum(1)
        found = slope_of(*points)
        assert (growths - found * distances).abs().sum() <= errors.min() + 1e-12


def test_the_report_is_a_table_and_json():
    report = sensitivity(network(), loss, batches(), (2, 5, 1000))
    text = report.text(80)
    assert "0.weight" in text
    assert "1000x" in text
    assert max(map(len, text.splitlines())) <= 80
    assert [line.split()[-1] for line in text.splitlines() if ".weight" in line] == ["-", "-", "-"]
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["dense_loss"] == report.dense_loss
    assert found["layers"][0]["points"][0]["loss"] == report.layers[0].points[0].loss
    assert found["layers"][0]["points"][2] is None
    assert found["importance"] == report.importance()


def test_a_loss_that_only_a_compressed_network_makes_infinite_is_recorded():
    model = network()
    raw = model[4].weight.clone()

    def fragile(module, batch):
        value = loss(module, batch)
        return value if torch.equal(module[4].weight, raw) else value / 0

    report = sensitivity(model, fragile, batches(1), (2,))
    assert [layer.points[0].loss for layer in report.layers][1] == math.inf
    assert "inf" in str(report)
    json.dumps(report.to_dict(), allow_nan=False)


def test_progress_counts_the_measurements():
    seen = []
    sensitivity(network(), loss, batches(1), (2, 1000), progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (1, 7)
    assert seen[-1] == (7, 7)
    assert sorted(seen) == seen


def test_rules_leave_layers_out():
    report = sensitivity(network(), loss, batches(1), (2,), rules=[LayerRule("4.*", skip=True)])
    assert [layer.name for layer in report.layers] == ["0.weight", "5.weight"]
    with pytest.raises(PlanError, match="no parameter matches the rule"):
        sensitivity(network(), loss, batches(1), (2,), rules=[LayerRule("nowhere")])


def test_bad_input_is_one_clear_error_and_changes_nothing():
    model = network()
    before = bits(model)
    with pytest.raises(SettingError, match="batches is empty"):
        sensitivity(model, loss, [])
    for wrong in ([1], [], [float("nan")], ["2"], 5, [True]):
        with pytest.raises(SettingError, match=r"ratios=.* is not allowed: give finite numbers above 1"):
            sensitivity(model, loss, batches(), wrong)
    with pytest.raises(SettingError, match="loss returned a float on batch 0"):
        sensitivity(model, lambda module, batch: 1.0, batches())
    with pytest.raises(SettingError, match=r"loss returned a tensor of shape \(16,\) on batch 0"):
        sensitivity(model, lambda module, batch: module(batch[0])[:, 0], batches())
    bad = [*batches(2), (torch.full((16, 32), torch.nan), torch.arange(16) % 4)]
    with pytest.raises(StateError, match=r"the loss is nan on batch 2 of 3 \(counted from 0\)"):
        sensitivity(model, loss, bad)
    assert unchanged(model, before)
    with torch.no_grad():
        model[4].weight[0, 0] = torch.nan
    with pytest.raises(StateError, match=r"4.weight has NaN or Inf"):
        sensitivity(model, lambda module, batch: module[0](batch[0]).sum(), batches())
