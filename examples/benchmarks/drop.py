"""Does max_drop keep its word? For each seed and each allowed drop: what the callback chose, predicted and measured.

All networks train on 50,000 of the training images; the callback validates on the other 10,000. A dense network trains
for some epochs, and from there the callback goes on; `dense` is that network trained as long without the callback.
`baseline`, `measured` and `dense` are accuracies on the validation images. `test` and `dense test` are accuracies
on the test set, by which nothing is chosen: of the network loaded from the file, and of the dense one.
Run: make bench-drop.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import tempfile
from pathlib import Path

import lightning as L
import torch
from example_data import Images, Split, load
from fitting import be_quiet
from machine import console, say_machine
from networks import ConvNet
from rich.table import Table
from torch.utils.data import DataLoader, SequentialSampler

from lightning_muws import WeightUnificationCallback, load_compressed

N_TRAIN = 50_000  # at most, of 60,000; the last 10,000 are for validation
COLUMNS = (
    "asked",
    "seed",
    "chosen",
    "file",
    "baseline",
    "predicted",
    "measured",
    "drop",
    "",
    "dense",
    "test",
    "dense test",
)


class Held(Images):
    """Validates on images that are neither trained on nor those of the test set."""

    def __init__(self, data: Images, n_train: int) -> None:
        super().__init__(Split(data.train.images[:n_train], data.train.labels[:n_train]), data.test)
        self.validation = Split(data.train.images[N_TRAIN:], data.train.labels[N_TRAIN:])

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.validation, SequentialSampler)


def train(module: L.LightningModule, data: Held, epochs: int, seed: int, *callbacks: L.Callback) -> None:
    L.seed_everything(seed, verbose=False)
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        check_val_every_n_epoch=epochs,
        **dict.fromkeys(off, False),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.fit(module, data)


def accuracy(module: L.LightningModule, split: Split) -> float:
    with torch.no_grad():
        return float((module.eval()(split.images).argmax(1) == split.labels).float().mean())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--drops", type=float, nargs="+", default=[0.002, 0.005, 0.01])
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--images", type=int, default=N_TRAIN, help="images to train on")
    options.add_argument("--dense-epochs", type=int, default=5)
    options.add_argument("--epochs", type=int, default=10)
    options.add_argument("--no-dense", action="store_true", help="do not train the dense network as long")
    chosen = options.parse_args()
    be_quiet()
    say_machine()
    data = Held(load("fashion"), min(chosen.images, N_TRAIN))

    rows, n_kept = [], 0
    for seed in chosen.seeds:
        L.seed_everything(seed, verbose=False)
        start = ConvNet()
        train(start, data, chosen.dense_epochs, seed)
        dense = ["", ""]
        if not chosen.no_dense:
            longer = copy.deepcopy(start)
            train(longer, data, chosen.epochs, seed)
            dense = [f"{accuracy(longer, split):.4f}" for split in (data.validation, data.test)]
        for asked in chosen.drops:
            module = copy.deepcopy(start)
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "model.muws"
                callback = WeightUnificationCallback(max_drop=asked, monitor="val_accuracy", save_to=file)
                train(module, data, chosen.epochs, seed, callback)
                module.load_state_dict(load_compressed(file))
            found = callback.drop
            n_kept += found.is_kept
            rows.append(
                [
                    f"{asked:g}",
                    f"{seed}",
                    f"{found.compression:g}",
                    f"{callback.saved.compression_ratio:.1f}",
                    f"{found.baseline:.4f}",
                    f"{found.predicted:.4f}",
                    f"{found.measured:.4f}",
                    f"{found.drop:+.4f}",
                    "kept" if found.is_kept else "missed",
                    dense[0],
                    f"{accuracy(module, data.test):.4f}",
                    dense[1],
                ]
            )
            console.print("  ".join(f"{name} {cell}" for name, cell in zip(COLUMNS, rows[-1], strict=True) if cell))

    table = Table(title=f"max_drop was kept in {n_kept} of {len(rows)} runs; the callback said which")
    for header in COLUMNS:
        table.add_column(header)
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
