"""compress on whole models: the size of the file, equality after loading, and what bad input gets."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muws import LayerRule, MicroStructure, NMStructure, compress, load_compressed, save_compressed
from lightning_muws.errors import PlanError, SettingError, StateError
from tests.support.strategies import normal


class Net(nn.Module):
    """Convolutions, grouped and transposed, a batch norm, and linear layers, on smooth images."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=4), nn.ReLU(),
            nn.ConvTranspose2d(32, 32, 2, stride=2, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(128, 128), nn.Dropout(0.5), nn.ReLU(), nn.Linear(128, 16))

    def forward(self, x):
        return self.head(self.body(x))


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net()


def images(n: int = 2, seed: int = 0) -> list[torch.Tensor]:
    rough = [normal(seed + i, 8, 3, 4, 4, dtype=torch.float32) for i in range(n)]
    return [nn.functional.interpolate(x, 8, mode="bilinear") for x in rough]


def lost(model: nn.Module, small: nn.Module, seed: int = 99) -> float:
    x = torch.cat(images(2, seed))
    with torch.no_grad():
        y = copy.deepcopy(model).eval()(x)
        return float((copy.deepcopy(small).eval()(x) - y).norm() / (y - y.mean(0)).norm())


@pytest.mark.parametrize("compression", [4, 20])
@pytest.mark.parametrize("calibration", [None, images()], ids=["without data", "with data"])
def test_the_file_has_the_requested_size_and_loads_equal(tmp_path, compression, calibration):
    model = net()
    before = copy.deepcopy(model.state_dict())
    small, report = compress(model, compression, calibration)
    saved = save_compressed(small, tmp_path / "m.muws")
    assert compression <= saved.compression_ratio <= 1.05 * compression
    assert (saved.n_bytes, saved.dense_bytes) == (report.n_bytes, report.dense_bytes)
    assert saved.max_error == 0
    loaded = load_compressed(tmp_path / "m.muws")
    assert loaded.keys() == small.state_dict().keys()
    assert all(torch.equal(loaded[name], x) for name, x in small.state_dict().items())
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert f"{report.compression_ratio:.2f} times smaller" in str(report)


def test_calibration_keeps_the_outputs_better():
    model, compression = net(), 10
    for x in images(8, 50):  # running statistics that fit the data
        model.train()(x)
    model.eval()
    with_data, report = compress(model, compression, images(6))
    without, _ = compress(model, compression)
    assert lost(model, with_data) < 0.7 * lost(model, without)
    assert all(layer.error < layer.error_nearest for layer in report.layers)


def test_values_are_multiples_of_the_steps_that_the_report_has():
    small, report = compress(flat(), 10, images())
    state = small.state_dict()
    for layer in report.layers:
        steps = state[layer.name] / layer.step
        assert torch.equal(steps.round() * torch.tensor(layer.step), state[layer.name])
        assert sum(layer.counts) > 0
    assert {layer.name for layer in report.layers} == {name for name, x in state.items() if x.ndim > 1}


def test_training_flags_gradients_and_devices_stay():
    model = net().train()
    model.body[1].eval()
    model.head[0].weight.requires_grad_(False)
    small, _ = compress(model, 6, images())
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    assert [p.requires_grad for p in small.parameters()] == flags
    assert not model.head[0].weight.requires_grad
    assert not any(m._forward_pre_hooks for x in (model, small) for m in x.modules())
    assert all(p.grad is None for p in small.parameters())


def flat() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 32))


def test_the_result_is_the_same_each_time():
    first, second = (compress(flat(), 8, images())[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_report_fits_a_terminal_and_json():
    _, report = compress(flat(), 8, images())
    assert max(map(len, report.text(80).splitlines())) <= 80
    assert "refitted" in report.text(80)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["layers"][0]["name"] == "1.weight"


def test_batch_norms_get_the_statistics_of_the_compressed_network():
    model = net()
    small, _ = compress(model, 8, images())
    found = copy.deepcopy(small.body[1])
    norm = nn.BatchNorm2d(32, momentum=None).train()
    with torch.no_grad():
        for x in images():
            norm(small.body[0](x))
    torch.testing.assert_close(found.running_mean, norm.running_mean, rtol=2e-3, atol=1e-4)  # stored in float16
    torch.testing.assert_close(found.running_var, norm.running_var, rtol=2e-3, atol=1e-4)


class Shared(nn.Module):
    """One linear layer called three times, a second one that shares its weight, and an embedding tied to the head."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 64), nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight
        self.again, self.twin = nn.Linear(64, 64), nn.Linear(64, 64)
        self.once, self.never = nn.Linear(64, 64), nn.Linear(64, 64)
        self.twin.weight = self.once.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for _ in range(3):
            x = x + torch.relu(self.again(x))
        return self.head(self.twin(torch.relu(self.once(x))))


def test_shared_weights_repeated_layers_and_layers_never_called_are_compressed(tmp_path):
    torch.manual_seed(0)
    model = Shared()
    tokens = [torch.randint(0, 50, (16, 12), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    small, report = compress(model, 6, tokens)
    assert small.head.weight is small.embed.weight
    assert small.twin.weight is small.once.weight
    errors = {layer.name: layer.error for layer in report.layers}
    assert not math.isnan(errors["again.weight"] + errors["twin.weight"])
    assert math.isnan(errors["never.weight"])
    assert math.isnan(errors["embed.weight"])
    saved = save_compressed(small, tmp_path / "m.muws")
    assert 6 <= saved.compression_ratio <= 6.3
    assert all(torch.equal(x, small.state_dict()[name]) for name, x in load_compressed(tmp_path / "m.muws").items())


def test_the_batches_of_a_data_loader_feed_a_model_of_one_argument():
    loader = DataLoader(TensorDataset(torch.cat(images()), torch.zeros(16)), batch_size=8)
    by_list = compress(flat(), 8, images())[0].state_dict()
    by_loader = compress(flat(), 8, loader)[0].state_dict()
    by_hand = compress(flat(), 8, loader, forward=lambda model, batch: model(batch[0]))[0].state_dict()
    for name, x in by_list.items():
        assert torch.equal(by_loader[name], x)
        assert torch.equal(by_hand[name], x)


def test_an_encoder_layer_is_refitted_where_modules_are_called():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    _, report = compress(model, 5, [normal(0, 8, 10, 32, dtype=torch.float32)])
    fed = {layer.name: not math.isnan(layer.error) for layer in report.layers}
    assert fed == {
        "self_attn.in_proj_weight": False,  # attention multiplies by these two itself
        "self_attn.out_proj.weight": False,
        "linear1.weight": True,
        "linear2.weight": True,
    }
    assert 5 <= report.compression_ratio <= 5.25


@pytest.mark.parametrize(
    "structure",
    [MicroStructure((4, 4), 0.25, 0.5), MicroStructure((2, 4), 0.5, 0.25, signs="shared"), NMStructure(2, 4)],
    ids=["free", "shared", "n:m"],
)
@pytest.mark.parametrize("calibration", [None, images()], ids=["without data", "with data"])
def test_a_structure_with_ratios_is_kept(structure, calibration):
    small, report = compress(net(), 8, calibration, structure=structure)
    weight = small.head[0].weight.detach()
    if isinstance(structure, NMStructure):
        assert ((weight.view(128, -1, 4) != 0).sum(2) <= 2).all()
    else:
        layer = next(x for x in report.layers if x.name == "head.0.weight")
        n = sum(layer.counts)
        assert layer.counts[2] >= round(structure.prune_ratio * n)
        assert layer.counts[1] + layer.counts[2] >= round((structure.prune_ratio + structure.unify_ratio) * n)


def test_rules_leave_weights_without_blocks():
    _, report = compress(net(), 6, images(), rules=[LayerRule("head.*", skip=True)])
    counts = {layer.name: sum(layer.counts) for layer in report.layers}
    assert counts["head.0.weight"] == counts["head.3.weight"] == 0 < counts["body.0.weight"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_compressed_to_the_size(tmp_path, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64)).to(dtype)
    small, report = compress(model, 5, [normal(0, 256, 128).to(dtype)])
    assert 5 <= report.compression_ratio <= 5.25
    save_compressed(small, tmp_path / "m.muws")
    loaded = load_compressed(tmp_path / "m.muws")
    assert all(torch.equal(loaded[name], x) and x.dtype == dtype for name, x in small.state_dict().items())


def test_progress_goes_up_to_all_weights():
    seen: list[tuple[int, int]] = []
    model = flat()
    compress(model, 8, images(), progress=lambda done, total: seen.append((done, total)))
    total = sum(x.numel() for x in model.state_dict().values())
    assert seen[-1] == (total, total)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"compression": 1}, SettingError, "compression=1 is not allowed"),
        ({"compression": 100000}, SettingError, "cannot be reached"),
        ({"model": "net"}, SettingError, "model is a str, a torch.nn.Module is needed"),
        ({"calibration": []}, SettingError, "calibration has no batches"),
        ({"calibration": [torch.ones(2, 4, 8, 8)]}, StateError, r"body.0.weight cannot be fed"),
        ({"calibration": [torch.ones(2, 3, 2, 2)]}, StateError, r"body.3.weight cannot be fed"),
        ({"calibration": [*images(1), torch.full((2, 3, 8, 8), math.nan)]}, StateError, r"body.0.weight gets NaN"),
        ({"rules": [LayerRule("tail.*", skip=True)]}, PlanError, "no parameter matches"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_input_gets_one_error_and_changes_nothing(change, error, message):
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        compress(**{"model": model, "compression": 8, "calibration": images()} | change)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model.training


def test_a_weight_with_nan_is_named():
    model = net()
    model.head[0].weight.data[3, 4] = math.nan
    with pytest.raises(StateError, match=r"head\.0\.weight has NaN or Inf"):
        compress(model, 8, images())
