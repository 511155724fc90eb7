"""WeightUnificationCallback for `lightning.pytorch`."""

from __future__ import annotations

from lightning.pytorch import Callback

from lightning_muws.artifact.save import save_compressed
from lightning_muws.report import CompressionReport, make_report
from lightning_muws.trainer.hooks import CompressionHooks


class WeightUnificationCallback(CompressionHooks, Callback):
    """Trains any LightningModule towards micro-structured weights, and then inside the structure, exactly.

    In the ADMM phase it adds the gradient of ``sum rho / 2 * |W - Z + U|^2`` to that of the module's own loss, and
    updates Z and U at the beginning of epochs; then the weights are projected, and from there on every optimizer step
    ends inside the structure. It logs ``muws/phase`` (0 dense, 1 ADMM, 2 retraining), ``muws/rho``, ``muws/penalty``,
    ``muws/primal_residual`` and ``muws/dual_residual``, and prints a report after fit.

    Args:
        structure: What the weights become, wherever no rule says otherwise.
        rules: Structures of their own for some layers, or their exemption; the last rule that matches wins.
        phases: When ADMM starts, updates and ends.
        retraining: How the network trains on inside its structure.
        penalty: How hard ADMM pulls the weights towards their structure.
        validate_projected: In the ADMM phase, validate the network that a projection would give now.
        save_to: File to write at the end of fit, such as ``model.muws``, in place of what was there before: the
            module's ``state_dict``, see :func:`lightning_muws.load_compressed`. Empty for none.

    Raises:
        MuwsError: At the start of fit, a setting does not fit the model or the Trainer; in training, a weight is not
            finite.

    Example:
        >>> from lightning_muws import MicroStructure
        >>> callback = WeightUnificationCallback(MicroStructure(prune_ratio=0.8, unify_ratio=0.1))
        >>> callback.phase
        'dense'
    """

    namespace = "lightning.pytorch"
    writer = staticmethod(save_compressed)
    reporter = staticmethod(make_report)
    report: CompressionReport | None
