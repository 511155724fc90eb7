"""WeightUnificationCallback: says when each step of the method happens in Lightning, and nothing of how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_muws.errors import StateError
from lightning_muws.report import CompressionReport, Update, make_report
from lightning_muws.structure.plan import LayerRule, Plan, clean_name, make_plan
from lightning_muws.structure.sets import MicroStructure, Support
from lightning_muws.training import rates, trainers
from lightning_muws.training.phases import Phases, Retraining, Timeline
from lightning_muws.training.run import CompressionRun, Phase


class WeightUnificationCallback(Callback):
    """Trains any LightningModule towards micro-structured weights, and then inside the structure, exactly.

    In the ADMM phase it adds the gradient of ``sum rho / 2 * |W - Z + U|^2`` to that of the module's own loss, and
    updates Z and U at the beginning of epochs; then the weights are projected, and from there on every optimizer step
    ends inside the structure. It logs ``muws/phase`` (0 dense, 1 ADMM, 2 retraining), ``muws/rho``, ``muws/penalty``,
    ``muws/primal_residual`` and ``muws/dual_residual``, and prints a report after fit.

    Args:
        structure: What the weights become, wherever no rule says otherwise.
        rules: Structures of their own for some layers, or their exemption; the last rule that matches wins.
        phases: When ADMM starts and ends, and how hard it pulls.
        retraining: How the network trains on inside its structure.
        validate_projected: In the ADMM phase, validate the network that a projection would give now.

    Raises:
        MuwsError: At the start of fit, a setting does not fit the model or the Trainer; in training, a weight is not
            finite.

    Example:
        >>> callback = WeightUnificationCallback(MicroStructure(prune_ratio=0.8, unify_ratio=0.1))
        >>> callback.phase
        'dense'
    """

    def __init__(
        self,
        structure: MicroStructure = MicroStructure(),
        rules: Sequence[LayerRule] = (),
        phases: Phases = Phases(),
        retraining: Retraining = Retraining(),
        validate_projected: bool = True,
    ) -> None:
        self.structure, self.rules, self.phases, self.retraining = structure, tuple(rules), phases, retraining
        self.validate_projected = validate_projected
        self.plan: Plan | None = None
        self.report: CompressionReport | None = None
        self._run: CompressionRun | None = None
        self._pending: Mapping[str, Any] | None = None
        self._timeline = Timeline(0, 0, 1)
        self._fitting = self._bound = self._stepped = False
        self._backwards = self._stepped_batches = 0
        self._began = (0, 0)  # the epoch and step at which retraining began
        self._hooks: dict[int, tuple[Optimizer, RemovableHandle]] = {}

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

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._fitting, self._bound = stage == "fit", False
        if self._fitting:
            trainers.refuse(trainer.strategy, *trainer.callbacks)  # type: ignore[attr-defined]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainers.refuse(*trainer.optimizers)
        rates.refuse_manual(trainer, self.retraining)
        now = {id(p) for p in pl_module.parameters()}
        if self._run is None or any(
            id(p) not in now for p in self._run.weights.values()
        ):  # or another model: next fold
            self.plan = make_plan(pl_module, self.structure, self.rules)
            weights, self._stepped_batches = self.plan.weights(pl_module), 0
            self._run = CompressionRun(weights, self.plan.covered, self.phases, self.retraining)
            n, of = (sum(p.numel() for p in ps) for ps in (weights.values(), pl_module.parameters()))
            rank_zero_info(f"muws: {len(weights)} parameters with {n:,} of {of:,} weights get a structure")
        run_length = trainers.length(trainer, self.phases.interval)
        self._timeline = self.phases.on(run_length, clip=bool(trainer.fast_dev_run))  # type: ignore[attr-defined]
        if self._run.constraint:
            self._run.constraint.follow(self._run.weights)
        self._bound, self._backwards = True, 0
        if self._pending:
            self._take_up(self._pending)
            if self._run.constraint:
                # now, so that the schedulers are there whose states will be restored
                rates.begin(trainer, self.retraining, *self._began)

    # ---- phases: always at the start of an epoch or batch, so that each checkpoint belongs to one phase

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.phase != "retraining":
            trainers.forgive_early_stopping(trainer)
        if self.phases.interval == "epoch":
            self._tick(trainer, trainer.current_epoch)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # For epochs again: Lightning skips on_train_epoch_start after resuming from an epoch's last batch.
        self._tick(trainer, self._now(trainer))

    def _tick(self, trainer: Trainer, now: int) -> None:
        if (run := self._run) is None or run.phase == "retraining":
            return
        run.tick(now, self._timeline, trainer.optimizers)
        if run.constraint:
            self._begin_retraining(trainer)

    def _begin_retraining(self, trainer: Trainer) -> None:
        self._began = trainer.current_epoch, trainer.global_step
        rates.begin(trainer, self.retraining, *self._began)
        left = trainers.reset_monitors(trainer)
        files = f"; checkpoints of earlier phases stay on disk: {', '.join(left)}" if left else ""
        rank_zero_info(f"muws: the structure is frozen, retraining begins{files}")

    def _now(self, trainer: Trainer) -> int:
        return trainer.current_epoch if self.phases.interval == "epoch" else self._stepped_batches

    # ---- each optimizer step

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._backwards += 1

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # Here gradients are accumulated, reduced over ranks and unscaled, and not clipped yet.
        if (run := self._run) is None:
            return
        if id(optimizer) not in self._hooks:  # lazily: optimizers may be made anew in mid-fit
            self._hooks[id(optimizer)] = optimizer, optimizer.register_step_post_hook(self._after_step)
        scale = trainers.gradient_scale(trainer, optimizer)
        if pl_module.automatic_optimization:
            # Lightning divides each loss by the length of a full window, also in an epoch's last, shorter one.
            scale *= self._backwards / trainer.accumulate_grad_batches
            self._backwards = 0
        run.before_step(optimizer, scale)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._stepped = True
        if self._run:
            self._run.after_step(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stepped_batches += self._stepped
        self._stepped = False
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = bool(every) and ((batch_idx + 1) % every == 0 or trainer.is_last_batch)
        if due and self._run and not trainer.barebones:
            by_step = self.phases.interval == "step"
            metrics = {f"muws/{name}": value for name, value in self._run.metrics().items()}
            # Lightning gives each callback the module's log_dict
            self.log_dict(metrics, on_step=by_step, on_epoch=not by_step, batch_size=1)  # type: ignore[attr-defined]

    # ---- validation of the projected network

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (run := self._run) is None or not self._fitting or run.phase == "retraining":
            return
        trainers.forgive_early_stopping(trainer)
        if run.phase == "admm" and self.validate_projected and not trainer.sanity_checking:
            run.show_projected()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run:
            self._run.show_raw()

    # ---- the end

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (run := self._run) and run.phase != "retraining":
            rank_zero_warn(
                f"training ended in the {run.phase} phase: the weights were projected without retraining; "
                "lower phases.admm_end or train longer"
            )
            run.freeze(self._now(trainer), trainer.optimizers)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unhook()
        if self._run and self._run.constraint and self.plan:
            self._hold()
            self.report = make_report(
                pl_module, self.plan, self.supports, self._run.constraint.primal, self._run.history
            )
            if trainer.is_global_zero:
                self.report.print()

    def _hold(self) -> None:
        """Bring weights back that another callback moved out of the structure after the last step."""
        try:
            self.verify()
        except StateError as error:
            rank_zero_warn(f"at the end of fit {error}; it was projected back")
            if self._run and self._run.constraint:
                self._run.constraint.enforce(self._run.weights)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_validation_end(trainer, pl_module)
        self._unhook()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._unhook()

    def _unhook(self) -> None:
        for _, hook in self._hooks.values():
            hook.remove()
        self._hooks = {}

    # ---- checkpoints: plain dicts, strings, numbers and tensors, so that weights_only=True can read them

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._run is None:
            return {}
        return {"stepped_batches": self._stepped_batches, "began": list(self._began), "run": self._run.state_dict()}

    @override
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
            self._stepped_batches, self._began = state["stepped_batches"], tuple(state["began"])

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        raw = self._run.raw if self._run else {}  # saved in the middle of a projected validation
        for name, _ in pl_module.named_parameters() if raw else ():
            if clean_name(name) in raw:
                checkpoint["state_dict"][name] = raw[clean_name(name)].clone()
