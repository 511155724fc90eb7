"""Compress a convolutional network on Fashion-MNIST with one callback. Run: make demo.

A dense network is trained for 5 epochs. From there it is trained for 10 more epochs twice, by the same Trainer with the
same seed: once as it is, which gives the accuracy to compare with, and once with WeightUnificationCallback in the list
of callbacks. The callback writes model.muws, which is loaded into a new network and tested again. All accuracies are on
the test set; no setting was tuned on it.
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

EPOCHS = {"fashion": (5, 10), "digits": (20, 40)}  # of the common start, and of each continuation
PICTURED = "classifier.0.weight"


def train(module: L.LightningModule, data: Images, epochs: int, seed: int, *callbacks: L.Callback) -> float:
    """Fit the module with an ordinary Trainer and return its test accuracy."""
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=5,
    )
    trainer.fit(module, data)
    return test(module, data)


def test(module: L.LightningModule, data: Images) -> float:
    """Return the test accuracy of a module."""
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
    return trainer.test(module, data, verbose=False)[0]["test_accuracy"]


def draw(
    dense: L.LightningModule, compressed: L.LightningModule, callback: WeightUnificationCallback, to: Path
) -> None:
    """Write pictures of one weight and of the ADMM residuals."""
    block_shape = callback.structure.block_shape
    corners = (BlockGrid(block_shape).matrix(m.state_dict()[PICTURED])[:64, :128] for m in (dense, compressed))
    title = f"A corner of {PICTURED}, in blocks of {block_shape[0]} x {block_shape[1]}"
    plot_before_after(*corners, block_shape, title).savefig(to / "blocks.png", dpi=150)
    plot_residuals(callback.report).figure.savefig(to / "residuals.png", dpi=150)
    print(f"pictures: {to / 'blocks.png'}, {to / 'residuals.png'}")


def parse() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", choices=["fashion", "digits"], default="fashion")
    options.add_argument("--prune-ratio", type=float, default=0.81, help="share of the blocks that become zero")
    options.add_argument("--unify-ratio", type=float, default=0.095, help="share of the blocks with one magnitude")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path, default=Path("output"), help="folder of the files and pictures")
    return options.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)  # two threads on a busy machine can be ten times slower
    try:
        data = load(options.data)
    except DataError as error:
        sys.exit(str(error))
    options.output.mkdir(parents=True, exist_ok=True)
    dense_file, file = options.output / "dense.pt", options.output / "model.muws"

    L.seed_everything(options.seed, verbose=False)
    dense = ConvNet(side=data.train.images.shape[-1])
    start_epochs, epochs = EPOCHS[options.data]
    started = train(dense, data, start_epochs, options.seed)
    compressed = copy.deepcopy(dense)

    dense_accuracy = train(dense, data, epochs, options.seed)
    torch.save(dense.state_dict(), dense_file)

    structure = MicroStructure(prune_ratio=options.prune_ratio, unify_ratio=options.unify_ratio)
    callback = WeightUnificationCallback(structure, save_to=file)
    compressed_accuracy = train(compressed, data, epochs, options.seed, callback)
    callback.verify()

    loaded = ConvNet(side=data.train.images.shape[-1])
    loaded.load_state_dict(load_compressed(file))
    if (accuracy := test(loaded, data)) != compressed_accuracy:
        sys.exit(f"the network loaded from {file} has accuracy {accuracy}, the saved one {compressed_accuracy}")
    dense_bytes, n_bytes = dense_file.stat().st_size, file.stat().st_size

    draw(dense, compressed, callback, options.output)
    print(f"{dense_file}: {dense_bytes:,} bytes; {file}: {n_bytes:,} bytes, and the same accuracy when loaded")
    _, speed = accelerate(loaded.eval(), data.test.images[:1])
    speed.print()
    print(f"test accuracy of the dense network after {start_epochs} epochs: {started:.4f}")
    print(f"test accuracy of the dense network after {start_epochs + epochs} epochs: {dense_accuracy:.4f}")
    print(f"test accuracy of the compressed network after {start_epochs + epochs} epochs: {compressed_accuracy:.4f}")
    print(
        f"dense {dense_accuracy:.4f} compressed {compressed_accuracy:.4f} sparsity {callback.report.sparsity:.2f} "
        f"file_ratio {dense_bytes / n_bytes:.1f} speedup {speed.speedup:.1f}"
    )


if __name__ == "__main__":
    main()
