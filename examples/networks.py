"""The networks of the examples: ordinary modules, without a line about compression."""

from __future__ import annotations

from itertools import pairwise

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy


class ConvNet(L.LightningModule):
    """Three strided convolutions and two linear layers, trained by Adam with a cosine schedule over the whole fit.

    Args:
        side: Height and width of the images.
        width: Channels of the first convolution.
        lr: Learning rate at the start.
    """

    def __init__(self, side: int = 28, width: int = 32, lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr
        channels = (1, width, 2 * width, 4 * width)
        convolutions = [nn.Conv2d(n_in, n_out, 3, stride=2, padding=1) for n_in, n_out in pairwise(channels)]
        self.features = nn.Sequential(*(layer for conv in convolutions for layer in (conv, nn.ReLU())), nn.Flatten())
        n_features = self.features(torch.zeros(1, 1, side, side)).numel()
        self.classifier = nn.Sequential(nn.Linear(n_features, 4 * width), nn.ReLU(), nn.Linear(4 * width, 10))
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("test_accuracy", self.accuracy)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.Adam(self.parameters(), self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class FFDNet(nn.Module):
    """FFDNet (Zhang, Zuo and Zhang 2018): twelve convolutions on the image at half its size, with a map of the noise.

    Args:
        width: Channels between the convolutions.
        depth: Number of convolutions.
    """

    def __init__(self, width: int = 96, depth: int = 12) -> None:
        super().__init__()
        sizes = [13, *(depth - 1) * [width], 12]
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(sizes):
            layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.ReLU()]
        self.model = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, sigma: float) -> Tensor:
        small = F.pixel_unshuffle(x, 2)
        return F.pixel_shuffle(self.model(torch.cat([small, torch.full_like(small[:, :1], sigma)], 1)), 2)
