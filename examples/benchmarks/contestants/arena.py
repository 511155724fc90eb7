"""What contestants share: the data, the dense network each starts from, one training loop, and how a file is judged."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import NamedTuple

import lightning as L
import torch
from example_data import Images, load
from fitting import be_quiet, train
from machine import interleaved
from networks import ConvNet
from torch import Tensor, nn
from torch.nn import functional as F

NETWORKS = {"demo": 32, "wide": 48}  # channels of the first convolution: 356,234 and 800,074 weights
DENSE_EPOCHS, EPOCHS = 5, 10
State = Mapping[str, Tensor]


class Stored(NamedTuple):
    """A file of a network, loaded again.

    Args:
        n_bytes: Its size.
        how: What made it small.
        state: What was loaded from it.
    """

    n_bytes: int
    how: str
    state: State


@dataclass(frozen=True)
class Arena:
    """One network and one seed.

    Args:
        network: A name of `NETWORKS`.
        seed: Of the dense network; contestants train with ``100 + seed``.
        folder: Where dense networks are kept between runs.
    """

    network: str
    seed: int
    folder: Path

    @cached_property
    def data(self) -> Images:
        return load("fashion")

    def fresh(self) -> ConvNet:
        """Return an untrained network."""
        return ConvNet(width=NETWORKS[self.network])

    def start(self) -> ConvNet:
        """Return the dense network that all start from, and seed the generators as for all."""
        model = self._kept("start", self._trained_briefly)
        L.seed_everything(100 + self.seed, verbose=False)
        return model

    def longer(self) -> ConvNet:
        """Return the dense network trained as long in all as the contestants."""
        return self._kept("longer", self._trained_longer)

    def accuracy(self, model: nn.Module) -> float:
        """Return the share of test images that a network classifies correctly."""
        model.eval()
        with torch.no_grad():
            return float((model(self.data.test.images).argmax(1) == self.data.test.labels).float().mean())

    def loaded(self, state: State, into: nn.Module | None = None) -> nn.Module:
        """Return a network with the tensors of a file: a new one, or a copy of a smaller one."""
        model = copy.deepcopy(into or self.fresh())
        model.load_state_dict(dict(state))
        return model.eval()

    def judged(self, files: list[Stored], *, route: nn.Module | None = None, into: nn.Module | None = None) -> dict:
        """Return the row of the table: accuracy of the smallest file loaded afresh, its bytes, and the time of a call.

        Args:
            files: Files of one network.
            route: What is timed; the loaded network in plain PyTorch if nothing is faster.
            into: A network that its tensors fit into, if it is smaller than a new one.
        """
        best = min(files, key=lambda file: file.n_bytes)
        model = self.loaded(best.state, into)
        dense_bytes = sum(x.numel() * x.element_size() for x in self.fresh().state_dict().values())
        row = {"accuracy": self.accuracy(model), "n_bytes": best.n_bytes, "ratio": dense_bytes / best.n_bytes}
        return {**row, "how": best.how, **self.latency(route or model)}

    def latency(self, model: nn.Module) -> dict:
        """Return milliseconds of one image, and the ratio to the dense network in the same minute, both medians."""
        image, dense = self.data.test.images[:1], self.fresh().eval()
        with torch.inference_mode():
            tasks = {"own": lambda: model(image), "dense": lambda: dense(image)}
            for task in [*tasks.values()] * 20:  # the first calls are slow, and would set the size of a sample
                task()
            times = interleaved(tasks, rounds=25, sample_s=0.02)
        ratios = [a / b for a, b in zip(times["dense"], times["own"], strict=True)]
        return {"ms": 1e3 * median(times["own"]), "speedup": median(ratios)}

    def _kept(self, name: str, make: Callable[[], ConvNet]) -> ConvNet:
        path, model = self.folder / f"{name}-{self.network}-{self.seed}.pt", self.fresh()
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            made = make().state_dict()
            torch.save(made, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        model.load_state_dict(torch.load(path))
        return model

    def _trained_briefly(self) -> ConvNet:
        L.seed_everything(self.seed, verbose=False)
        model = self.fresh()
        train(model, self.data, DENSE_EPOCHS)
        return model

    def _trained_longer(self) -> ConvNet:
        model = self.start()
        train(model, self.data, EPOCHS)
        return model


def fit(
    model: nn.Module,
    data: Images,
    epochs: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    after_backward: Callable[[int], object] = lambda step: None,
    after_step: Callable[[int], object] = lambda step: None,
) -> nn.Module:
    """Train as `fitting.train` does, in plain PyTorch, for tools that know nothing of Lightning.

    Args:
        model: Trained in place.
        data: Its training images are shuffled in each epoch.
        epochs: The learning rate falls along a cosine to 0 over all of them.
        optimizer: By default Adam with the rate 1e-3.
        after_backward: Called with the number of the step when gradients are there.
        after_step: Called with the number of the step when the optimizer has stepped.
    """
    optimizer = optimizer or torch.optim.Adam(model.parameters(), 1e-3)
    loader = data.train_dataloader()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    step = 0
    for _ in range(epochs):
        model.train()
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            after_backward(step)
            optimizer.step()
            after_step(step)
            schedule.step()
            step += 1
    return model


def steps_of(data: Images, epochs: float) -> int:
    """Return how many batches so many epochs have."""
    return round(epochs * len(data.train_dataloader()))


def prepare() -> float:
    """Make the process quiet and single-threaded, and return its time so far in seconds."""
    be_quiet()
    torch.set_num_threads(1)
    return time.process_time()
