"""WeightUnificationCallback for the Trainer of Hugging Face's transformers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from transformers import TrainerCallback

from lightning_muws.artifact.save import save_compressed
from lightning_muws.artifact.steps import choose_steps
from lightning_muws.errors import StateError
from lightning_muws.report import CompressionReport, make_report
from lightning_muws.structure.micro import MicroStructure
from lightning_muws.structure.plan import LayerRule, Plan, check_rules, make_plan
from lightning_muws.structure.structure import check_structure
from lightning_muws.trainer import coverage, huggingface, saving, settings
from lightning_muws.trainer.reading import RunReading
from lightning_muws.training.budget import Budget
from lightning_muws.training.checks import check_type
from lightning_muws.training.penalty import Penalty
from lightning_muws.training.phases import Phases, Retraining, Timeline
from lightning_muws.training.run import CompressionRun

STATE_FILE = "muws.pt"  # in each checkpoint's folder


class WeightUnificationCallback(RunReading, TrainerCallback):
    """Train any model of a ``transformers.Trainer`` towards micro-structured weights, then inside the structure.

    The method and its exactness are those of :class:`lightning_muws.WeightUnificationCallback`: gradients of the
    penalty are added to the complete gradient of a step before it is clipped, and in the retraining phase every
    optimizer step ends inside the structure, to the bit. A checkpoint's folder holds the state in ``muws.pt``;
    ``train(resume_from_checkpoint=...)`` reads it, and goes on bit for bit as the run that was not stopped.

    An evaluation in the ADMM phase measures the weights as they are, not their projections. The best checkpoint and the
    patience of early stopping count from the beginning of the retraining phase. The Trainer's log has the metrics
    ``muws/phase``, ``muws/rho``, ``muws/penalty``, ``muws/primal_residual`` and ``muws/dual_residual``.

    Args:
        structure: The structure of all weights that no rule matches.
        rules: Other structures for some layers, or layers to leave out; the last rule that matches wins.
        phases: When ADMM starts and ends, and when Z and U are updated; here in steps by default, as runs have few
            epochs.
        retraining: How the network trains on inside its structure. ``restart`` makes the Trainer's schedule again for
            the rest of the run, with its warmup, and keeps the optimizer.
        penalty: How hard ADMM pulls the weights towards their structure.
        save_to: File to write at the end of training, such as ``model.muws``; empty for none.
        compression: How many times smaller than its tensors the file is at least; None to set ratios yourself.
        max_relative_error: In place of ``compression``: the largest relative error of a block that is pruned or
            unified when the method starts.

    Raises:
        SettingError: A setting is not allowed; at the start of training, it does not fit the model or the Trainer.

    Example:
        >>> from lightning_muws.transformers import WeightUnificationCallback
        >>> callback = WeightUnificationCallback(MicroStructure(prune_ratio=0.8, unify_ratio=0.1))
        >>> callback.phase
        'dense'
    """

    @settings.explained
    def __init__(
        self,
        structure: MicroStructure = MicroStructure(),
        rules: Sequence[LayerRule] = (),
        phases: Phases = Phases(interval="step"),
        retraining: Retraining = Retraining(),
        penalty: Penalty = Penalty(),
        save_to: str | Path = "",
        compression: float | None = None,
        max_relative_error: float | None = None,
    ) -> None:
        check_structure(structure)
        check_rules(rules)
        check_type("phases", phases, Phases, "Phases(interval='step', admm_end=0.5)")
        check_type("retraining", retraining, Retraining, "Retraining(unified='tied')")
        check_type("penalty", penalty, Penalty, "Penalty(rho=0.003)")
        phases.check_penalty(penalty)
        settings.check_file("save_to", save_to)
        self.budget: Budget | None = settings.make_budget(compression, None, max_relative_error)
        settings.check_open(self.budget, structure)
        self.structure, self.rules, self.phases = structure, tuple(rules), phases
        self.retraining, self.penalty, self.save_to = retraining, penalty, save_to
        # what a user reads after training
        self.plan: Plan | None = None
        self.report: CompressionReport | None = None
        self.saved: saving.Saved | None = None
        # one run
        self._run: CompressionRun | None = None
        self._trainer: Any = None
        self._timeline = Timeline(0, 0, 1)
        self._began = 0  # the step at which retraining began
        self._clipping: huggingface.Clipping | None = None
        self._is_prepared = False  # whether this step's gradients have been changed

    # ---- the start of a run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make a plan and a run for the model, or go on with those of a checkpoint."""
        model: nn.Module = kwargs["model"]
        self._trainer, checkpoint = huggingface.running()
        huggingface.refuse(self._trainer, self.retraining)
        huggingface.set_rank(self._trainer)
        if self.save_to:
            self._file = saving.prepare(self.save_to, model, state.is_world_process_zero)
        run = self._begin_or_go_on(model)
        if checkpoint:
            self._load(run, Path(checkpoint))
        else:
            run.check_budget()
        length = huggingface.length(state, self.phases.interval)
        if self.phase == "retraining":
            self._timeline = Timeline(0, 0, 1, *self.phases.rounds(length))
        else:
            self._timeline = self.phases.on(length)
        self._unhook()
        run.stepper = partial(
            saving.choose_steps, choose_steps, model, state.is_world_process_zero, huggingface.broadcast
        )
        self._clipping = huggingface.Clipping(self._trainer.accelerator, self._before_step)
        self._is_prepared = False

    def _begin_or_go_on(self, model: nn.Module) -> CompressionRun:
        """Go on inside the frozen structure of an earlier run of this model, or make a plan and a run."""
        run, optimizer = self._run, huggingface.unwrapped(self._trainer.optimizer)
        if run and run.constraint and self.plan and coverage.is_same_model(model, self.plan, run.weights):
            run.follow()
            run.reset_clock()
            return run
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        optimized = [p for p in model.parameters() if id(p) in held]
        plan = make_plan(model, self.structure, self.rules, optimized=optimized, open_ratios=bool(self.budget))
        settled = (self.phases, self.retraining, self.penalty, self.budget)
        self._run = run = CompressionRun(plan.weights(model), plan.covered, *settled, model)
        self.plan, self._began = plan, 0
        rank_zero_info(f"muws: {coverage.summary(model, plan)}")
        return run

    def _load(self, run: CompressionRun, checkpoint: Path) -> None:
        """Restore the state of a checkpoint, on every rank."""
        path = checkpoint / STATE_FILE
        if not path.is_file():
            raise StateError(
                f"{checkpoint} has no {STATE_FILE}: it was written without this callback, or cut short; resume from an "
                "earlier checkpoint, or begin a new run from its weights alone"
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
        run.load_state_dict(state["run"])
        self._began = state["began"]
        if self.plan:
            self.plan = self.plan.updated(run.planned)
        if run.constraint:
            self._begin_schedule(resumes=True)

    def _begin_schedule(self, resumes: bool = False) -> None:
        n_steps = max(1, self._trainer.state.max_steps - self._began)
        huggingface.begin_schedule(self._trainer, self.retraining, n_steps, resumes)

    # ---- phases change before a step, so each checkpoint belongs to one phase

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do what is due: start the method, update it, or freeze the structure and begin retraining."""
        if (run := self._run) is None:
            return
        if run.constraint:
            now = huggingface.now(state, self.phases.interval)
            run.tick(now, self._timeline, [huggingface.unwrapped(self._trainer.optimizer)])
            return
        huggingface.forgive_early_stopping(self._trainer)
        if self._tick(run, kwargs["model"], huggingface.now(state, self.phases.interval)) and run.constraint:
            self._began = state.global_step
            self._begin_schedule()
            huggingface.forget_best(self._trainer)
            rank_zero_info("muws: the structure is frozen, retraining begins")

    def _tick(self, run: CompressionRun, model: nn.Module, now: float, *, ends: bool = False) -> bool:
        optimizers = [huggingface.unwrapped(self._trainer.optimizer)]
        if ends:
            run.freeze(now, optimizers)
        elif not run.tick(now, self._timeline, optimizers):
            return False
        huggingface.refuse_ranks_apart(self._trainer, run.fingerprint())
        self._follow_budget(model, run)
        return True

    # ---- each optimizer step

    def _before_step(self) -> None:
        """Change the gradients, once a step: complete and reduced over ranks, but neither clipped nor unscaled.

        The Trainer divides each loss by what its window really has, so the loss has the factor 1 in every window.
        """
        if self._run and not self._is_prepared:
            self._is_prepared = True
            optimizer = self._trainer.optimizer
            self._run.before_step(huggingface.unwrapped(optimizer), huggingface.gradient_scale(optimizer))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Change the gradients of a Trainer that did not ask for their norm."""
        self._before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """In retraining, write the structure back, to the bit."""
        self._is_prepared = False
        if self._run:
            self._run.after_step(huggingface.unwrapped(self._trainer.optimizer))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse NaN and Inf in retraining; before, each update of Z and U does."""
        if self._run and self._run.constraint:
            self._run.check_finite()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Add the metrics of the method to the log of the loss."""
        if self._run and self._trainer is not None and logs and "loss" in logs:
            metrics = {f"muws/{name}": float(value) for name, value in self._run.metrics().items()}
            logs |= metrics
            state.log_history[-1] |= metrics

    # ---- checkpoints and the end

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the state into the folder of the checkpoint that was just written."""
        if self._run and args.should_save:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE
            temporary = path.with_suffix(".tmp")
            torch.save({"run": self._run.state_dict(), "began": self._began}, temporary)
            temporary.replace(path)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the weights, print the report and write the file."""
        self._unhook()
        run, model = self._run, kwargs["model"]
        if run is None:
            return
        if run.constraint is None:
            rank_zero_warn(
                f"training ended in the {run.phase} phase: the weights were projected without retraining; lower "
                "phases.admm_end or train longer"
            )
            self._tick(run, model, huggingface.now(state, self.phases.interval), ends=True)
        assert run.constraint  # noqa: S101  frozen now
        assert self.plan  # noqa: S101  made with the run
        run.check_finite()
        if run.finish():
            rank_zero_info("muws: the file grew too large at the end of training, so its values were rounded again")
        run.stepper = None  # it holds the model
        try:
            run.verify()
        except StateError as error:
            rank_zero_warn(f"at the end of training {error}; it was projected back")
            run.settle(run.watched)
        self.report = make_report(model, self.plan, self.supports, run.constraint.primal, run.history)
        if state.is_world_process_zero:
            self.report.print()
        if self.save_to:
            compression = self.budget.compression if self.budget else None
            to = self._file, model, self.plan, state.is_world_process_zero
            steps = run.rounding.steps if run.rounding else None
            self.saved = saving.save(save_compressed, *to, compression, steps)
        self._trainer = None

    def _unhook(self) -> None:
        if self._clipping:
            self._clipping.remove()
            self._clipping = None
