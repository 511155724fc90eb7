"""The callback in a Trainer of transformers: exact, resumed bit for bit, inside its structure, and refused by name."""

import math

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")
from transformers import EarlyStoppingCallback, TrainerCallback

from lightning_muws import LayerRule, Penalty, Phases, Retraining, load_compressed
from lightning_muws.errors import SettingError, StateError
from lightning_muws.trainer import huggingface
from lightning_muws.transformers import WeightUnificationCallback
from tests.support.huggingface import (
    PENALTY,
    PHASES,
    STRUCTURE,
    Explicit,
    ExplicitTrainer,
    Kill,
    Killed,
    Snapshot,
    bert,
    data,
    net,
    sentences,
    trainer,
)
from tests.support.strategies import same_bits
from tests.trainer.test_ranks import launch

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory:UserWarning", "ignore:.*lr_scheduler.step.*before.*optimizer.step:UserWarning"
)


def callback(**settings):
    return WeightUnificationCallback(STRUCTURE, **{"phases": PHASES, "penalty": PENALTY, **settings})


CASES = {
    "plain": {},
    "accumulate, the last window shorter": {"gradient_accumulation_steps": 3},
    "clip": {"max_grad_norm": 0.05},
    "no clip": {"max_grad_norm": 0.0},
    "accumulate and clip": {"gradient_accumulation_steps": 4, "max_grad_norm": 0.05},
    "epochs": {"max_steps": -1, "num_train_epochs": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_the_penalty_is_the_explicit_one(case, tmp_path):
    explicit, model, seen, reference = net(), net(), Snapshot(), Snapshot()
    trainer(tmp_path, explicit, Explicit(explicit), reference, kind=ExplicitTrainer, **CASES[case]).train()
    used = callback()
    trainer(tmp_path, model, used, seen, **CASES[case]).train()
    for name, expected in reference.weights.items():
        assert (seen.weights[name] - expected).abs().max() <= 1e-12, name
    used.verify()
    assert len(used.history) == 4


class Probe(TrainerCallback):
    """Checks the constraint with == after each step of the retraining phase."""

    def __init__(self, used):
        self.used, self.n_checked = used, 0

    def on_step_end(self, args, state, control, **_):
        if self.used.phase == "retraining":
            self.used.verify()
            self.n_checked += 1


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_each_step_of_retraining_ends_inside_the_structure(options, tmp_path):
    used = callback()
    probe = Probe(used)
    run = trainer(tmp_path, bert(), used, probe, dataset=sentences(30), **options)
    run.train()
    assert used.phase == "retraining"
    assert probe.n_checked == 4
    used.verify()
    weight = run.model.bert.encoder.layer[0].intermediate.dense.weight
    assert int((weight == 0).sum()) == weight.numel() // 2
    assert used.report.sparsity > 0.4


def test_accumulation_equals_the_larger_batch(tmp_path):
    models = []
    for options in ({"per_device_train_batch_size": 6}, {"gradient_accumulation_steps": 3}):
        models.append(net())
        trainer(tmp_path, models[-1], callback(), dataset=data(24), **options).train()
    one, other = (model.state_dict() for model in models)
    for name, x in one.items():
        assert (x - other[name]).abs().max() <= 1e-12, name


# ---- resume

LATE = Phases(interval="step", admm_start=4, admm_end=8, update_every=1)
SAVES = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"}


@pytest.mark.parametrize("schedule", ["restart", "constant", "cosine", "module"])
def test_a_killed_run_goes_on_bit_for_bit(schedule, tmp_path):
    settings = {"phases": LATE, "retraining": Retraining(schedule=schedule, lr=0.004)}
    whole, used = bert(), callback(**settings)
    plain = trainer(tmp_path / "whole", whole, used, dataset=sentences(12), **SAVES)
    plain.train()
    for step, phase in ((4, "dense"), (7, "admm"), (11, "retraining")) if schedule == "restart" else ((11, ""),):
        folder, killed = tmp_path / str(step), callback(**settings)
        with pytest.raises(Killed):
            trainer(folder, bert(), killed, Kill(step), dataset=sentences(12), **SAVES).train()
        resumed, again = bert(), callback(**settings)
        run = trainer(folder, resumed, again, dataset=sentences(12), **SAVES)
        checkpoint = folder / f"checkpoint-{step // 3 * 3}"
        state = torch.load(checkpoint / "muws.pt", weights_only=True)["run"]
        assert not phase or state["phase"] == phase
        run.train(resume_from_checkpoint=str(checkpoint) if step == 7 else True)
        for name, x in whole.state_dict().items():
            assert same_bits(resumed.state_dict()[name], x), name
        assert again.history == used.history
        again.verify()
        rates = [[x["learning_rate"] for x in r.state.log_history if "learning_rate" in x] for r in (plain, run)]
        assert rates[0] == rates[1]


def test_a_checkpoint_without_a_state_is_refused(tmp_path):
    trainer(tmp_path, net(), max_steps=3, **{**SAVES, "lr_scheduler_type": "linear"}).train()
    with pytest.raises(StateError, match=r"checkpoint-3 has no muws\.pt: it was written without this callback"):
        trainer(tmp_path, net(), callback()).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_structure_is_refused(tmp_path):
    trainer(tmp_path, net(), callback(), **{**SAVES, "save_steps": 12}).train()
    with pytest.raises(StateError, match=r"layer\.0\.weight"):
        trainer(tmp_path, net(), callback(rules=[LayerRule("layer.0.weight", skip=True)])).train(
            resume_from_checkpoint=True
        )


# ---- sizes, files, reports


def test_a_size_and_a_file(tmp_path, capsys):
    model = net(n_hidden=512).float()
    dataset = [{name: x.float() for name, x in sample.items()} for sample in data(22)]
    used = WeightUnificationCallback(phases=PHASES, compression=20, save_to=tmp_path / "new" / "model.muws")
    trainer(tmp_path, model, used, dataset=dataset).train()
    n_bytes = sum(p.numel() * 4 for p in model.parameters())
    assert 20 <= n_bytes / (tmp_path / "new" / "model.muws").stat().st_size <= 22  # so few steps shrink weights
    assert used.saved.compression_ratio >= 20
    loaded = load_compressed(used._file, net(n_hidden=512).float())
    assert used._run.rounding.steps.keys() <= loaded.keys()
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in loaded.items())  # it was trained rounded
    assert "Micro-structured weights" in capsys.readouterr().out


def test_each_checkpoint_leads_to_the_same_rounded_network(tmp_path):
    def used():
        return WeightUnificationCallback(phases=PHASES, compression=20)

    def make():
        return net(n_hidden=512).float()

    dataset = [{name: x.float() for name, x in sample.items()} for sample in data(22)]
    model = make()
    ours = trainer(tmp_path, model, used(), dataset=dataset, save_strategy="steps", save_steps=1)
    ours.train()
    last = ours.state.global_step
    for step in (last - 1, last - 3, last // 2):
        again = make()
        checkpoint = str(tmp_path / f"checkpoint-{step}")
        trainer(tmp_path, again, used(), dataset=dataset).train(resume_from_checkpoint=checkpoint)
        assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items()), step


def test_a_lossless_file_is_the_network(tmp_path):
    model, used = net(), callback(save_to=str(tmp_path / "model.muws"))
    trainer(tmp_path, model, used).train()
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in load_compressed(used._file).items())


def test_the_log_has_the_metrics(tmp_path):
    run = trainer(tmp_path, net(), callback())
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["muws/phase"] for entry in logs] == [0, 0] + [1] * 8 + [2] * 4
    assert logs[3]["muws/rho"] == 0.1
    assert logs[-1]["muws/primal_residual"] > 0


def test_a_second_run_of_a_model_goes_on_inside_its_structure(tmp_path):
    model, used = net(), callback()
    trainer(tmp_path, model, used).train()
    kinds = {name: support.kinds.clone() for name, support in used.supports.items()}
    before = model.layer[0].weight.detach().clone()
    trainer(tmp_path, model, used).train()
    used.verify()
    assert not torch.equal(model.layer[0].weight, before)
    assert all(torch.equal(used.supports[name].kinds, x) for name, x in kinds.items())


def test_training_that_ends_in_admm_is_projected_with_a_warning(tmp_path):
    used = callback(phases=Phases(interval="step", admm_start=2, admm_end=14))
    with pytest.warns(UserWarning, match="training ended in the admm phase"):
        trainer(tmp_path, net(), used).train()
    used.verify()


def test_what_is_frozen_or_left_out_by_rule_stays_dense(tmp_path):
    model = net()
    model.layer[0].weight.requires_grad_(False)  # as the base of a network with adapters
    used = callback()
    trainer(tmp_path, model, used).train()
    assert list(used.supports) == ["layer.2.weight"]
    assert used.plan.left_out["layer.0.weight"].reason


def test_epochs_count_the_phases_too(tmp_path):
    used = callback(phases=Phases(admm_start=0.25, admm_end=0.5, update_every=0.25))
    trainer(tmp_path, net(), used, max_steps=-1, num_train_epochs=4).train()
    # 11 steps an epoch: an update at the first step after each quarter of the one epoch of ADMM, and the projection
    assert [update.when for update in used.history] == pytest.approx([1 + 3 / 11, 1 + 6 / 11, 1 + 9 / 11, 2])


# ---- the learning rate of retraining


def rates(run):
    return [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]


def test_the_schedule_of_retraining(tmp_path):
    falling = [1e-2 * (1 - step / 14) for step in range(14)]
    for schedule, expected in {
        "module": falling[10:],
        "restart": [1e-2 * (1 - step / 4) for step in range(4)],
        "constant": [1e-2] * 4,
        "cosine": [1e-2 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)],
    }.items():
        for lr in (0.0, 0.002):
            run = trainer(tmp_path, net(), callback(retraining=Retraining(schedule=schedule, lr=lr)))
            run.train()
            factor = lr / 1e-2 if lr else 1.0
            assert rates(run) == pytest.approx(falling[:10] + [rate * factor for rate in expected]), schedule


def test_a_schedule_that_was_handed_in_goes_on(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 6)
    run = trainer(tmp_path, model, callback(), optimizers=(optimizer, scheduler))
    run.train()
    assert rates(run) == pytest.approx([0.1] * 6 + [0.01] * 6 + [0.001] * 2)


def test_the_best_checkpoint_and_patience_begin_with_retraining(tmp_path):
    stopping = EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=10.0)  # nothing is better
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    used = callback()
    run = trainer(tmp_path, net(), used, stopping, eval_dataset=data(4), max_steps=20, **options, **best)
    run.train()
    assert run.state.global_step == 13  # the first evaluation of retraining is the best, and two more are not
    assert int(run.state.best_model_checkpoint.rsplit("-")[-1]) > 10
    used.verify()


# ---- refusals


def test_what_does_not_work_is_refused(tmp_path):
    with pytest.raises(SettingError, match="WeightUnificationCallback has no setting speedup"):
        WeightUnificationCallback(speedup=2)
    with pytest.raises(SettingError, match="give phases=Phases"):
        WeightUnificationCallback(admm_end=3)
    with pytest.raises(StateError, match="nothing to verify before training"):
        callback().verify()
    with pytest.raises(StateError, match="no Trainer of transformers is running"):
        huggingface.running()
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_dataset": data(2)}
    run = trainer(tmp_path, net(), callback(retraining=Retraining(schedule="cosine")), **plateau)
    with pytest.raises(SettingError, match="schedule='cosine' cannot replace a ReduceLROnPlateau"):
        run.train()
    model = net()
    run = trainer(tmp_path, model, callback(), optimizers=(torch.optim.LBFGS(model.parameters()), None))
    with pytest.raises(SettingError, match="does not work with LBFGS"):
        run.train()
    with pytest.raises(SettingError, match=r"admm_end=10 is after the end of the run, which is 5 steps long"):
        trainer(tmp_path, net(), callback(), max_steps=5).train()


def test_the_accelerator_gets_its_method_back(tmp_path):
    run = trainer(tmp_path, net(), callback(), Kill(3))
    with pytest.raises(Killed):
        run.train()
    run.remove_callback(Kill)
    run.train()
    assert "clip_grad_norm_" not in vars(run.accelerator)


def test_nan_is_refused_in_retraining(tmp_path):
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 10:
                nn.init.constant_(kwargs["model"].layer[0].bias, math.nan)

    with pytest.raises(StateError, match=r"layer\.0\.weight holds .* NaN"):
        trainer(tmp_path, net(), callback(penalty=Penalty()), Break(), logging_nan_inf_filter=False).train()


# ---- two real processes


@pytest.mark.slow
def test_two_ranks_train_resume_and_save_as_one(tmp_path):
    ranks = launch("tests.support.huggingface_worker", tmp_path, WORLD_SIZE="2")
    one, two = ranks
    for rank in ranks:
        for name, expected in rank["explicit"].items():
            assert (rank["after admm"][name] - expected).abs().max() <= 1e-12, name
        for name, x in rank["whole"].items():
            assert same_bits(rank["resumed"][name], x), name
    for name, x in one["whole"].items():
        assert same_bits(two["whole"][name], x), name
    assert all(torch.equal(one["whole"][name], x) for name, x in load_compressed(tmp_path / "model.muws").items())
    assert [rank["saved"] for rank in ranks] == [True, False]
