"""WeightUnificationCallback for those who import `pytorch_lightning`; checkpoints of both namespaces are the same."""

from __future__ import annotations

from pytorch_lightning import Callback

from lightning_muws.artifact.save import save_compressed
from lightning_muws.report import CompressionReport, make_report
from lightning_muws.trainer.hooks import CompressionHooks


class WeightUnificationCallback(CompressionHooks, Callback):
    """The callback of the package's face, for a Trainer of ``pytorch_lightning``; see there.

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
    """

    namespace = "pytorch_lightning"
    writer = staticmethod(save_compressed)
    reporter = staticmethod(make_report)
    report: CompressionReport | None
