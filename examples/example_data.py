"""Data for the examples and benchmarks: installed, cached or fetched, checked against pinned digests, in memory."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
WORDNET = Path("/usr/share/wordnet")
MIRROR = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"  # the authors' (Xiao, Rasul and Vollgraf 2017)
SHA256 = {  # of the unpacked files: packing them again changes nothing
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


class DataError(Exception):
    """The data is not available; the message tells how to get it."""


@dataclass(frozen=True)
class Split:
    """Images ``(n, 1, height, width)`` float32, and labels ``(n,)`` int64."""

    images: Tensor
    labels: Tensor


class Images(L.LightningDataModule):
    """Images in memory, loaded a whole batch at a time.

    Args:
        train: The training images; they are shuffled in each epoch.
        test: The test images.
        batch_size: Number of images in a batch.
    """

    def __init__(self, train: Split, test: Split, batch_size: int = 128) -> None:
        super().__init__()
        self.train, self.test, self.batch_size = train, test, batch_size

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train, RandomSampler)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.test, SequentialSampler)

    test_dataloader = val_dataloader

    def _loader(self, split: Split, order: Callable) -> DataLoader:
        dataset = TensorDataset(split.images, split.labels)
        batches = BatchSampler(order(dataset), self.batch_size, drop_last=False)
        return DataLoader(dataset, sampler=batches, batch_size=None)


def load(name: str = "fashion", n_train: int = 60_000, batch_size: int = 128) -> Images:
    """Return ``fashion`` (Fashion-MNIST, the first ``n_train`` training images) or ``digits`` (in scikit-learn).

    Raises:
        DataError: The data is not available, or its digest is wrong.
    """
    if name == "digits":
        return _digits(batch_size)
    folder = fashion_mnist()
    train, test = (
        Split(_normalise(_read(folder, f"{part}-images-idx3-ubyte")), _read(folder, f"{part}-labels-idx1-ubyte").long())
        for part in ("train", "t10k")
    )
    return Images(Split(train.images[:n_train], train.labels[:n_train]), test, batch_size)


def fashion_mnist(cache: Path | None = None) -> Path:
    """Return the folder of the four Fashion-MNIST files: installed by the distribution, cached, or fetched now.

    Raises:
        DataError: The files are neither installed nor cached, and they could not be fetched.
    """
    cache = cache or Path(os.environ.get("MUWS_CACHE") or Path.home() / ".cache" / "lightning_muws") / "fashion-mnist"
    for folder in (INSTALLED, cache):
        if all((folder / f"{name}.gz").is_file() for name in SHA256):
            return folder
    reasons = []
    for way in (_from_distribution, _from_mirror):
        print(f"Fetching Fashion-MNIST: {way.__doc__}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as scratch:
            try:
                found = way(Path(scratch))
                for name in SHA256:
                    _read(found, name)
                cache.mkdir(parents=True, exist_ok=True)
                for name in SHA256:
                    shutil.copy(found / f"{name}.gz", cache / f"{name}.gz")
                return cache
            except (OSError, subprocess.CalledProcessError, DataError) as error:
                reasons.append(f"{way.__doc__}: {error}")
    raise DataError(
        f"Fashion-MNIST could not be fetched ({'; '.join(reasons)}): install Debian's package {PACKAGE}, or put the "
        f"authors' four .gz files into {cache}, or run with --data digits"
    )


def glosses() -> list[tuple[str, str]]:
    """Return the nouns and verbs of WordNet 3.0 (Fellbaum 1998): the first word of each entry, and its definition.

    Raises:
        DataError: The data is neither installed nor cached, and it could not be fetched.
    """
    names = ("data.noun", "data.verb")
    cache = Path(os.environ.get("MUWS_CACHE") or Path.home() / ".cache" / "lightning_muws") / "wordnet"
    folder = next((place for place in (WORDNET, cache) if all((place / name).is_file() for name in names)), None)
    if folder is None:
        print("Fetching WordNet: from the distribution's archive.", file=sys.stderr)
        with tempfile.TemporaryDirectory() as scratch:
            try:
                unpacked = _unpacked("wordnet-base", Path(scratch)) / WORDNET.relative_to("/")
                cache.mkdir(parents=True, exist_ok=True)
                for name in names:
                    shutil.copy(unpacked / name, cache / name)
            except (OSError, subprocess.CalledProcessError) as error:
                raise DataError(f"WordNet could not be fetched ({error}): install Debian's wordnet-base") from error
        folder = cache
    found = []
    for name in names:
        for line in (folder / name).read_text(encoding="latin-1").splitlines():
            if not line.startswith(" "):  # the licence
                entry, gloss = line.split("|", 1)
                found.append((entry.split()[4].replace("_", " "), gloss.strip().split('; "')[0]))
    return found


def _from_distribution(scratch: Path) -> Path:
    """from the distribution's archive."""
    return _unpacked(PACKAGE, scratch) / INSTALLED.relative_to("/")


def _unpacked(package: str, scratch: Path) -> Path:
    """Return a folder with the files of a package of the distribution."""
    options = [f"Dir::State={scratch}/state", f"Dir::Cache={scratch}/cache", "Dir::State::status=/var/lib/dpkg/status"]
    options += ["APT::Sandbox::User=root", "Acquire::Languages=none"]
    apt = ["apt-get", "-qq", *(word for option in options for word in ("-o", option))]
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (scratch / folder).mkdir(parents=True)
    for command in ([*apt, "update"], [*apt, "download", package]):
        subprocess.run(command, cwd=scratch, check=True, capture_output=True, timeout=300)  # noqa: S603  no user input
    (file,) = scratch.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", file, scratch / "files"], check=True, capture_output=True)  # noqa: S603, S607
    return scratch / "files"


def _from_mirror(scratch: Path) -> Path:
    """from the authors' mirror."""
    for name in SHA256:
        with urllib.request.urlopen(f"{MIRROR}/{name}.gz", timeout=30) as answer:  # noqa: S310  a constant address
            (scratch / f"{name}.gz").write_bytes(answer.read())
    return scratch


def _read(folder: Path, name: str) -> Tensor:
    """Return the content of an IDX file as a tensor, after a check of its digest."""
    try:
        data = gzip.decompress((folder / f"{name}.gz").read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"{name}.gz cannot be read: {error}; remove it and run again") from error
    if (digest := hashlib.sha256(data).hexdigest()) != SHA256[name]:
        raise DataError(f"{name}.gz has SHA-256 {digest}, expected {SHA256[name]}; remove it and run again")
    n_axes = data[3]
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(n_axes)]
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=4 + 4 * n_axes).view(shape)


def _normalise(images: Tensor) -> Tensor:
    return images.unsqueeze(1).float().div_(255).sub_(0.2860).div_(0.3530)


def _digits(batch_size: int) -> Images:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 8 - 1
    y = torch.tensor(labels, dtype=torch.int64)[order]
    return Images(Split(x[400:], y[400:]), Split(x[:400], y[:400]), batch_size)
