"""Small LightningModules that really train, and probes that look at every step."""

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_muws import MicroStructure
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.plan import clean_name

QUIET = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "accelerator": "cpu",
}  # fmt: skip
STRUCTURE = MicroStructure((2, 4), prune_ratio=0.5, unify_ratio=0.25)
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.05),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.2),
    "amsgrad": lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
}


class TwoLayers(BoringModel):
    """Two linear layers on the random data of Lightning's BoringModel."""

    def __init__(self, optimizer: str = "sgd", n_hidden: int = 16) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(32, n_hidden), nn.Tanh(), nn.Linear(n_hidden, 4))
        self.optimizer = optimizer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.to(self.dtype))

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(self(batch)), on_epoch=True, batch_size=len(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.parameters())


class Probe(Callback):
    """Checks the constraint with == after each batch of the retraining phase, from the weights alone."""

    def __init__(self, callback) -> None:
        self.callback, self.n_checked = callback, 0

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        weights = {clean_name(name): p.detach() for name, p in pl_module.named_parameters()}
        for name, support in self.callback.supports.items():
            blocks = support.grid.split(weights[name])
            kinds = support.kinds.flatten()
            assert (blocks[kinds == Kind.PRUNED] == 0).all(), name
            magnitudes = blocks[kinds == Kind.UNIFIED].abs()
            assert (magnitudes == magnitudes[:, :1]).all(), name
            self.n_checked += 1


def fit(module: L.LightningModule, *callbacks: Callback, ckpt_path: str | None = None, **options) -> L.Trainer:
    """Train for real, without a word, always on the same data."""
    L.seed_everything(3, verbose=False)
    options = {**QUIET, "limit_train_batches": 8, "limit_val_batches": 2, **options}
    trainer = L.Trainer(callbacks=list(callbacks), **options)
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer
