"""When each step of the method happens in Lightning. A mixin that imports neither namespace of Lightning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_muws.errors import StateError
from lightning_muws.structure.micro import MicroStructure
from lightning_muws.structure.plan import LayerRule, Plan, check_rules, make_plan
from lightning_muws.structure.structure import check_structure
from lightning_muws.trainer import coverage, measuring, pictures, rates, saving, settings, trainers
from lightning_muws.trainer.probe import Probe, refuse_no_validation
from lightning_muws.trainer.reading import RunReading
from lightning_muws.trainer.steps import ClipWatch, StepWatch, unannounced
from lightning_muws.training.budget import Budget
from lightning_muws.training.checks import check_type
from lightning_muws.training.constraint import Constraint
from lightning_muws.training.drop import Drop, DropReport, choose_compression
from lightning_muws.training.penalty import Penalty
from lightning_muws.training.phases import Phases, Retraining, Timeline
from lightning_muws.training.run import CompressionRun


class CompressionHooks(RunReading):
    """The hooks of WeightUnificationCallback: the base class to name before a namespace's Callback.

    The hooks have the names and arguments that Lightning gives them; Lightning describes them.
    """

    namespace = ""  # the namespace of the Trainers that this callback is for
    writer: saving.Writer  # writes the file at the end of fit
    stepper: Callable[..., Mapping[str, float]]  # chooses the steps of the file
    reporter: Callable[..., Any]  # makes the report at the end of fit
    timer: measuring.Timer  # measures what layers take, for a speedup
    drawer: pictures.Drawer  # draws a layer for loggers
    log_dict: Callable[..., None]  # Lightning binds the module's log_dict to each callback

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
        compression: float | None = None,
        speedup: float | None = None,
        max_relative_error: float | None = None,
        max_drop: float | None = None,
        monitor: str = "",
        log_pictures: int = 0,
    ) -> None:
        """Check the arguments.

        Args:
            structure: The structure of all weights that no rule matches.
            rules: Other structures for some layers, or layers to leave out; the last rule that matches wins.
            phases: When the training method (such as ADMM) starts and ends, which one it is, when it chooses blocks
                anew, and when retraining begins to round.
            retraining: How the network trains on inside its structure.
            penalty: How hard ADMM pulls the weights towards their structure.
            validate_projected: In the phase of the method, validate the network with projected weights.
            save_to: File to write at the end of fit, such as ``model.muws``: the compressed ``state_dict`` of the
                module, see :func:`lightning_muws.load_compressed`. An existing file is replaced. Empty for no file.
            compression: How many times smaller than its tensors the file is at least, such as 20. When the method
                starts, the ratios of each weight are chosen for that size; leave those of ``structure`` at 0. A rule
                may still skip weights, or give them ratios. The last part of retraining, from ``phases.round_start``
                on, trains the rounded values that the file holds. None to set ratios yourself.
            speedup: In place of ``compression``: how many times faster than the best dense form of the network
                :func:`lightning_muws.accelerate` makes the compressed one, such as 2. At the start of fit, the layers
                are timed on this machine with pruned blocks, for the module's ``example_input_array``, or without one
                for the first sample of the training data. When the method starts, the block shape and the ratios of
                each weight are chosen by these times. A block shape other than the default or ``auto`` stays. The file
                is lossless.
            max_relative_error: In place of ``compression``: the largest relative error of a block that is pruned or
                unified when the method starts, such as 0.3. A block is unified if that changes it by at most this share
                of its norm, and pruned if its norm is at most this share of the root mean square of the layer's blocks
                (:func:`lightning_muws.structure.tolerance.within`). The file is lossless; for a lossy one leave
                ``save_to`` empty and call :func:`lightning_muws.save_compressed` after fit.
            max_drop: In place of ``compression``: how far ``monitor`` may drop, in its own units, such as 0.005. When
                the method starts, the Trainer's validation measures the dense network and several compressed ones. The
                largest compression whose drop after training is predicted to be allowed is chosen; after fit the drop
                is measured on the weights as a file holds them, and ``drop`` and the report have it. It counts from the
                dense network of that moment, so start from a trained network, or let the method start late.
            monitor: The metric for ``max_drop``, as the validation logs it, such as ``val_accuracy``. Larger is better,
                unless the name has ``loss`` or ``error`` in it or begins with ``-``, such as ``-val_rmse``.
            log_pictures: How many layers, the largest ones, to draw for the Trainer's loggers at each Z/U update and
                when the structure is frozen: where their free, unified and pruned blocks lie, their magnitudes, and
                the residuals. For TensorBoard and each logger that has ``log_image`` (extra ``plots``). 0 for none.

        Raises:
            SettingError: An argument has a wrong type, ``save_to`` does not end in ``.muws``, or more than one of
                ``compression``, ``speedup``, ``max_relative_error`` and ``max_drop`` is given, one has a wrong value or
                comes with ratios in ``structure``, or ``max_drop`` comes without ``monitor``. At the start of fit, a
                setting does not fit the model or the Trainer, what was asked cannot be reached, or the file cannot be
                written.
        """
        check_structure(structure)
        check_rules(rules)
        check_type("phases", phases, Phases, "Phases(admm_end=0.5)")
        check_type("retraining", retraining, Retraining, "Retraining(unified='tied')")
        check_type("penalty", penalty, Penalty, "Penalty(rho=0.003)")
        phases.check_penalty(penalty)
        settings.check_switch("validate_projected", validate_projected)
        settings.check_file("save_to", save_to)
        pictures.check_number("log_pictures", log_pictures)
        budget = settings.make_budget(compression, speedup, max_relative_error)
        self._allowed = settings.make_drop(max_drop, monitor, budget)
        settings.check_open(budget or self._allowed, structure)
        self.structure = structure
        self.rules = tuple(rules)
        self.phases = phases
        self.retraining = retraining
        self.penalty = penalty
        self.validate_projected = validate_projected
        self.save_to = save_to
        self.compression, self.speedup, self.max_relative_error = compression, speedup, max_relative_error
        self.max_drop, self.monitor = max_drop, monitor
        self.log_pictures = log_pictures
        # what a user reads after fit
        self.drop: DropReport | None = None
        self.plan: Plan | None = None
        self.report: Any = None
        self.saved: saving.Saved | None = None
        # the run of one model, over one fit or several
        self._run: CompressionRun | None = None
        self._known_late: set[str] = set()  # weights that joined an optimizer too late, once warned of
        self._began: rates.Beginning | None = None  # where in this fit retraining began
        self._n_stepped_batches = 0
        self._last_batch = -1  # on the Trainer's count of batches
        # one fit
        self._timeline = Timeline(0, 0, 1)
        self._pending: Mapping[str, Any] | None = None  # a checkpoint's state that came before on_fit_start
        self._is_fit = False
        self._is_bound = False
        self._has_warned = False
        self._watch = StepWatch(self._after_step)
        self._probe = Probe()
        self._clips: ClipWatch | None = None
        # one batch
        self._has_stepped = False
        self._n_backwards = 0

    # ---- what a user asks

    @property
    def budget(self) -> Budget | None:
        """What ``compression``, ``speedup`` or ``max_relative_error`` asks for, or what was chosen for ``max_drop``.

        None for ratios set by hand, and before the choice.
        """
        if self.drop:
            return Budget(self.drop.compression)
        return settings.make_budget(self.compression, self.speedup, self.max_relative_error)

    # ---- the start of a fit

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._is_fit = stage == "fit"
        self._is_bound = False
        if self._is_fit:
            trainers.refuse_namespace(trainer, self.namespace)
            trainers.refuse(trainer.strategy, *trainer.callbacks)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        trainers.refuse(*trainer.optimizers)
        rates.refuse(trainer, self.retraining)
        if self.save_to:
            self._file = saving.prepare(self.save_to, pl_module, trainer.is_global_zero)
        pictures.prepare(trainer, self.log_pictures)
        self._begin_or_go_on(trainer, pl_module)
        if self._run and not trainers.averages(trainer):  # an average of rounded weights is not rounded
            ranks = trainer.is_global_zero, trainer.strategy.broadcast
            self._run.stepper = partial(saving.choose_steps, self.stepper, pl_module, *ranks)
        self._is_bound = True
        self._has_warned = False
        self._n_backwards = 0
        if not pl_module.automatic_optimization:
            self._clips = ClipWatch(pl_module, lambda optimizer: self._before_step(trainer, optimizer, clips=True))
        if self._pending:
            self._load(self._pending)
            if self._began and self.phase == "retraining":
                # The states of the schedules are restored after this hook, so the schedules must exist by then.
                rates.begin(trainer, self.retraining, self._began)
        if self._run and self.speedup is None:
            self._run.check_budget()
        if self._allowed:
            refuse_no_validation(trainer)
            if self.plan and not self.drop:
                self._allowed.check(pl_module, self.plan.covered)
        if self.phases.interval == "epoch" or trainer.max_steps not in (None, -1):
            self._set_timeline(trainer)  # refuses times that do not fit, before any data is loaded

    def _begin_or_go_on(self, trainer: Any, pl_module: Any) -> None:
        """Go on with the run of an earlier fit, or make a plan and a run for this one.

        A frozen structure stays with its model. Before that, only the Trainer of the earlier fit goes on, as it keeps
        its clock; with another Trainer all phases begin again. The state of a checkpoint replaces either.
        """
        run, plan = self._run, self.plan
        is_other_trainer = trainer.fit_loop.total_batch_idx < self._last_batch
        if is_other_trainer:
            self._reset_clock()
            if run:
                run.reset_clock()
        if run and plan and coverage.is_same_model(pl_module, plan, run.weights):
            if run.constraint:
                run.follow()
                rank_zero_info("muws: the structure of this model is frozen, retraining goes on inside it")
                return
            if not is_other_trainer:
                return
        self._reset_clock()
        self._known_late = set()
        self.drop = None
        optimized, budget = coverage.held(trainer, pl_module), self.budget
        is_open = bool(budget or self._allowed)
        self.plan = make_plan(pl_module, self.structure, self.rules, optimized=optimized, open_ratios=is_open)
        weights, times = self.plan.weights(pl_module), (self.phases, self.retraining)
        self._run = CompressionRun(weights, self.plan.covered, *times, self.penalty, budget, pl_module)
        rank_zero_info(f"muws: {coverage.summary(pl_module, self.plan)}")

    def _reset_clock(self) -> None:
        self._n_stepped_batches = 0
        self._last_batch = -1
        self._began = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._set_timeline(trainer)  # not before: counting steps loads the data, whose state a resumed run restores
        if self._allowed and not self.drop:
            self._allowed.find(self._probe.run(trainer, n_batches=1))  # refuses an unknown monitor
        if self._run and self._run.needs_times:
            self._run.times = measuring.measure(self.timer, trainer, pl_module, self._run.entries)
            self._run.check_budget()

    def _set_timeline(self, trainer: Any) -> None:
        run_length = trainers.length(trainer, self.phases.interval)
        if self.phase == "retraining":
            self._timeline = Timeline(0, 0, 1, *self.phases.rounds(run_length))
        else:
            self._timeline = self.phases.on(run_length, clip=bool(trainer.fast_dev_run))

    # ---- phases change at the start of an epoch or a batch, so each checkpoint belongs to one phase

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self.phase != "retraining":
            trainers.forgive_early_stopping(trainer)
        if self.phases.interval == "epoch":
            self._tick(trainer, trainer.current_epoch)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        # Lightning skips on_train_epoch_start after resuming from an epoch's last batch, so whole epochs tick here too.
        now: float = self._now(trainer)
        if self.phases.interval == "epoch" and not self._n_backwards:  # not in the middle of an accumulation window
            now += batch_idx / trainer.num_training_batches
        self._tick(trainer, now)
        self._watch.follow(trainer.optimizers)
        if self._run:
            self._watch.begin(self._run.watched)
        if self.plan and batch_idx == 0:
            self._warn_of_late_weights(trainer, pl_module, self.plan)

    def _warn_of_late_weights(self, trainer: Any, pl_module: Any, plan: Plan) -> None:
        """Warn once of each weight that stays dense because it joined an optimizer after fit began."""
        late = coverage.late(trainer, pl_module, plan) - self._known_late
        if late:
            self._known_late |= late
            rank_zero_warn(
                f"{', '.join(sorted(late)[:5])} joined an optimizer after fit began, so it stays dense: "
                "name it in a rule, such as LayerRule(name=..., structure=...), to cover it from the start of fit"
            )

    def _tick(self, trainer: Any, now: float) -> None:
        """Do what is due at this time; begin retraining if that froze the structure."""
        if (run := self._run) is None:
            return
        if run.constraint:
            self._round(trainer, run, now)
            return
        if now >= self._timeline.start:
            self._choose_compression(trainer, run)
        if run.tick(now, self._timeline, trainer.optimizers):
            trainers.reshard(trainer.lightning_module)
            trainers.refuse_ranks_apart(trainer, run.fingerprint())
            self._follow_budget(trainer.lightning_module, run)
            if self.log_pictures:
                caption = f"{run.phase}, {self.phases.interval} {now:.4g}"
                pictures.log(trainer, run, self.drawer, self.log_pictures, caption)
        if run.constraint:
            self._begin_retraining(trainer)

    def _round(self, trainer: Any, run: CompressionRun, now: float) -> None:
        """Choose the steps of the file and round to them, if that is due."""
        is_first = run.rounding is None
        if run.tick(now, self._timeline, trainer.optimizers):
            trainers.reshard(trainer.lightning_module)
            if is_first and run.rounding:
                n = len(run.rounding.steps)
                rank_zero_info(f"muws: retraining goes on with {n} parameters rounded as the file holds them")

    def _choose_compression(self, trainer: Any, run: CompressionRun) -> None:
        """Choose the compression for ``max_drop``, once."""
        if self._allowed and self.plan and not self.drop:
            module, entries = trainer.lightning_module, self.plan.covered
            measure = self._probe.measure(trainer, self._allowed, entries)
            will_round = run.can_round and self._timeline.round_start < math.inf
            self.drop = choose_compression(self._allowed, measure, module, entries, will_round=will_round)
            run.budget = self.budget
            say = rank_zero_warn if self.drop.doubt else rank_zero_info
            say(f"muws: {self.drop}{self.drop.doubt}")

    def _begin_retraining(self, trainer: Any) -> None:
        self._began = rates.Beginning.now(trainer)
        rates.begin(trainer, self.retraining, self._began)
        trainers.reset_averages(trainer)
        left = trainers.reset_monitors(trainer)
        files = f"; checkpoints of earlier phases stay on disk: {', '.join(left)}" if left else ""
        rank_zero_info(f"muws: the structure is frozen, retraining begins{files}")

    def _now(self, trainer: Any) -> int:
        return trainer.current_epoch if self.phases.interval == "epoch" else self._n_stepped_batches

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._run and self.phase == "retraining":  # before, each update of Z and U checks the weights
            self._run.check_finite()

    # ---- each optimizer step

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self._n_backwards += 1

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        # Here gradients are accumulated, reduced over ranks and unscaled, but not clipped.
        self._watch.announce(optimizer, self._run.held(optimizer) if self._run else ())
        window = 1.0
        if pl_module.automatic_optimization:
            # Lightning divides each loss by the length of a full window, also in an epoch's last, shorter one.
            window = self._n_backwards / trainer.accumulate_grad_batches
            self._n_backwards = 0
        if self._clips is None or not self._clips.was_before(optimizer):
            self._before_step(trainer, optimizer, window)

    def _before_step(self, trainer: Any, optimizer: Optimizer, window: float = 1.0, clips: bool = False) -> None:
        if self._run:
            self._run.before_step(optimizer, window * trainers.gradient_scale(trainer, optimizer, scaled=clips))

    def _after_step(self, optimizer: Optimizer) -> Mapping[str, Tensor]:
        self._has_stepped = True
        if self._run is None:
            return {}
        self._run.after_step(optimizer)
        return self._run.held(optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._run:
            self._handle_other_changes(self._run)
        self._n_stepped_batches += self._has_stepped
        self._has_stepped = False
        self._last_batch = trainer.fit_loop.total_batch_idx
        if self._run and trainers.logs_now(trainer, batch_idx):
            self._log(self._run)

    def _handle_other_changes(self, run: CompressionRun) -> None:
        """Enforce the structure of weights that changed after all steps seen; warn once of steps not announced."""
        changed, past = self._watch.end(run.watched)
        self._has_stepped |= bool(changed)
        if changed:
            run.settle(changed)
        if past and run.phase != "dense" and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(unannounced(past, run.phase))

    def _log(self, run: CompressionRun) -> None:
        by_step = self.phases.interval == "step"
        metrics = {f"muws/{name}": value for name, value in run.metrics().items()}
        # The values are equal on all ranks. Without sync_dist Lightning would warn that they may differ.
        self.log_dict(metrics, on_step=by_step, on_epoch=not by_step, batch_size=1, sync_dist=True)

    # ---- validation of the projected network

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if (run := self._run) is None or not self._is_fit or run.phase == "retraining":
            return
        trainers.forgive_early_stopping(trainer)
        if run.method and self.validate_projected and not trainer.sanity_checking:
            run.show_projected()
            trainers.reshard(pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._probe.read(trainer)
        if self._run and self._run.raw:
            self._run.show_raw()
            trainers.reshard(pl_module)

    # ---- the end of a fit

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if (run := self._run) and run.phase != "retraining":
            rank_zero_warn(
                f"training ended in the {run.phase} phase: the weights were projected without retraining; "
                "lower phases.admm_end or train longer"
            )
            self._choose_compression(trainer, run)
            run.freeze(self._now(trainer), trainer.optimizers)
            self._follow_budget(pl_module, run)
            trainers.reset_averages(trainer)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if self._run and self._run.finish():  # here, as a fit that resumes after its last step has no on_train_end
            trainers.reshard(pl_module)
            rank_zero_info("muws: the file grew too large at the end of training, so its values were rounded again")
        self._unhook()
        if (run := self._run) and (constraint := run.constraint) and self.plan:
            self._check_weights(trainer, run, constraint)
            found = self.supports, constraint.primal, run.history, run.predicted_speedup
            self.report = self.reporter(pl_module, self.plan, *found)
            if self._allowed and self.drop:
                self._measure_drop(trainer, run, self._allowed, self.drop)
            if trainer.is_global_zero:
                self.report.print()
            if self.save_to and not trainer.fast_dev_run:
                to = self._file, pl_module, self.plan, trainer.is_global_zero
                compression = self.drop.compression if self.drop else self.compression
                steps = run.rounding.steps if run.rounding else None
                self.saved = saving.save(self.writer, *to, compression, steps)

    def _measure_drop(self, trainer: Any, run: CompressionRun, allowed: Drop, found: DropReport) -> None:
        """Measure the drop of the trained weights, rounded as for a file; say whether it is kept."""
        allocation = None
        if not run.rounding:
            allocation = Budget(found.compression).allocate(trainer.lightning_module, run.entries)
        measured = self._probe.measure(trainer, allowed, run.entries)(allocation, 1.0)
        self.drop = replace(found, measured=measured)
        self.report = replace(self.report, drop=self.drop)
        say = rank_zero_info if self.drop.is_kept else rank_zero_warn
        say(f"muws: {self.drop}")

    def _check_weights(self, trainer: Any, run: CompressionRun, constraint: Constraint) -> None:
        """Refuse NaN and Inf; project weights back that another callback moved out of the structure at the end."""
        run.follow()
        run.check_finite()
        if trainers.averages(trainer):  # the average of equal frozen magnitudes may differ from them in the last bit
            constraint.enforce(run.weights)
        try:
            run.verify()
        except StateError as error:
            rank_zero_warn(f"at the end of fit {error}; it was projected back")
            run.settle(run.watched)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.on_validation_end(trainer, pl_module)
        self._unhook()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._unhook()

    def _unhook(self) -> None:
        self._watch.remove()
        if self._run:
            self._run.stepper = None  # it holds the Trainer
        if self._clips:
            self._clips.remove()
            self._clips = None

    # ---- checkpoints: plain dicts, strings, numbers and tensors, so that weights_only=True can read them

    def state_dict(self) -> dict[str, Any]:
        if self._run is None:
            return {}
        return {
            "run": self._run.state_dict(),
            "stepped_batches": self._n_stepped_batches,
            "last_batch": self._last_batch,
            "began": dict(vars(self._began)) if self._began else None,
            "drop": dict(vars(self.drop)) if self.drop else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._is_fit:  # validate, test and predict load the states of callbacks too
            return
        self._pending = state_dict
        if self._is_bound:
            self._load(state_dict)

    def _load(self, state: Mapping[str, Any]) -> None:
        self._pending = None
        if state and self._run:
            if self._allowed and state.get("drop"):
                self.drop = self._allowed.resumed(state["drop"])
                self._run.budget = self.budget
            self._run.load_state_dict(state["run"])
            if self.plan:
                self.plan = self.plan.updated(self._run.planned)
            self._n_stepped_batches = state["stepped_batches"]
            self._last_batch = state["last_batch"]
            self._began = rates.Beginning(**state["began"]) if state["began"] else None

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._run:
            trainers.put_back(self._run.raw, pl_module, checkpoint["state_dict"])
