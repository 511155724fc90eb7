"""The callback in real Trainers: exact in ADMM and in retraining, without effect elsewhere."""

import csv
import math
import re
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

from lightning_muws import LayerRule, MicroStructure, Penalty, Phases, Retraining, WeightUnificationCallback
from lightning_muws.errors import PlanError, SettingError, StateError
from lightning_muws.structure.kinds import Kind
from tests.support.explicit import PENALTY, PHASES, Explicit, Snapshot, assert_same_after_admm
from tests.support.modules import OPTIMIZERS, QUIET, STRUCTURE, Probe, TwoLayers, fit
from tests.support.strategies import same_bits

COVERED = ("layer.0.weight", "layer.2.weight")


# ---- ADMM: the same as a module that adds the penalty to its own loss


class ExplicitLayers(Explicit, TwoLayers):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss and loss["loss"] + self.penalty()


class Skipping(TwoLayers):
    def training_step(self, batch, batch_idx):
        return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)


class ExplicitSkipping(ExplicitLayers, Skipping):
    pass


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 4},
        {"accumulate_grad_batches": 3},  # the last window of 8 batches has two
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05},
    ],
    ids=str,
)
def test_the_injected_penalty_is_the_explicit_one(optimizer, options):
    assert_same_after_admm(
        TwoLayers(optimizer), ExplicitLayers(optimizer), options=lambda: {"precision": "64-true", **options}
    )


class Accumulating(TwoLayers):
    def configure_callbacks(self):
        return [GradientAccumulationScheduler({0: 1, 2: 3, 3: 2})]


class ExplicitAccumulating(ExplicitLayers, Accumulating):
    pass


def test_windows_may_change_their_length():
    assert_same_after_admm(Accumulating(), ExplicitAccumulating(), options=lambda: {"precision": "64-true"})


class Thawing(TwoLayers):
    """Its first layer is frozen until the third epoch."""

    def on_train_epoch_start(self):
        self.layer[0].requires_grad_(self.current_epoch >= 2)


class Joining(TwoLayers):
    """Its first layer joins the optimizer in the third epoch: a rule must name it, so that it is covered before."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.layer[2].parameters(), 0.05, momentum=0.9)

    def on_train_epoch_start(self):
        if self.current_epoch == 2:
            self.optimizers().add_param_group({"params": list(self.layer[0].parameters())})


@pytest.mark.parametrize(("kind", "rules"), [(Thawing, ()), (Joining, [LayerRule(COVERED[0], structure=STRUCTURE)])])
def test_layers_that_begin_to_learn_in_mid_fit_get_their_penalty(kind, rules):
    class ExplicitKind(ExplicitLayers, kind):
        def on_train_epoch_start(self):
            kind.on_train_epoch_start(self)
            super().on_train_epoch_start()

    assert_same_after_admm(kind(), ExplicitKind(), options=lambda: {"precision": "64-true"}, rules=rules)


@pytest.mark.filterwarnings("ignore:.*training_step.*returned.*None")
@pytest.mark.parametrize("accumulate", [1, 3, 4])
def test_steps_that_return_none_get_their_share(accumulate):
    options = {"precision": "64-true", "accumulate_grad_batches": accumulate}
    assert_same_after_admm(Skipping(), ExplicitSkipping(), options=lambda: options)


# ---- retraining: the constraint holds with == after every step


@pytest.mark.parametrize("unified", ["tied", "frozen"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "bf16-true"}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}],
    ids=["plain", "bf16-true", "accumulate and clip"],
)
def test_the_constraint_holds_after_every_step(unified, optimizer, options):
    module = TwoLayers(optimizer)
    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES, retraining=Retraining(unified))
    first, last = Probe(callback), Probe(callback)
    fit(module, first, callback, last, max_epochs=7, **options)
    assert first.n_checked == last.n_checked == 3 * 8 * 2
    callback.verify()


@pytest.mark.parametrize("unified", ["tied", "frozen"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_constraint_holds_with_fresh_optimizers(unified, optimizer):
    class Scheduled(TwoLayers):  # its schedule restarts, and with it the moments
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]

    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES, retraining=Retraining(unified))
    first, last = Probe(callback), Probe(callback)
    fit(Scheduled(optimizer), first, callback, last, max_epochs=7)
    assert first.n_checked == last.n_checked == 3 * 8 * 2


@pytest.mark.parametrize("unified", ["tied", "frozen"])
def test_free_and_tied_weights_move_and_frozen_ones_do_not(unified):
    module, at_freeze = TwoLayers("adam"), {}

    class AtFreeze(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            if callback.phase == "retraining" and not at_freeze:
                at_freeze.update({n: pl_module.get_parameter(n).detach().clone() for n in COVERED})

    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES, retraining=Retraining(unified))
    fit(module, callback, AtFreeze(), max_epochs=6)
    support, name = callback.supports[COVERED[0]], COVERED[0]
    moved = support.grid.split(module.get_parameter(name).detach()) != support.grid.split(at_freeze[name])
    kinds = support.kinds.flatten()
    assert moved[kinds == Kind.DENSE].any()
    assert moved[kinds == Kind.UNIFIED].any() == (unified == "tied")
    assert not moved[kinds == Kind.PRUNED].any()


def test_clipping_counts_the_free_directions_only():
    norms = []

    class Norms(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):  # after the callback, before the clip
            if callback.phase == "retraining":
                if not norms:
                    optimizer.register_step_post_hook(lambda *_: norms[-1].append(norm(pl_module)))
                errors.extend(s.error(pl_module.get_parameter(n).grad) for n, s in callback.supports.items())
                norms.append([norm(pl_module)])

    def norm(module):
        return float(torch.cat([p.grad.flatten() for p in module.parameters()]).norm())

    errors = []
    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES)
    fit(TwoLayers(), callback, Norms(), max_epochs=5, gradient_clip_val=0.1)
    assert errors
    assert all(error == 0 for error in errors)
    assert len(norms) == 8
    assert max(before for before, _ in norms) > 0.1
    for before, after in norms:  # what is clipped is the norm of the free directions
        assert after == pytest.approx(min(before, 0.1), rel=1e-4)


# ---- the phases on the Trainer's clock


class Journal(Callback):
    def __init__(self, callback):
        self.callback, self.phases, self.rhos = callback, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.phases.append(self.callback.phase)


def test_phases_change_at_the_beginning_of_epochs():
    callback = WeightUnificationCallback(
        STRUCTURE,
        phases=Phases(admm_start=0.2, admm_end=0.6, update_every=1),
        penalty=Penalty(0.01, 1.5, relative=False),
    )
    journal = Journal(callback)
    fit(TwoLayers(), callback, journal, max_epochs=10)
    assert journal.phases == ["dense"] * 2 + ["admm"] * 4 + ["retraining"] * 4
    assert [update.when for update in callback.history] == [3, 4, 5, 6]
    torch.testing.assert_close([u.rho for u in callback.history], [1e-2 * 1.5**i for i in range(4)])


def test_steps_are_counted_where_they_are_asked_for():
    phases = Phases(interval="step", admm_start=4, admm_end=20, update_every=8)
    callback = WeightUnificationCallback(STRUCTURE, phases=phases)
    fit(TwoLayers(), callback, max_epochs=4)
    assert [update.when for update in callback.history] == [12, 20]


def test_equal_times_project_once_without_admm():
    callback = WeightUnificationCallback(STRUCTURE, phases=Phases(admm_start=2, admm_end=2))
    journal = Journal(callback)
    fit(TwoLayers(), callback, journal, max_epochs=4)
    assert journal.phases == ["dense", "dense", "retraining", "retraining"]


def test_a_run_that_ends_in_admm_is_projected_with_a_warning():
    callback = WeightUnificationCallback(STRUCTURE, phases=Phases(admm_end=3))
    with pytest.warns(UserWarning, match="training ended in the admm phase"):
        fit(TwoLayers(), callback, max_epochs=3)
    callback.verify()


def test_fast_dev_run_goes_the_whole_way():
    callback = WeightUnificationCallback(STRUCTURE, phases=Phases(admm_end=5))
    with pytest.warns(UserWarning, match="projected without retraining"):
        fit(TwoLayers(), callback, fast_dev_run=True)
    callback.verify()


def test_another_model_starts_again():
    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES)
    fit(TwoLayers(), callback, max_epochs=5)
    first, journal = callback.supports, Journal(callback)
    fit(TwoLayers(), callback, journal, max_epochs=5)
    assert journal.phases[0] == "dense"
    assert callback.supports[COVERED[0]] is not first[COVERED[0]]


def test_a_second_fit_of_the_same_model_goes_on_inside_the_structure():
    callback, module = WeightUnificationCallback(STRUCTURE, phases=PHASES), TwoLayers()
    fit(module, callback, max_epochs=5)
    kinds = callback.supports[COVERED[0]].kinds.clone()
    probe = Probe(callback)
    fit(module, callback, probe, max_epochs=5)
    assert probe.n_checked == 5 * 8 * 2
    assert torch.equal(callback.supports[COVERED[0]].kinds, kinds)


# ---- validation, monitors, logs


def test_validation_in_admm_shows_the_projected_network():
    seen = {}

    class Look(Callback):
        def on_validation_batch_start(self, trainer, pl_module, *_):
            seen.setdefault(
                (trainer.current_epoch, callback.phase), pl_module.get_parameter(COVERED[0]).detach().clone()
            )

    callback, raw = WeightUnificationCallback(STRUCTURE, phases=PHASES), Snapshot(until=4)
    fit(TwoLayers(), callback, raw, Look(), max_epochs=5, num_sanity_val_steps=0)
    dense, admm = seen[0, "dense"], seen[3, "admm"]
    assert (dense != 0).all()
    assert same_bits(STRUCTURE.project(raw.weights[COVERED[0]]), admm)


@pytest.mark.parametrize(
    "other",
    [
        {"validate_projected": False}, {"limit_val_batches": 0}, {"log_every_n_steps": 1}, {"log_every_n_steps": 0},
        {"enable_checkpointing": True},
    ],
    ids=str,
)  # fmt: skip
def test_validation_logging_and_checkpoints_change_no_weight(other, tmp_path):
    results, start = [], TwoLayers().state_dict()
    for options in ({}, {"log_every_n_steps": 2, "default_root_dir": tmp_path, "logger": CSVLogger(tmp_path), **other}):
        module = TwoLayers()
        module.load_state_dict(start)
        projected = options.pop("validate_projected", True)
        fit(
            module,
            WeightUnificationCallback(STRUCTURE, phases=PHASES, validate_projected=projected),
            max_epochs=6,
            **options,
        )
        results.append(module)
    for a, b in zip(*(m.parameters() for m in results), strict=True):
        assert same_bits(a.detach(), b.detach())


class Scripted(TwoLayers):
    """Its validation loss is best in the ADMM phase, and then gets no better than what it begins with."""

    def validation_step(self, batch, batch_idx):
        self.log(
            "val_loss", float(self.current_epoch if self.current_epoch < 4 else 10 + self.current_epoch), batch_size=1
        )


@pytest.mark.parametrize("patience", [1, 2])
def test_monitors_judge_retraining_only(tmp_path, patience):
    best, stop = ModelCheckpoint(tmp_path, monitor="val_loss"), EarlyStopping("val_loss", patience=patience)
    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES)
    trainer = fit(Scripted(), best, stop, callback, max_epochs=20, enable_checkpointing=True, num_sanity_val_steps=0)
    assert trainer.current_epoch == 4 + 1 + patience  # ADMM did not end it, and its patience restarted at the switch
    assert torch.load(best.best_model_path, weights_only=True)["epoch"] == 4
    assert float(best.best_model_score) == 14


def test_what_is_logged(tmp_path):
    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES, penalty=PENALTY)
    trainer = fit(TwoLayers(), callback, max_epochs=6, logger=CSVLogger(tmp_path), log_every_n_steps=4)
    with Path(trainer.logger.log_dir, "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("muws/phase")]
    assert [float(row["muws/phase"]) for row in rows] == [0, 1, 1, 1, 2, 2]
    assert [float(row["muws/rho"]) for row in rows[1:4]] == pytest.approx([0.1, 0.15, 0.2])
    assert all(float(row["muws/penalty"]) > 0 for row in rows[1:4])
    assert [float(row["muws/primal_residual"]) for row in rows[2:4]] == pytest.approx(
        [u.primal for u in callback.history[:2]]
    )
    assert [float(row["muws/dual_residual"]) for row in rows[2:4]] == pytest.approx(
        [u.dual for u in callback.history[:2]]
    )


# ---- resume


class Decaying(TwoLayers):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        by_step = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": by_step, "interval": "step"}]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
@pytest.mark.parametrize("unified", ["tied", "frozen"])
@pytest.mark.parametrize("kind", [TwoLayers, Decaying])
def test_resuming_from_any_epoch_is_the_uninterrupted_run_to_the_bit(tmp_path, unified, kind):
    def callback():
        return WeightUnificationCallback(STRUCTURE, phases=PHASES, retraining=Retraining(unified))

    module = kind("adam")
    every = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1)
    fit(module, callback(), every, max_epochs=6, enable_checkpointing=True)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 6
    for path in paths[:-1]:
        torch.load(path, weights_only=True)
        resumed, again = kind("adam"), callback()
        fit(resumed, again, max_epochs=6, ckpt_path=path)
        for a, b in zip(module.parameters(), resumed.parameters(), strict=True):
            assert same_bits(a.detach(), b.detach()), path
        again.verify()


def test_a_checkpoint_written_in_a_projected_validation_holds_the_raw_weights(tmp_path):
    class Save(Callback):
        def on_validation_batch_start(self, trainer, *_):
            if trainer.current_epoch == 2:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    raw = Snapshot(until=3)
    fit(
        TwoLayers(),
        WeightUnificationCallback(STRUCTURE, phases=PHASES),
        raw,
        Save(),
        max_epochs=5,
        num_sanity_val_steps=0,
    )
    saved = torch.load(tmp_path / "middle.ckpt", weights_only=True)["state_dict"]
    for name in COVERED:
        assert same_bits(saved[name], raw.weights[name])


def test_an_error_in_a_projected_validation_brings_the_raw_weights_back():
    class Fail(TwoLayers):
        def validation_step(self, batch, batch_idx):
            if self.current_epoch == 2:
                raise RuntimeError("stop")

    module, raw = Fail(), Snapshot()
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, WeightUnificationCallback(STRUCTURE, phases=PHASES), raw, max_epochs=6, num_sanity_val_steps=0)
    assert same_bits(module.get_parameter(COVERED[0]).detach(), raw.weights[COVERED[0]])


def test_weights_that_another_callback_moved_are_brought_back_with_a_warning():
    class Move(Callback):
        def on_train_end(self, trainer, pl_module):
            with torch.no_grad():
                pl_module.get_parameter(COVERED[0]).add_(0.1)

    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES)
    with pytest.warns(UserWarning, match=r"layer\.0\.weight is .* away from its structure.*projected back"):
        fit(TwoLayers(), callback, Move(), max_epochs=5)
    callback.verify()


# ---- refusals


def test_before_fit_there_is_nothing_to_verify():
    with pytest.raises(StateError, match="let it train"):
        WeightUnificationCallback(STRUCTURE).verify()


def test_phases_longer_than_the_run_are_refused_before_training():
    with pytest.raises(SettingError, match="admm_end=9 is after the end of the run, which is 5 epochs long"):
        fit(TwoLayers(), WeightUnificationCallback(STRUCTURE, phases=Phases(admm_end=9)), max_epochs=5)


def test_asking_for_nothing_is_refused():
    with pytest.raises(PlanError, match="prune_ratio and unify_ratio are 0"):
        fit(TwoLayers(), WeightUnificationCallback(), max_epochs=5)


def test_a_rule_that_matches_nothing_is_refused():
    with pytest.raises(PlanError, match=re.escape("name='layer.5.weight'; near names are layer.2.weight")):
        fit(TwoLayers(), WeightUnificationCallback(STRUCTURE, [LayerRule("layer.5.weight", skip=True)]), max_epochs=5)


def test_non_finite_weights_end_the_run_with_their_name():
    class Explode(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.layer[2].weight.data[1, 2] = torch.nan

    with pytest.raises(StateError, match=r"layer\.2\.weight holds 1 values of 64 that are NaN or Inf"):
        fit(
            TwoLayers(),
            WeightUnificationCallback(STRUCTURE, phases=PHASES),
            Explode(),
            max_epochs=5,
            limit_val_batches=0,
        )


def test_what_cannot_be_exact_is_refused_by_name():
    callback = WeightUnificationCallback(STRUCTURE)
    with pytest.raises(SettingError, match=r"does not work with StochasticWeightAveraging: .* use WeightAveraging"):
        fit(TwoLayers(), callback, StochasticWeightAveraging(1e-2), max_epochs=5)
    with pytest.raises(SettingError, match=r"does not work with ModelPruning: .* give a prune_ratio"):
        fit(TwoLayers(), callback, ModelPruning("l1_unstructured", amount=0.5), max_epochs=5)
    trainer = L.Trainer(callbacks=[callback], max_epochs=5, **QUIET)
    for kind in (FSDPStrategy, DeepSpeedStrategy):  # neither can be made without a GPU
        trainer.strategy.__class__ = kind
        with pytest.raises(SettingError, match=rf"does not work with {kind.__name__}: .* use strategy='ddp'"):
            callback.setup(trainer, TwoLayers(), "fit")

    class Lbfgs(TwoLayers):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(SettingError, match="does not work with LBFGS"):
        fit(Lbfgs(), callback, max_epochs=5)


# ---- the report


def test_the_report_counts_what_is_there():
    rules = [
        LayerRule(COVERED[1], structure=MicroStructure((3, 5), prune_ratio=1 / 3, signs="shared", unify_ratio=2 / 3))
    ]
    callback, module = WeightUnificationCallback(STRUCTURE, rules, PHASES), TwoLayers()
    fit(module, callback, max_epochs=6)
    first, second = callback.report.layers
    assert (first.n_dense, first.n_unified, first.n_pruned, first.n_edge) == (16, 16, 32, 0)
    assert first.n_nonzero == int(torch.count_nonzero(module.layer[0].weight)) == 256
    assert first.multiplications == 16 * 8 + 16 * 2
    assert first.additions == 32 * 8
    assert first.ideal_bits == 16 * 8 * 32 + 16 * (32 + 8) + 64 * 1.5
    assert (second.n_dense, second.n_unified, second.n_pruned, second.n_edge) == (0, 2, 1, 64 - 45)
    assert second.multiplications == 19 + 2 * 1
    assert second.additions == 19 + 2 * (3 + 5 - 1)
    report = callback.report.to_dict()
    assert report["n_uncovered"] == 16 + 4
    assert report["sparsity"] == pytest.approx(1 - (256 + second.n_nonzero) / (512 + 64))
    assert [update["when"] for update in report["history"]] == [2, 3, 4]


def test_the_report_is_printed_after_fit(capsys):
    fit(TwoLayers(), WeightUnificationCallback(STRUCTURE, phases=PHASES), max_epochs=5)
    printed = capsys.readouterr().out
    assert "layer.0.weight" in printed
    assert "Residuals" in printed
    assert "idealised" in printed


# ---- the learning rate of retraining


class Rates(Callback):
    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(optimizer.param_groups[0]["lr"])


def cosine(i, n, lr=0.05):
    return lr * (1 + math.cos(math.pi * i / n)) / 2


@pytest.mark.parametrize("length", [{"max_epochs": 6}, {"max_steps": 48}])
def test_schedules_restart_over_the_retraining_phase(length):
    rates, phases = (
        Rates(),
        Phases("epoch" if "max_epochs" in length else "step", 0, 3 if "max_epochs" in length else 24, 1),
    )
    fit(Decaying(), WeightUnificationCallback(STRUCTURE, phases=phases), rates, **length)
    expected = [cosine(i, 48) for i in range(24)] + [cosine(i, 24) for i in range(24)]
    assert rates.seen == pytest.approx(expected)


def test_an_own_rate_scales_groups_and_schedules():
    rates = Rates()
    callback = WeightUnificationCallback(STRUCTURE, phases=Phases(admm_end=3), retraining=Retraining(lr=0.01))
    fit(Decaying(), callback, rates, max_epochs=6)
    assert rates.seen[24:] == pytest.approx([cosine(i, 24, 0.01) for i in range(24)])


@pytest.mark.parametrize("kind", [TwoLayers, Decaying])
def test_constant_and_cosine_take_the_place_of_the_module_s_schedules(kind):
    for schedule, lr, expected in (
        ("constant", 0.0, [0.05] * 24),
        ("constant", 0.02, [0.02] * 24),
        ("cosine", 0.0, [cosine(i, 24) for i in range(24)]),
        ("cosine", 0.02, [cosine(i, 24, 0.02) for i in range(24)]),
    ):
        rates = Rates()
        retraining = Retraining(schedule=schedule, lr=lr)
        fit(
            kind(),
            WeightUnificationCallback(STRUCTURE, phases=Phases(admm_end=3), retraining=retraining),
            rates,
            max_epochs=6,
        )
        assert rates.seen[24:] == pytest.approx(expected), (schedule, lr)


def test_a_cosine_without_an_end_is_refused():
    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES, retraining=Retraining(schedule="cosine"))
    with pytest.raises(SettingError, match="schedule='cosine' falls until the end of the run, and this run has none"):
        fit(TwoLayers(), callback, max_epochs=-1)


def test_our_schedules_are_refused_in_manual_optimization():
    module = TwoLayers()
    module.automatic_optimization = False
    callback = WeightUnificationCallback(STRUCTURE, retraining=Retraining(schedule="cosine"))
    with pytest.raises(SettingError, match="schedule='cosine' needs a Trainer that steps schedules"):
        fit(module, callback, max_epochs=5)


def test_schedules_can_be_left_alone():
    rates, alone = Rates(), Rates()
    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES, retraining=Retraining(schedule="module"))
    fit(Decaying(), callback, rates, max_epochs=6)
    fit(Decaying(), alone, max_epochs=6)
    assert rates.seen == alone.seen


def test_without_schedules_the_optimizer_stays():
    optimizers = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            optimizers.append(trainer.optimizers[0])

    fit(TwoLayers("adam"), WeightUnificationCallback(STRUCTURE, phases=PHASES), Watch(), max_epochs=6)
    assert all(optimizer is optimizers[0] for optimizer in optimizers)


# ---- updates within epochs


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_updates_may_fall_within_epochs_but_not_within_windows(accumulate):
    callback = WeightUnificationCallback(STRUCTURE, phases=Phases(admm_start=1, admm_end=3, update_every=0.125))
    fit(TwoLayers(), callback, max_epochs=4, accumulate_grad_batches=accumulate)
    when = [update.when for update in callback.history]
    # windows of 3 begin at the batches 0, 3 and 6 of 8
    late = {0.25: 0.375, 0.5: 0.75, 0.75: 0.75} if accumulate == 3 else {}
    times = {1 + epoch + late.get(share, share) for epoch in (0, 1) for share in (0.0, 0.25, 0.5, 0.75)}
    expected = [*sorted(times - {1.0}), 3]
    assert when == expected


def test_updates_begin_at_epochs_where_an_epoch_has_no_length():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return (torch.ones(32) for _ in range(16))

    module = TwoLayers()
    module.train_dataloader = lambda: torch.utils.data.DataLoader(Endless())
    callback = WeightUnificationCallback(STRUCTURE, phases=Phases(admm_start=0, admm_end=3, update_every=0.1))
    fit(module, callback, max_epochs=4, limit_train_batches=1.0)
    assert [update.when for update in callback.history] == [1, 2, 3]
