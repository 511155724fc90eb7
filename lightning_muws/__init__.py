"""Train any LightningModule towards micro-structured weights: many times smaller, at the accuracy it had.

Add one callback to a Trainer, change nothing else:

    >>> import lightning as L
    >>> from lightning.pytorch.demos.boring_classes import BoringModel
    >>> from lightning_muws import MicroStructure, Phases, WeightUnificationCallback
    >>> callback = WeightUnificationCallback(MicroStructure(block_shape=(2, 4), prune_ratio=0.5, unify_ratio=0.25))
    >>> quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    >>> trainer = L.Trainer(max_epochs=5, limit_train_batches=4, limit_val_batches=1, callbacks=[callback], **quiet)
    >>> trainer.fit(BoringModel())  # doctest: +ELLIPSIS +NORMALIZE_WHITESPACE
    Micro-structured weights
    ...
    >>> callback.phase
    'retraining'
    >>> callback.report.sparsity
    0.5
    >>> callback.verify()  # every covered weight is inside its structure, to the bit, or this raises

Names are imported when they are first used, so that a machine without Lightning can use what needs none.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_muws.artifact.load import inspect_compressed, load_compressed, verify_compressed
    from lightning_muws.artifact.partial import open_compressed
    from lightning_muws.artifact.save import save_compressed
    from lightning_muws.artifact.steps import choose_steps
    from lightning_muws.callback import WeightUnificationCallback
    from lightning_muws.compression import compress
    from lightning_muws.errors import FormatError, MuwsError
    from lightning_muws.estimate import dry_run
    from lightning_muws.fine_tuning import FineTuning
    from lightning_muws.runtime.accelerate import accelerate
    from lightning_muws.runtime.onnx.export import export_onnx
    from lightning_muws.runtime.onnx.library import onnx_library
    from lightning_muws.runtime.predict import layer_times
    from lightning_muws.sizes import export
    from lightning_muws.structure.micro import MicroStructure
    from lightning_muws.structure.nm import NMStructure
    from lightning_muws.structure.plan import LayerRule
    from lightning_muws.structure.sensitivity import sensitivity
    from lightning_muws.training.budget import Budget
    from lightning_muws.training.penalty import Penalty
    from lightning_muws.training.phases import Phases, Retraining
    from lightning_muws.training.run import CompressionRun

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "CompressionRun",
    "FineTuning",
    "FormatError",
    "LayerRule",
    "MicroStructure",
    "MuwsError",
    "NMStructure",
    "Penalty",
    "Phases",
    "Retraining",
    "WeightUnificationCallback",
    "accelerate",
    "choose_steps",
    "compress",
    "dry_run",
    "export",
    "export_onnx",
    "inspect_compressed",
    "layer_times",
    "load_compressed",
    "onnx_library",
    "open_compressed",
    "save_compressed",
    "sensitivity",
    "verify_compressed",
]

_HOMES = {
    "Budget": "lightning_muws.training.budget",
    "CompressionRun": "lightning_muws.training.run",
    "FineTuning": "lightning_muws.fine_tuning",
    "FormatError": "lightning_muws.errors",
    "LayerRule": "lightning_muws.structure.plan",
    "MicroStructure": "lightning_muws.structure.micro",
    "MuwsError": "lightning_muws.errors",
    "NMStructure": "lightning_muws.structure.nm",
    "Penalty": "lightning_muws.training.penalty",
    "Phases": "lightning_muws.training.phases",
    "Retraining": "lightning_muws.training.phases",
    "WeightUnificationCallback": "lightning_muws.callback",
    "accelerate": "lightning_muws.runtime.accelerate",
    "choose_steps": "lightning_muws.artifact.steps",
    "compress": "lightning_muws.compression",
    "dry_run": "lightning_muws.estimate",
    "export": "lightning_muws.sizes",
    "export_onnx": "lightning_muws.runtime.onnx.export",
    "inspect_compressed": "lightning_muws.artifact.load",
    "layer_times": "lightning_muws.runtime.predict",
    "load_compressed": "lightning_muws.artifact.load",
    "onnx_library": "lightning_muws.runtime.onnx.library",
    "open_compressed": "lightning_muws.artifact.partial",
    "save_compressed": "lightning_muws.artifact.save",
    "sensitivity": "lightning_muws.structure.sensitivity",
    "verify_compressed": "lightning_muws.artifact.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
