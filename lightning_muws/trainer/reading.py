"""What a user reads of a callback's run, whichever Trainer it is for."""

from __future__ import annotations

from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_muws.errors import StateError
from lightning_muws.structure.plan import Plan
from lightning_muws.structure.support import Support
from lightning_muws.trainer import coverage
from lightning_muws.training.run import CompressionRun, Update


class RunReading:
    """The properties that callbacks share: a base class of both."""

    plan: Plan | None = None
    _run: CompressionRun | None = None

    @property
    def phase(self) -> str:
        """The phase of the run: ``dense``, then the name of the training method (``admm``), then ``retraining``."""
        return self._run.phase if self._run else "dense"

    @property
    def supports(self) -> dict[str, Support]:
        """The frozen structure of each covered weight, by name; empty before the retraining phase."""
        return self._run.supports if self._run else {}

    @property
    def history(self) -> list[Update]:
        """The Z/U updates with their residuals, the first one first; the last entry is the projection."""
        return list(self._run.history) if self._run else []

    def verify(self) -> None:
        """Check that every covered weight is inside its structure, with ``==``.

        Raises:
            StateError: A weight is not, or the structure is not frozen yet.
        """
        if self._run is None:
            raise StateError("there is nothing to verify before training: give it to a Trainer and let it train")
        self._run.verify()

    def _follow_budget(self, module: Any, run: CompressionRun) -> None:
        """Put the structures that the run chose into the plan; say so if they are new."""
        if self.plan and (plan := self.plan.updated(run.planned)) != self.plan:
            self.plan = plan
            rank_zero_info(f"muws: for {run.budget or 'these ratios'}, {coverage.summary(module, plan)}")
