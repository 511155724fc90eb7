"""A convolutional network learns Fashion-MNIST, and is compressed by one callback. Run: make demo.

The dense network is trained first. Then the same LightningModule goes through the same kind of Trainer once more, with
WeightUnificationCallback in its list and nothing else changed. The callback writes a file, which is loaded into a fresh
instance and tested once more. All accuracies are of the test set, which nothing is chosen by.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import lightning as L
import torch
from datasets import DataError, Images, load
from networks import ConvNet

from lightning_muws import MicroStructure, WeightUnificationCallback, accelerate, load_compressed
from lightning_muws.plots import plot_before_after, plot_residuals
from lightning_muws.structure.grid import BlockGrid

EPOCHS = {"fashion": (5, 10), "digits": (30, 60)}  # dense, and with the callback
PICTURED = "classifier.0.weight"


def train(module: L.LightningModule, data: Images, epochs: int, *callbacks: L.Callback) -> float:
    """Fit the module with an ordinary Trainer and return its test accuracy."""
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, data)
    return test(module, data)


def test(module: L.LightningModule, data: Images) -> float:
    """Return the test accuracy of a module."""
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
    return trainer.test(module, data, verbose=False)[0]["test_accuracy"]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", choices=["fashion", "digits"], default="fashion")
    options.add_argument("--prune-ratio", type=float, default=0.81, help="share of the blocks that become zero")
    options.add_argument("--unify-ratio", type=float, default=0.095, help="share of the blocks of one magnitude")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path, default=Path("output"), help="folder of the picture")
    chosen = options.parse_args()

    torch.set_num_threads(1)  # two threads on a busy machine can be ten times slower
    L.seed_everything(chosen.seed, verbose=False)
    try:
        data = load(chosen.data)
    except DataError as error:
        sys.exit(str(error))

    module = ConvNet(side=data.train.images.shape[-1])
    dense_epochs, epochs = EPOCHS[chosen.data]
    dense = train(module, data, dense_epochs)
    before = copy.deepcopy(module.state_dict())

    chosen.output.mkdir(parents=True, exist_ok=True)
    dense_file, file = chosen.output / "dense.pt", chosen.output / "model.muws"
    torch.save(before, dense_file)
    structure = MicroStructure(prune_ratio=chosen.prune_ratio, unify_ratio=chosen.unify_ratio)
    callback = WeightUnificationCallback(structure, save_to=file)
    compressed = train(module, data, epochs, callback)
    callback.verify()

    fresh = ConvNet(side=data.train.images.shape[-1])
    fresh.load_state_dict(load_compressed(file))
    if (loaded := test(fresh, data)) != compressed:
        sys.exit(f"the network from {file} has accuracy {loaded}, the one that was saved {compressed}")
    dense_bytes, n_bytes = dense_file.stat().st_size, file.stat().st_size

    grid = BlockGrid(structure.block_shape)
    picture = plot_before_after(
        *(grid.matrix(weights[PICTURED])[:64, :128] for weights in (before, module.state_dict())),
        structure.block_shape,
        f"A corner of {PICTURED}, in blocks of {structure.block_shape}",
    )
    picture.savefig(chosen.output / "blocks.png", dpi=150)
    plot_residuals(callback.report).figure.savefig(chosen.output / "residuals.png", dpi=150)
    print(f"pictures: {chosen.output / 'blocks.png'}, {chosen.output / 'residuals.png'}")
    print(f"{dense_file} has {dense_bytes:,} bytes, {file} {n_bytes:,}; loaded anew its accuracy is {loaded:.4f} again")
    _, speed = accelerate(fresh.eval(), data.test.images[:1])
    speed.print()
    print(
        f"dense {dense:.4f} compressed {compressed:.4f} sparsity {callback.report.sparsity:.2f} "
        f"file_ratio {dense_bytes / n_bytes:.1f} speedup {speed.speedup:.1f}"
    )


if __name__ == "__main__":
    main()
