"""WeightUnificationCallback for Trainers of `pytorch_lightning`."""

from __future__ import annotations

from pytorch_lightning import Callback

from lightning_muws.artifact.save import save_compressed
from lightning_muws.artifact.steps import choose_steps
from lightning_muws.plots import layer_picture
from lightning_muws.report import CompressionReport, make_report
from lightning_muws.runtime.predict import layer_times
from lightning_muws.trainer.hooks import CompressionHooks


class WeightUnificationCallback(CompressionHooks, Callback):
    """Train any LightningModule towards micro-structured weights, with a Trainer of ``pytorch_lightning``.

    Arguments, hooks and checkpoints are those of :class:`lightning_muws.WeightUnificationCallback`. Either callback can
    resume a checkpoint of the other.
    """

    namespace = "pytorch_lightning"
    writer = staticmethod(save_compressed)
    stepper = staticmethod(choose_steps)
    reporter = staticmethod(make_report)
    timer = staticmethod(layer_times)
    drawer = staticmethod(layer_picture)
    report: CompressionReport | None
