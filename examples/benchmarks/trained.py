"""Compression and fine-tuning of two pretrained networks, which learn what the given networks compute.

`compress` makes the network smaller, `FineTuning` keeps it so while Adam trains it on. FFDNet learns the given
network's outputs for noisy crops of twelve photographs, and is tested on four others. MiniLM learns the embeddings that
the given network makes of definitions of WordNet, and is tested on other words. A dense network loses nothing in such a
training, so losses are counted from the given network. The scores are those of `make bench-compress`, of the file
loaded afresh. Run: make bench-trained.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from compress import CALIBRATED, SIGMA, denoising, retrieval, spread
from machine import console, say_machine
from pretrained import photograph
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_muws import FineTuning, compress, load_compressed, save_compressed
from lightning_muws.compression import CompressReport

ROOM = 1.03  # the file of a trained network is some per cent larger
CROPS, SIDE, BATCH = 480, 48, 8
TRAINED = {
    "skimage/data": (*CALIBRATED, "camera.png", "brick.png", "grass.png", "gravel.png", "coins.png"),
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
}
DEFINITIONS = 1600


def ffdnet(seed: int) -> tuple[nn.Module, DataLoader, list, Callable, Callable]:
    """Return FFDNet, crops to train on, calibration batches, the loss, and the score in dB."""
    model, calibration, score = denoising(seed)
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
    data = DataLoader(TensorDataset(clean), BATCH, shuffle=True, num_workers=0)
    return model, data, calibration, loss, score


def crop(image: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Return a square of an image."""
    top, left = (int(torch.randint(size - side + 1, (1,), generator=generator)) for size in image.shape[1:])
    return image[:, top : top + side, left : left + side]


def minilm(seed: int) -> tuple[nn.Module, DataLoader, list, Callable, Callable]:
    """Return MiniLM, definitions to train on, calibration batches, the loss, and R@1."""
    model, batches, score = retrieval(seed, n_calibration=DEFINITIONS)
    teacher = copy.deepcopy(model).eval()

    def embeddings(model: nn.Module, batch: dict) -> Tensor:
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    def loss(model: nn.Module, batch: object) -> Tensor:
        with torch.no_grad():
            wanted = embeddings(teacher, batch)
        return (embeddings(model, batch) - wanted).square().sum(1).mean()

    data = DataLoader(batches, batch_size=None, shuffle=True, num_workers=0)
    return model, data, batches[:: len(batches) // 8][:8], loss, score


NETWORKS = {  # unit, digits, learning rate, compressions
    "FFDNet": (ffdnet, "dB", 2, 3e-4, (10, 20)),
    "MiniLM": (minilm, "R@1", 3, 1e-4, (8, 20)),
}


def stored(model: nn.Module) -> tuple[nn.Module, float]:
    """Return the network loaded from its file, and the file's ratio."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.muws"
        saved = save_compressed(model, path)
        loaded = copy.deepcopy(model).eval()
        loaded.load_state_dict(load_compressed(path))
    return loaded, saved.compression_ratio


def train(model: nn.Module, report: CompressReport, data: DataLoader, loss: Callable, rate: float, epochs: int) -> None:
    """Train a compressed network as long as asked, with a cosine schedule."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(data))
    tuning = FineTuning(model, report)
    tuning.attach(optimizer)
    model.train()
    for _ in track(range(epochs), "training", console=console):
        for batch in data:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
            schedule.step()
    tuning.verify()
    model.eval()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    options.add_argument("--compressions", type=float, nargs="+", help="the default: 10 and 20, MiniLM 8 and 20")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--epochs", type=int, default=10, help="of 60 steps, MiniLM of 50")
    options.add_argument("--rate", type=float, help="of learning, instead of the network's own")
    chosen = options.parse_args()
    warnings.simplefilter("ignore")
    say_machine()
    for name in chosen.networks:
        make, unit, digits, rate, compressions = NETWORKS[name]
        given: list[float] = []
        found: dict[tuple[float, str], list[tuple[float, float]]] = {}
        for seed in chosen.seeds:
            model, data, calibration, loss, score = make(seed)
            given.append(score(model))
            for compression in chosen.compressions or compressions:
                torch.manual_seed(seed)
                small, report = compress(model, ROOM * compression, calibration)
                for how in ("compress", "and trained"):
                    if how == "and trained":
                        train(small, report, data, loss, chosen.rate or rate, chosen.epochs)
                    loaded, ratio = stored(small)
                    found.setdefault((compression, how), []).append((given[-1] - score(loaded), ratio))
                    lost, _ = found[compression, how][-1]
                    console.print(
                        f"{name}, seed {seed}, {compression:g}x, {how}: lost {lost:.4f}, {ratio:.2f}x", style="dim"
                    )
        table = Table(title=f"{name}: given {spread(given, digits)} {unit}, {len(given)} seeds, mean +- deviation")
        for header in ("requested", "how", "file ratios", f"lost {unit}", "each"):
            table.add_column(header)
        for (compression, how), rows in found.items():
            lost = [value for value, _ in rows]
            ratios = " ".join(f"{ratio:.2f}" for _, ratio in rows)
            each = " ".join(f"{value:.{digits}f}" for value in lost)
            table.add_row(f"{compression:g}", how, ratios, spread(lost, digits), each)
        console.print(table)


if __name__ == "__main__":
    main()
