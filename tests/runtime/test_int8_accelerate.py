"""``accelerate(dtype=torch.int8)``: which layers are rounded, by what, and what is refused."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_muws import MicroStructure, accelerate
from lightning_muws.errors import SettingError
from lightning_muws.runtime.kernels import native, native_int8
from lightning_muws.runtime.kernels.native_int8 import Activation, Int8Sparse
from lightning_muws.runtime.kernels.reference import reference, relative_error
from lightning_muws.runtime.measure.activations import Inputs, candidates, fit, rounded
from lightning_muws.runtime.measure.layer import _fastest_step
from lightning_muws.runtime.native import library
from tests.support.strategies import normal

pytestmark = pytest.mark.skipif(library.level() is None, reason="the native kernels are not built")
ONLY = ["native_int8"]


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 512)).eval()
    for layer in (model[2], model[6]):
        layer.weight.data = MicroStructure((4, 4), prune_ratio=0.9).project(layer.weight.data).contiguous()
    return model.requires_grad_(False)


def batches(n: int = 3) -> list[torch.Tensor]:
    return [normal(i, 4, 3, 16, 16, dtype=torch.float32) for i in range(n)]


def test_layers_run_in_8_bits_and_the_report_says_how():
    model, x = network(), normal(9, 1, 3, 16, 16, dtype=torch.float32)
    fast, report = accelerate(model, x, dtype=torch.int8, calibration=batches(), kernels=ONLY)
    speeds = {speed.name: speed for speed in report.layers}
    for name in ("2", "6"):
        assert 0 < speeds[name].errors["native_int8"] <= 0.03
    found = [m for m in fast.modules() if isinstance(m, Int8Sparse)]
    winners = [speed for speed in report.layers if speed.winner == "native_int8"]
    assert report.is_faster
    assert len(found) >= len(winners) >= 1
    assert all(speed.rounding for speed in winners)
    with torch.no_grad():
        for other in (x, normal(3, 5, 3, 16, 16, dtype=torch.float32), normal(4, 2, 3, 20, 24, dtype=torch.float32)):
            assert relative_error(fast(other), reference(model, other)) <= 0.1
            assert torch.equal(copy.deepcopy(fast)(other), fast(other))
    assert report.max_error == 0.03
    assert "8 bits" not in report.text() or "not in 8 bits, as" in report.text()
    pickle.dumps(report.to_dict())


def test_the_default_is_float32():
    model, x = network(), normal(9, 1, 3, 16, 16, dtype=torch.float32)
    fast, report = accelerate(model, x)
    assert not [m for m in fast.modules() if isinstance(m, Int8Sparse)]
    assert all("native_int8" not in speed.times for speed in report.layers)
    fast, report = accelerate(model, x, kernels=ONLY)  # timed for comparison
    assert not [m for m in fast.modules() if isinstance(m, Int8Sparse)]
    fast, report = accelerate(model, x, kernels=ONLY, dtype=torch.bfloat16)
    assert not [m for m in fast.modules() if isinstance(m, Int8Sparse)]


def test_layers_that_lose_too_much_stay_and_the_report_says_why():
    model, x = network(), normal(9, 1, 3, 16, 16, dtype=torch.float32)
    fast, report = accelerate(model, x, dtype=torch.int8, calibration=batches(), kernels=ONLY, max_error=1e-4)
    assert not [m for m in fast.modules() if isinstance(m, Int8Sparse)]
    for speed in report.layers:
        assert "its relative error is" in speed.refused["native_int8"]
    assert "not in 8 bits, as its relative error is" in report.text()
    assert "not in 8 bits, as its relative error is" in report.markdown()


def test_without_calibration_convolutions_stay_and_the_report_says_why():
    model, x = network(), normal(9, 1, 3, 16, 16, dtype=torch.float32)
    fast, report = accelerate(model, x, dtype=torch.int8, kernels=ONLY)
    kinds = {speed.name: speed for speed in report.layers}
    assert "give calibration batches" in kinds["2"].refused["native_int8"]
    assert "native_int8" in kinds["6"].times
    assert all(m.way == "dynamic" for m in fast.modules() if isinstance(m, Int8Sparse))


def test_a_saved_plan_rounds_again(tmp_path):
    model, x = network(), normal(9, 1, 3, 16, 16, dtype=torch.float32)
    fast, report = accelerate(model, x, dtype=torch.int8, calibration=batches(), kernels=ONLY)
    report.save(tmp_path / "plan.json")
    again, _ = accelerate(model, x, dtype=torch.int8, calibration=batches(), plan=tmp_path / "plan.json")
    with torch.no_grad():
        assert torch.equal(again(x), fast(x))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"calibration": []}, "calibration has no batches"),
        ({"calibration": 3}, "calibration is a int"),
        (
            {"calibration": [torch.zeros(4, 3, 8, 8)]},
            r"batch 0 has \(n, 3, 8, 8\) float32, the example \(n, 3, 16, 16\)",
        ),
        ({"calibration": [torch.zeros(4, 3, 16, 16, dtype=torch.float64)]}, "float64, the example"),
        ({"calibration": [torch.zeros(0, 3, 16, 16)]}, "batch 0 has no samples"),
        ({"calibration": [torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), torch.nan)]}, "batch 1 has NaN"),
        ({"calibration": [torch.full((1, 3, 16, 16), 3e38)]}, "a layer gets NaN or infinity"),
        ({"calibration": [torch.zeros(1, 3, 16, 16)], "dtype": None}, "nothing is rounded to 8 bits"),
        ({"max_error": 0.1, "dtype": None}, "no lower precision is allowed"),
        ({"max_error": 0}, "max_error=0 is not allowed"),
        ({"max_error": float("nan")}, "max_error=nan is not allowed"),
        ({"dtype": torch.int16}, "dtype='int16' is not allowed"),
    ],
)
def test_refusals(arguments, match):
    model = network()
    model[0].weight.data.mul_(100)
    with pytest.raises(SettingError, match=match):
        accelerate(model, torch.zeros(1, 3, 16, 16), **{"dtype": torch.int8, **arguments})


def test_a_cpu_without_the_kernels_is_an_error(monkeypatch):
    monkeypatch.setenv("MUWS_LEVEL", "none")
    with pytest.raises(SettingError, match="needs the native kernels, which are not installed or switched off"):
        accelerate(network(), torch.zeros(1, 3, 16, 16), dtype=torch.int8)


def test_a_layer_without_8_bits_stays():
    layer = nn.Conv2d(8, 8, 3, dilation=2).eval()
    assert "do not compute this layer" in str(fit(layer, torch.zeros(1, 8, 9, 9), None))
    broken = nn.Linear(4, 4).eval()
    broken.weight.data[0, 0] = torch.inf
    assert "its weight has NaN" in str(fit(broken, torch.zeros(1, 4), None))


def test_an_outlier_is_cut_off_where_that_loses_less():
    x = normal(0, 64, 200, dtype=torch.float32)
    x[5, 5] = 1000.0
    inputs = Inputs()
    inputs.add(x)
    ways = candidates(inputs)
    losses = {way.way: float((x - rounded(x, way)).square().sum()) for way in ways}
    assert ways[0] == Activation.of(float(x.min()), 1000.0)
    assert losses["mse"] == min(loss for name, loss in losses.items() if name in ("range", "mse"))
    others = x.clone()
    others[5, 5] = 0
    spread = {way.way: float((others - rounded(others, way)).square().mean()) for way in ways}
    assert spread["percentile 99.9"] < spread["range"] / 100


def test_inputs_keep_the_range_of_all_batches_and_few_numbers():
    inputs = Inputs()
    for i in range(40):
        x = torch.zeros(64, 3000)
        x[0, 0], x[1, 1] = -i, 2 * i
        inputs.add(x)
    assert (inputs.low, inputs.high) == (-39, 78)
    assert sum(k.numel() for k in inputs.kept) <= 1 << 20
    assert len(inputs.kept) > 4


def test_a_chain_gets_the_form_in_8_bits_if_it_is_about_as_fast_as_the_fastest():
    layer, x = nn.Linear(64, 64), normal(0, 8, 64, dtype=torch.float32)
    modules = {"native": native.build(layer, (4, 4), x), "native_int8": native_int8.build(layer, (4, 4), x)}
    for seconds, expected in ((1.2, "native_int8"), (1.3, "native")):
        times = {"native": [1.0, 1.0], "native_int8": [seconds, seconds]}
        assert _fastest_step(modules, times, list(modules)) == (expected, modules[expected])
        assert _fastest_step(modules, times, ["native"]) == ("native", modules["native"])
