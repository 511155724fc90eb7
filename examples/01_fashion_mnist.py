"""Compress a convolutional network on Fashion-MNIST with one callback. Run: make demo.

A dense network is trained for 5 epochs. From there it is trained for 10 more epochs twice, by the same Trainer with the
same seed: once as it is, which gives the accuracy to compare with, and once with WeightUnificationCallback in the list
of callbacks. The callback writes model.muws, at least 20 times smaller than the tensors. A rival file of the same size
holds the dense network, with coarser values and no structure. Both files are loaded into new networks and tested. All
accuracies are on the test set; no setting was tuned on it.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import lightning as L
import torch
from example_data import DataError, Images
from example_data import load as load_data
from networks import ConvNet

from lightning_muws import WeightUnificationCallback, accelerate, load_compressed, save_compressed
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


def load(file: Path, data: Images) -> tuple[ConvNet, float]:
    """Return a new network with the weights of a file, and its test accuracy."""
    network = ConvNet(side=data.train.images.shape[-1])
    network.load_state_dict(load_compressed(file))
    return network, test(network, data)


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
    options.add_argument("--compression", type=float, default=20.0, help="how many times smaller the file is")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path, default=Path("output"), help="folder of the files and pictures")
    return options.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)  # two threads on a busy machine can be ten times slower
    try:
        data = load_data(options.data)
    except DataError as error:
        sys.exit(str(error))
    options.output.mkdir(parents=True, exist_ok=True)
    file, rival = options.output / "model.muws", options.output / "rival.muws"

    L.seed_everything(options.seed, verbose=False)
    dense = ConvNet(side=data.train.images.shape[-1])
    start_epochs, epochs = EPOCHS[options.data]
    started = train(dense, data, start_epochs, options.seed)
    compressed = copy.deepcopy(dense)

    dense_accuracy = train(dense, data, epochs, options.seed)
    torch.save(dense.state_dict(), options.output / "dense.pt")

    callback = WeightUnificationCallback(compression=options.compression, save_to=file)
    trained_accuracy = train(compressed, data, epochs, options.seed, callback)
    callback.verify()

    saved = callback.saved
    save_compressed(dense, rival, compression=saved.compression_ratio)
    loaded, accuracy = load(file, data)
    _, rival_accuracy = load(rival, data)

    draw(dense, compressed, callback, options.output)
    _, speed = accelerate(loaded.eval(), data.test.images[:1])
    speed.print()
    after = start_epochs + epochs
    print(f"tensors: {saved.dense_bytes:,} bytes; {file}: {saved.n_bytes:,}; {rival}: {rival.stat().st_size:,}")
    print(f"test accuracy of the dense network after {start_epochs} epochs: {started:.4f}")
    print(f"test accuracy of the dense network after {after} epochs: {dense_accuracy:.4f}")
    print(f"test accuracy of that network from {rival}, without structure: {rival_accuracy:.4f}")
    print(f"test accuracy of the compressed network after {after} epochs, before saving: {trained_accuracy:.4f}")
    print(f"test accuracy of the compressed network from {file}: {accuracy:.4f}")
    print(
        f"dense {dense_accuracy:.4f} compressed {accuracy:.4f} sparsity {callback.report.sparsity:.2f} "
        f"file_ratio {saved.compression_ratio:.1f} speedup {speed.speedup:.1f}"
    )


if __name__ == "__main__":
    main()
