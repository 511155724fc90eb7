"""Training goes on inside a compressed model: what the file would hold, after each step, to the bit."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import RandomDataset
from torch import nn

from lightning_muws import (
    FineTuning,
    LayerRule,
    MicroStructure,
    NMStructure,
    compress,
    load_compressed,
    save_compressed,
)
from lightning_muws.errors import SettingError, StateError
from lightning_muws.structure.grid import BlockGrid

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 80), nn.LayerNorm(80), nn.Linear(80, 16))


def batches(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 32, generator=generator) for _ in range(n)]


def train(model, optimizer, data):
    teacher = network()
    for x in data:
        optimizer.zero_grad()
        (model(x) - teacher(x).detach()).square().mean().backward()
        optimizer.step()


def kinds(weight):
    blocks = BlockGrid().split(weight.detach()).abs()
    return blocks.amax(1) == 0, (blocks == blocks[:, :1]).all(1) & (blocks[:, 0] > 0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_step_ends_in_the_blocks_and_on_the_steps(name):
    structure = MicroStructure(prune_ratio=0.4, unify_ratio=0.3)
    small, report = compress(network(), 14, batches(4, 7), structure=structure)
    before = {n: kinds(p) for n, p in small.named_parameters() if p.ndim == 2}
    tuning = FineTuning(small, report, structure)
    optimizer = OPTIMIZERS[name](small.parameters())
    tuning.attach(optimizer)
    start = copy.deepcopy(small.state_dict())
    for x in batches(20):
        train(small, optimizer, [x])
        tuning.verify()
        for n, (pruned, unified) in before.items():
            is_zero, is_one = kinds(small.get_parameter(n))
            assert bool(is_zero[pruned].all())
            assert bool((is_one | is_zero)[unified].all())
        for n, p in small.named_parameters():
            if report.steps[n]:
                assert torch.equal((p / report.steps[n]).round() * report.steps[n], p.detach())
    assert any(not torch.equal(start[n], x) for n, x in small.state_dict().items())


def test_it_is_rounding_straight_through_of_exact_values():
    structure = MicroStructure(prune_ratio=(0, 0), unify_ratio=(0, 0))
    small, report = compress(network(), 6, batches(4, 7), structure=structure)
    steps = report.steps
    twin, exact = copy.deepcopy(small), {n: p.detach().clone() for n, p in small.named_parameters()}
    pruned = {n: kinds(p)[0] for n, p in small.named_parameters() if p.ndim == 2}
    unified = {n: kinds(p)[1] for n, p in small.named_parameters() if p.ndim == 2}
    assert not any(bool(x.any()) for x in (*pruned.values(), *unified.values()))
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    FineTuning(small, report, structure).attach(optimizer)
    teacher = network()
    for x in batches(15):
        train(small, optimizer, [x])
        gradients = torch.autograd.grad((twin(x) - teacher(x).detach()).square().mean(), list(twin.parameters()))
        for (n, p), gradient in zip(twin.named_parameters(), gradients, strict=True):
            exact[n] -= 0.1 * gradient
            p.data.copy_((exact[n] / steps[n]).round() * steps[n] if steps[n] else exact[n])
    for (n, one), other in zip(small.named_parameters(), twin.parameters(), strict=True):
        apart = (one - other).detach().abs()
        assert float(apart.max()) <= max(steps[n], 1e-5)  # a tie may be rounded the other way
        assert float((apart > 1e-5).float().mean()) < 0.01


def test_it_resumes_bit_for_bit():
    structure = MicroStructure(prune_ratio=0.4, unify_ratio=0.2)

    def begin():
        small, report = compress(network(), 12, batches(4, 7), structure=structure)
        optimizer = OPTIMIZERS["adam"](small.parameters())
        tuning = FineTuning(small, report, structure)
        tuning.attach(optimizer)
        return small, optimizer, tuning

    whole, optimizer, tuning = begin()
    train(whole, optimizer, batches(10))
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), tuning.state_dict()))
    train(whole, optimizer, batches(10, 1))
    resumed, optimizer, tuning = begin()
    for target, state in zip((resumed, optimizer, tuning), saved, strict=True):
        target.load_state_dict(state)
    train(resumed, optimizer, batches(10, 1))
    assert all(torch.equal(x, whole.state_dict()[n]) for n, x in resumed.state_dict().items())


def test_the_file_holds_what_was_trained_and_training_helps(tmp_path):
    model, data = network(), batches(200)
    small, report = compress(model, 14, data[:8])

    def loss():
        with torch.no_grad():
            return float(sum((small(x) - model(x)).square().mean() for x in batches(20, 3)))

    before = loss()
    optimizer = torch.optim.Adam(small.parameters(), 2e-3)
    tuning = FineTuning(small, report)
    tuning.attach(optimizer)
    train(small, optimizer, data)
    assert loss() < 0.85 * before
    saved = save_compressed(small, tmp_path / "model.muws")
    loaded = load_compressed(tmp_path / "model.muws")
    assert all(torch.equal(x, loaded[n]) for n, x in small.state_dict().items())
    assert saved.compression_ratio > 0.8 * report.compression_ratio


def test_structures_of_other_kinds_and_skipped_layers():
    rules = [LayerRule("4.*", skip=True), LayerRule("0.*", structure=NMStructure(2, 4))]
    small, report = compress(network(), 5, batches(4, 7), rules=rules)
    optimizer = OPTIMIZERS["adam"](small.parameters())
    tuning = FineTuning(small, report, rules=rules)
    tuning.attach(optimizer)
    train(small, optimizer, batches(10))
    tuning.verify()
    assert bool(((small[0].weight.view(96, 8, 4) != 0).sum(2) <= 2).all())


class Tuned(L.LightningModule):
    def __init__(self, model, tuning):
        super().__init__()
        self.model, self.tuning = model, tuning

    def training_step(self, x, _):
        return self.model(x).square().mean()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(RandomDataset(32, 64), batch_size=8)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 1e-3)
        self.tuning.attach(optimizer)
        return optimizer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_works_in_a_trainer_that_accumulates_and_clips(precision):
    small, report = compress(network(), 14, batches(4, 7))
    tuning = FineTuning(small, report)
    before = copy.deepcopy(small.state_dict())
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "precision": precision, "accelerator": "cpu"}
    L.Trainer(max_epochs=5, **options, **quiet).fit(Tuned(small, tuning))
    tuning.verify()
    assert any(not torch.equal(before[n], x) for n, x in small.state_dict().items())


def test_what_does_not_fit_is_refused_and_nothing_changes():
    structure = MicroStructure(prune_ratio=0.5)
    small, report = compress(network(), 8, structure=structure)
    before = copy.deepcopy(small.state_dict())
    small[0].weight.data[0, 0] += 1.0
    with pytest.raises(SettingError, match="is not as the report says"):
        FineTuning(small, report, structure)
    assert small[0].weight[0, 0].item() == before["0.weight"][0, 0] + 1.0
    small.load_state_dict(before)
    with pytest.raises(SettingError, match="the report has no weight"):
        FineTuning(small, report, MicroStructure((8, 8), prune_ratio=0.5))
    assert all(torch.equal(before[n], x) for n, x in small.state_dict().items())
    with pytest.raises(SettingError, match=r"the report has blocks of 0\.weight"):
        FineTuning(small, report, structure, [LayerRule("0.*", skip=True)])
    tuning = FineTuning(small, report, structure)
    with pytest.raises(SettingError, match="holds no parameter"):
        tuning.attach(torch.optim.SGD(network().parameters(), 0.1))
    with pytest.raises(StateError, match="another compressed model"):
        tuning.load_state_dict({"steps": {}, "exact": {}})
    small[0].weight.data[0, 0] += report.steps["0.weight"] / 3
    with pytest.raises(StateError, match=r"0\.weight"):
        tuning.verify()
