"""Compression with training on two pretrained networks, which learn what the given networks compute.

FFDNet learns the given network's outputs for noisy crops of twelve photographs, and is tested on four others. MiniLM
learns the embeddings that the given network makes of definitions of WordNet, and is tested on other words. A dense
network loses nothing in such a training, so losses are counted from the given network. The scores are those of
`make bench-compress`, of the file loaded afresh. Run: make bench-trained.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from compress import CALIBRATED, SIGMA, denoising, retrieval, spread
from fitting import be_quiet
from machine import console, say_machine
from pretrained import photograph
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_muws import WeightUnificationCallback, load_compressed

EPOCHS = 10
CROPS, SIDE, BATCH = 480, 48, 8
TRAINED = {
    "skimage/data": (*CALIBRATED, "camera.png", "brick.png", "grass.png", "gravel.png", "coins.png"),
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
}
DEFINITIONS = 1600


class Tuned(L.LightningModule):
    """A network and what it learns: Adam with a cosine schedule over all steps."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, object], Tensor], rate: float) -> None:
        super().__init__()
        self.model, self.loss, self.rate = model, loss, rate

    def training_step(self, batch: object, _: int) -> Tensor:
        return self.loss(self.model, batch)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.Adam(self.parameters(), self.rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def ffdnet(seed: int) -> tuple[nn.Module, DataLoader, Callable, Callable]:
    """Return FFDNet, crops to train on, the loss, and the score in dB."""
    model, _, score = denoising(seed)
    teacher = copy.deepcopy(model).eval()
    photographs = [photograph(name, folder) for folder, names in TRAINED.items() for name in names]
    generator = torch.Generator().manual_seed(3000 + seed)

    def loss(model: nn.Module, batch: object) -> Tensor:
        (x,) = batch
        noisy = x + SIGMA * torch.randn_like(x)
        with torch.no_grad():
            wanted = teacher(noisy, SIGMA)
        return F.mse_loss(model(noisy, SIGMA), wanted)

    clean = torch.stack([crop(photographs[i % len(photographs)], SIDE, generator) for i in range(CROPS)])
    return model, DataLoader(TensorDataset(clean), BATCH, shuffle=True, num_workers=0), loss, score


def crop(image: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Return a square of an image."""
    top, left = (int(torch.randint(size - side + 1, (1,), generator=generator)) for size in image.shape[1:])
    return image[:, top : top + side, left : left + side]


def minilm(seed: int) -> tuple[nn.Module, DataLoader, Callable, Callable]:
    """Return MiniLM, definitions to train on, the loss, and R@1."""
    model, batches, score = retrieval(seed, n_calibration=DEFINITIONS)
    teacher = copy.deepcopy(model).eval()

    def embeddings(model: nn.Module, batch: dict) -> Tensor:
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    def loss(model: nn.Module, batch: object) -> Tensor:
        with torch.no_grad():
            wanted = embeddings(teacher, batch)
        return (embeddings(model, batch) - wanted).square().sum(1).mean()

    return model, DataLoader(batches, batch_size=None, shuffle=True, num_workers=0), loss, score


NETWORKS = {  # unit, digits, learning rate, compressions
    "FFDNet": (ffdnet, "dB", 2, 1e-3, (10, 20)),
    "MiniLM": (minilm, "R@1", 3, 1e-4, (8, 20)),
}


def fit(module: Tuned, data: DataLoader, *callbacks: L.Callback) -> None:
    """Train without a word."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with contextlib.redirect_stdout(io.StringIO()):
        L.Trainer(max_epochs=EPOCHS, callbacks=list(callbacks), accelerator="cpu", **quiet).fit(module, data)


def compressed(module: Tuned, data: DataLoader, compression: float) -> float:
    """Train towards a size, put what its file holds into the module, and return the file's ratio."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.muws"
        callback = WeightUnificationCallback(compression=compression, save_to=path)
        fit(module, data, callback)
        callback.verify()
        module.load_state_dict(load_compressed(path))
    return callback.saved.compression_ratio


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    options.add_argument("--compressions", type=float, nargs="+", help="the default: 10 and 20, MiniLM 8 and 20")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--rate", type=float, help="of learning, instead of the network's own")
    chosen = options.parse_args()
    be_quiet()
    say_machine()
    for name in chosen.networks:
        make, unit, digits, rate, compressions = NETWORKS[name]
        given: list[float] = []
        found: dict[float, list[tuple[float, float]]] = {}
        for seed in chosen.seeds:
            model, data, loss, score = make(seed)
            given.append(score(model))
            for compression in chosen.compressions or compressions:
                L.seed_everything(seed, verbose=False)
                module = Tuned(copy.deepcopy(model), loss, chosen.rate or rate)
                ratio = compressed(module, data, compression)
                found.setdefault(compression, []).append((ratio, score(module.model.eval())))
                console.print(name, seed, f"{given[-1]:.4f}", compression, *found[compression][-1], style="dim")
        table = Table(title=f"{name}: given {spread(given, digits)} {unit}, {len(given)} seeds, mean +- deviation")
        for header in ("requested", "file ratios", unit, "lost", "each"):
            table.add_column(header)
        for compression, rows in found.items():
            ratios = " ".join(f"{ratio:.2f}" for ratio, _ in rows)
            reached = [value for _, value in rows]
            lost = [a - b for a, b in zip(given, reached, strict=True)]
            each = " ".join(f"{value:.{digits}f}" for value in lost)
            table.add_row(f"{compression:g}", ratios, spread(reached, digits), spread(lost, digits), each)
        console.print(table)


if __name__ == "__main__":
    main()
