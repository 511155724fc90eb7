"""Where tools come from: each is installed into a folder of its own, beside the torch that is there, when needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

ANCIENT = ("pandas", "python-dateutil", "pytz", "prettytable", "wcwidth", "schema")
NNI = (*ANCIENT, "json-tricks", "astor", "colorama", "responses", "websockets", "PythonWebHDFS", "cloudpickle")
PACKAGES = {  # without their dependencies, which would bring another torch: those that they need are listed
    "nnc": ("nncodec==2.1.3", "pandas", "python-dateutil", "pytz", "h5py"),
    "qat": ("zstandard==0.25.0",),
    "deep": ("zstandard==0.25.0",),
    "inc": (
        *("neural-compressor==2.6", *ANCIENT, "py-cpuinfo", "deprecated", "wrapt", "setuptools<80"),
        *("opencv-python-headless", "six", "pycocotools"),
    ),
    "nni_agp": ("nni==3.0", *NNI, "typeguard>=3,<4.1.3"),
    "nni_admm": ("nni==2.10.1", *NNI, "typeguard<3", "tensorboard", "absl-py", "protobuf"),
    "torch_pruning": ("torch-pruning==1.6.1",),
    "modelopt": (
        *("nvidia-modelopt==0.47.0", "omegaconf", "antlr4-python3-runtime==4.9.3", "pulp<4", "nvidia-ml-py", "ninja"),
    ),
    "fasterai": (
        *("fasterai==0.4.1", "torch-pruning==1.6.1", "fastcore", "fastai", "fastdownload", "fasttransform"),
        *("fastprogress<1.1", "plum-dispatch", "beartype", "einops", "pandas", "python-dateutil", "pytz"),
    ),
}


class MissingError(Exception):
    """A tool cannot be installed here."""


def ready(name: str, folder: Path) -> Path | None:
    """Return the folder with the tool of a contestant, installed now if it is not there; None if it needs none.

    Raises:
        MissingError: The tool cannot be installed.
    """
    packages = PACKAGES.get(name)
    if packages is None:
        return None
    place = folder / packages[0]
    mark = place / "installed.txt"
    if not mark.exists() or mark.read_text().split() != list(packages):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(place)]
        done = subprocess.run([*command, *packages], capture_output=True, text=True)  # noqa: S603  our own names
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no output"]
            raise MissingError(f"{packages[0]} cannot be installed: {lines[-1][:200]}")
        mark.write_text("\n".join(packages))
    return place


def stand_in(*modules: str) -> None:
    """Let a tool import modules that it does not use here; torchvision, for one, does not load beside every torch."""
    for name in modules:
        sys.modules.setdefault(name, MagicMock(name=name))
