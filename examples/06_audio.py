"""Compress a network that listens: convolutions in one dimension. Run: python examples/06_audio.py

Conv1d is cut into blocks as Conv2d is; nothing is set for it. The task is synthetic, so nothing is downloaded: which of
twelve notes does an instrument play? Each sound has another octave, other overtones, another phase, and noise.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_muws import WeightUnificationCallback, load_compressed

RATE, LENGTH, N_NOTES, N_OVERTONES = 8000, 1024, 12, 5


def sounds(n: int, seed: int) -> TensorDataset:
    """Return sounds ``(n, 1, LENGTH)`` float32, sampled ``RATE`` times a second, and their notes ``(n,)`` int64."""
    generator = torch.Generator().manual_seed(seed)
    notes = torch.randint(N_NOTES, (n,), generator=generator)
    octaves = torch.randint(2, (n,), generator=generator)
    pitch = 220 * 2 ** (octaves + notes / N_NOTES)  # hertz, from the A below middle C
    harmonics = torch.arange(1, N_OVERTONES + 1)
    loudness = torch.rand(n, N_OVERTONES, 1, generator=generator) / harmonics[:, None]
    phase = 2 * math.pi * torch.rand(n, N_OVERTONES, 1, generator=generator)
    time = torch.arange(LENGTH) / RATE
    tones = loudness * torch.sin(2 * math.pi * (pitch[:, None] * harmonics)[..., None] * time + phase)
    noise = 0.1 * torch.randn(n, LENGTH, generator=generator)
    return TensorDataset((tones.sum(1) + noise).unsqueeze(1), notes)


class Listener(L.LightningModule):
    """Strided convolutions on the raw sound, the mean of their outputs' sizes over time, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.hear = nn.Conv1d(1, 64, 256, stride=16)  # 32 ms: two waves of the lowest note and more
        self.refine = nn.Sequential(nn.ReLU(), nn.Conv1d(64, 128, 5, stride=2), nn.ReLU(), nn.Conv1d(128, 128, 3))
        self.name = nn.Linear(128, N_NOTES)
        self.accuracy = MulticlassAccuracy(N_NOTES, average="micro")

    def forward(self, sound: Tensor) -> Tensor:
        return self.name(self.refine(self.hear(sound)).relu().mean(2))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        sound, note = batch
        return F.cross_entropy(self(sound), note)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        sound, note = batch
        self.accuracy(self(sound), note)
        self.log("test_accuracy", self.accuracy)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.Adam(self.parameters(), 2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", type=Path, default=Path("output"), help="folder of the file")
    options.add_argument("--compression", type=float, default=10.0, help="how many times smaller the file is")
    chosen = options.parse_args()

    L.seed_everything(0, verbose=False)
    train, test = DataLoader(sounds(4096, 1), batch_size=64, shuffle=True), DataLoader(sounds(1024, 2), batch_size=256)
    network, file = Listener(), chosen.output / "audio.muws"
    callback = WeightUnificationCallback(compression=chosen.compression, save_to=file)
    trainer = L.Trainer(
        max_epochs=10, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False
    )
    trainer.fit(network, train)

    load_compressed(file, into=network)
    (found,) = trainer.test(network, test, verbose=False)
    print(f"accuracy {found['test_accuracy']:.3f} file_ratio {callback.saved.compression_ratio:.2f}")


if __name__ == "__main__":
    main()
