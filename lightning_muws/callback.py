"""WeightUnificationCallback for `lightning.pytorch`."""

from __future__ import annotations

from lightning.pytorch import Callback

from lightning_muws.artifact.save import save_compressed
from lightning_muws.artifact.steps import choose_steps
from lightning_muws.plots import layer_picture
from lightning_muws.report import CompressionReport, make_report
from lightning_muws.runtime.predict import layer_times
from lightning_muws.trainer.hooks import CompressionHooks


class WeightUnificationCallback(CompressionHooks, Callback):
    """Train any LightningModule towards micro-structured weights, then inside the chosen structure, exactly.

    First a training method brings the weights near the structure. ADMM adds the gradient of
    ``sum rho / 2 * |W - Z + U|^2`` to the gradient of the module's loss, and updates Z and U (Boyd et al. 2011, section
    3.1.1); with a compression the network trains straight through the projection instead (``Phases.method``). Then the
    callback projects the weights; in the retraining phase every optimizer step ends inside the structure. It logs
    ``muws/phase`` (0 dense, 1 method, 2 retraining), ``muws/rho``, ``muws/penalty``, ``muws/primal_residual`` and
    ``muws/dual_residual``, and prints a report after fit.

    The callback covers the weights that an optimizer holds when fit begins; ``plan`` lists them, and gives the reason
    for each parameter that it leaves out. A second fit of the same model, which has the same weights under the same
    names, goes on inside the structure. A fit of any other model begins again.

    Example:
        >>> from lightning_muws import MicroStructure
        >>> callback = WeightUnificationCallback(MicroStructure(prune_ratio=0.8, unify_ratio=0.1))
        >>> callback.phase
        'dense'
    """

    namespace = "lightning.pytorch"
    writer = staticmethod(save_compressed)
    stepper = staticmethod(choose_steps)
    reporter = staticmethod(make_report)
    timer = staticmethod(layer_times)
    drawer = staticmethod(layer_picture)
    report: CompressionReport | None
