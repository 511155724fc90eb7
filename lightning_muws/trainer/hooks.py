"""When each step of the method happens in Lightning, and nothing of how; a mixin that imports neither namespace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_muws.errors import StateError
from lightning_muws.structure.micro import MicroStructure
from lightning_muws.structure.plan import LayerRule, Plan, make_plan
from lightning_muws.structure.support import Support
from lightning_muws.trainer import rates, saving, settings, trainers
from lightning_muws.trainer.steps import ClipWatch, StepWatch, unannounced
from lightning_muws.training.constraint import Constraint
from lightning_muws.training.penalty import Penalty
from lightning_muws.training.phases import Phases, Retraining, Timeline
from lightning_muws.training.run import CompressionRun, Phase, Update


class CompressionHooks:
    """The hooks of WeightUnificationCallback, to be put before a namespace's Callback among the bases of a class.

    Hooks have the names and arguments that Lightning gives them; there they are described.
    """

    namespace = ""  # of the Trainers that this callback is for
    writer: saving.Writer  # writes the file at the end of fit
    reporter: Callable[..., Any]  # makes the report at the end of fit
    log_dict: Callable[..., None]  # Lightning gives each callback the module's

    @settings.explained
    def __init__(
        self,
        structure: MicroStructure = MicroStructure(),
        rules: Sequence[LayerRule] = (),
        phases: Phases = Phases(),
        retraining: Retraining = Retraining(),
        penalty: Penalty = Penalty(),
        validate_projected: bool = True,
        save_to: str | Path = "",
    ) -> None:
        settings.check_structure(structure)
        settings.check_type("phases", phases, Phases, "admm_end=0.5")
        settings.check_type("retraining", retraining, Retraining, "unified='tied'")
        settings.check_type("penalty", penalty, Penalty, "rho=0.003")
        settings.check_switch("validate_projected", validate_projected)
        settings.check_file("save_to", save_to)
        self.structure = structure
        self.rules = settings.checked_rules(rules)
        self.phases = phases
        self.penalty = penalty
        self.retraining = retraining
        self.validate_projected = validate_projected
        self.save_to = save_to
        self.saved: saving.Saved | None = None
        self.plan: Plan | None = None
        self.report: Any = None
        self._run: CompressionRun | None = None
        self._pending: Mapping[str, Any] | None = None
        self._timeline = Timeline(0, 0, 1)
        self._fitting = self._bound = self._stepped = self._warned = False
        self._backwards = self._stepped_batches = 0
        self._began = rates.Beginning()
        self._watch = StepWatch(self._after_step)
        self._clips: ClipWatch | None = None

    # ---- what a user asks

    @property
    def phase(self) -> Phase:
        """Where the run is: ``dense`` before ADMM, ``admm``, or ``retraining`` inside the structure."""
        return self._run.phase if self._run else "dense"

    @property
    def supports(self) -> dict[str, Support]:
        """The frozen structure of each covered weight, by name; empty before the retraining phase."""
        return self._run.supports if self._run else {}

    @property
    def history(self) -> list[Update]:
        """The Z/U updates so far with their residuals; the hard projection is the last one."""
        return list(self._run.history) if self._run else []

    def verify(self) -> None:
        """Check that every covered weight is inside its structure, with ``==``.

        Raises:
            StateError: A weight is not, or the structure is not frozen yet.
        """
        if self._run is None:
            raise StateError("there is nothing to verify before fit: give this callback to a Trainer and call its fit")
        self._run.verify()

    # ---- start

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._fitting, self._bound = stage == "fit", False
        if self._fitting:
            trainers.refuse_namespace(trainer, self.namespace)
            trainers.refuse(trainer.strategy, *trainer.callbacks)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        trainers.refuse(*trainer.optimizers)
        rates.refuse(trainer, self.retraining)
        if self.save_to:
            self._file = saving.prepare(self.save_to, pl_module, trainer.is_global_zero)
        now = {id(p) for p in pl_module.parameters()}
        if self._run is None or any(id(p) not in now for p in self._run.weights.values()):
            # the first fit, or one of another model, such as the next fold
            self.plan = make_plan(pl_module, self.structure, self.rules)
            weights, self._stepped_batches = self.plan.weights(pl_module), 0
            self._run = CompressionRun(weights, self.plan.covered, self.phases, self.retraining, self.penalty)
            n, of = (sum(p.numel() for p in ps) for ps in (weights.values(), pl_module.parameters()))
            rank_zero_info(f"muws: {len(weights)} parameters with {n:,} of {of:,} weights get a structure")
        if self.phases.interval == "epoch" or trainer.max_steps not in (None, -1):
            self._set_timeline(trainer)
        if self._run.constraint:
            self._run.constraint.follow(self._run.weights)
        self._bound, self._warned, self._backwards = True, False, 0
        if not pl_module.automatic_optimization:
            self._clips = ClipWatch(pl_module, lambda optimizer: self._before_step(trainer, optimizer, clips=True))
        if self._pending:
            self._take_up(self._pending)
            if self._run.constraint:
                # now, so that the schedulers are there whose states will be restored
                rates.begin(trainer, self.retraining, self._began)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._set_timeline(trainer)  # steps are counted only now: counting earlier loses the state of resumed data

    def _set_timeline(self, trainer: Any) -> None:
        run_length = trainers.length(trainer, self.phases.interval)
        self._timeline = self.phases.on(run_length, clip=bool(trainer.fast_dev_run))

    # ---- phases: always at the start of an epoch or batch, so that each checkpoint belongs to one phase

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self.phase != "retraining":
            trainers.forgive_early_stopping(trainer)
        if self.phases.interval == "epoch":
            self._tick(trainer, trainer.current_epoch)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        # For whole epochs again: Lightning skips on_train_epoch_start after resuming from an epoch's last batch.
        now: float = self._now(trainer)
        if self.phases.interval == "epoch" and not self._backwards:  # not in the middle of an accumulation window
            now += batch_idx / trainer.num_training_batches
        self._tick(trainer, now)
        self._watch.follow(trainer.optimizers)
        if self._run:
            self._watch.begin(self._run.weights)

    def _tick(self, trainer: Any, now: float) -> None:
        if (run := self._run) is None or run.phase == "retraining":
            return
        if run.tick(now, self._timeline, trainer.optimizers):
            trainers.reshard(trainer.lightning_module)
            trainers.refuse_ranks_apart(trainer, run.fingerprint())
        if run.constraint:
            self._begin_retraining(trainer)

    def _begin_retraining(self, trainer: Any) -> None:
        self._began = rates.Beginning.now(trainer)
        rates.begin(trainer, self.retraining, self._began)
        trainers.reset_averages(trainer)
        left = trainers.reset_monitors(trainer)
        files = f"; checkpoints of earlier phases stay on disk: {', '.join(left)}" if left else ""
        rank_zero_info(f"muws: the structure is frozen, retraining begins{files}")

    def _now(self, trainer: Any) -> int:
        return trainer.current_epoch if self.phases.interval == "epoch" else self._stepped_batches

    # ---- each optimizer step

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self._backwards += 1

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        # Here gradients are accumulated, reduced over ranks and unscaled, and not clipped yet.
        self._watch.announce(optimizer, self._run.owned(optimizer) if self._run else ())
        window = 1.0
        if pl_module.automatic_optimization:
            # Lightning divides each loss by the length of a full window, also in an epoch's last, shorter one.
            window, self._backwards = self._backwards / trainer.accumulate_grad_batches, 0
        if self._clips is None or not self._clips.was_before(optimizer):
            self._before_step(trainer, optimizer, window)

    def _before_step(self, trainer: Any, optimizer: Optimizer, window: float = 1.0, clips: bool = False) -> None:
        if self._run:
            self._run.before_step(optimizer, window * trainers.gradient_scale(trainer, optimizer, scaled=clips))

    def _after_step(self, optimizer: Optimizer) -> Mapping[str, Tensor]:
        self._stepped = True
        if self._run is None:
            return {}
        self._run.after_step(optimizer)
        return self._run.owned(optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._run:
            self._hold_to_steps(self._run)
        self._stepped_batches += self._stepped
        self._stepped = False
        every = trainer.log_every_n_steps
        due = bool(every) and ((batch_idx + 1) % every == 0 or trainer.is_last_batch)
        if due and self._run and not trainer.barebones:
            by_step = self.phases.interval == "step"
            metrics = {f"muws/{name}": value for name, value in self._run.metrics().items()}
            # the same on all ranks; without sync_dist Lightning would warn that they might not be
            self.log_dict(metrics, on_step=by_step, on_epoch=not by_step, batch_size=1, sync_dist=True)

    def _hold_to_steps(self, run: CompressionRun) -> None:
        """Hold what was changed past the steps that Lightning announces, and say once what that means."""
        changed, past = self._watch.end(run.weights)
        self._stepped |= bool(changed)
        if run.constraint and changed:
            run.constraint.enforce({name: run.weights[name] for name in changed})
        if past and run.phase != "dense" and not self._warned:
            self._warned = True
            rank_zero_warn(unannounced(past, run.phase))

    # ---- validation of the projected network

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if (run := self._run) is None or not self._fitting or run.phase == "retraining":
            return
        trainers.forgive_early_stopping(trainer)
        if run.phase == "admm" and self.validate_projected and not trainer.sanity_checking:
            run.show_projected()
            trainers.reshard(pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._run and self._run.raw:
            self._run.show_raw()
            trainers.reshard(pl_module)

    # ---- the end

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if (run := self._run) and run.phase != "retraining":
            rank_zero_warn(
                f"training ended in the {run.phase} phase: the weights were projected without retraining; "
                "lower phases.admm_end or train longer"
            )
            run.freeze(self._now(trainer), trainer.optimizers)
            trainers.reset_averages(trainer)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._unhook()
        if (run := self._run) and (constraint := run.constraint) and self.plan:
            averaged = any(trainers.is_a(callback, "WeightAveraging") for callback in trainer.callbacks)
            self._hold(run, constraint, averaged)
            self.report = self.reporter(pl_module, self.plan, self.supports, constraint.primal, run.history)
            if trainer.is_global_zero:
                self.report.print()
            if self.save_to and not trainer.fast_dev_run:
                self.saved = saving.save(self.writer, self._file, pl_module, self.plan, trainer.is_global_zero)

    def _hold(self, run: CompressionRun, constraint: Constraint, averaged: bool) -> None:
        """Bring weights back that another callback moved out of the structure after the last step."""
        constraint.follow(run.weights)
        if averaged:  # the average of equal frozen magnitudes may differ from them in the last bit
            constraint.enforce(run.weights)
        try:
            run.verify()
        except StateError as error:
            rank_zero_warn(f"at the end of fit {error}; it was projected back")
            constraint.enforce(run.weights)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.on_validation_end(trainer, pl_module)
        self._unhook()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._unhook()

    def _unhook(self) -> None:
        self._watch.remove()
        if self._clips:
            self._clips.remove()
            self._clips = None

    # ---- checkpoints: plain dicts, strings, numbers and tensors, so that weights_only=True can read them

    def state_dict(self) -> dict[str, Any]:
        if self._run is None:
            return {}
        return {
            "stepped_batches": self._stepped_batches,
            "began": dict(vars(self._began)),
            "run": self._run.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._fitting:  # validate, test and predict load a checkpoint's callbacks too
            return
        self._pending = state_dict
        if self._bound:
            self._take_up(state_dict)

    def _take_up(self, state: Mapping[str, Any]) -> None:
        self._pending = None
        if state and self._run:
            self._run.load_state_dict(state["run"])
            self._stepped_batches, self._began = state["stepped_batches"], rates.Beginning(**state["began"])

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._run:
            trainers.put_back(self._run.raw, pl_module, checkpoint["state_dict"])
