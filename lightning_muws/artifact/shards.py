"""Safetensors files, one or several with an index: their tensors are listed first, and read one at a time."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_muws.artifact.manifest import why_too_large
from lightning_muws.errors import SettingError

INDEX = ".safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes; the safetensors library refuses larger ones
DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


@dataclass(frozen=True)
class Span:
    """The bytes of a tensor in a file.

    Args:
        path: The file.
        start: The first byte.
        dtype: The dtype of the tensor.
        shape: Its shape.
    """

    path: Path
    start: int
    dtype: torch.dtype
    shape: torch.Size

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.shape.numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        """Return the tensor, in memory that only it has.

        Raises:
            SettingError: The file became shorter since its header was read.
        """
        if not self.n_bytes:
            return torch.empty(self.shape, dtype=self.dtype)
        with self.path.open("rb") as file:
            file.seek(self.start)
            data = np.fromfile(file, np.uint8, self.n_bytes)
        if len(data) != self.n_bytes:
            raise SettingError(f"{self.path} became shorter while it was read")
        return torch.from_numpy(data).view(self.dtype).reshape(self.shape)


def is_safetensors(path: Path) -> bool:
    """Return whether a path is that of a safetensors file, of an index of several, or a folder that may have them."""
    return path.suffix == ".safetensors" or path.name.endswith(INDEX) or path.is_dir()


def list_tensors(path: Path) -> dict[str, Span]:
    """Return where each tensor of a checkpoint lies, by name, in the order of the files and of their bytes.

    Args:
        path: A safetensors file; or an index such as `model.safetensors.index.json`, whose ``weight_map`` names the
            file of each tensor; or the folder that has one of the two.

    Raises:
        SettingError: A file is damaged or missing, the index is wrong, or a tensor is in two files.
    """
    if path.is_dir():
        path = _in_folder(path)
    return _indexed(path) if path.name.endswith(INDEX) else _listed(path)


def _in_folder(folder: Path) -> Path:
    """Return the index in a folder, or else its only safetensors file."""
    for pattern in (f"*{INDEX}", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(path.name for path in found[:5])
            raise SettingError(f"{folder} has {len(found)} checkpoints ({names}): give the path of one of them")
    raise SettingError(f"{folder} is a folder without a safetensors file or an index of several: give another path")


def _indexed(path: Path) -> dict[str, Span]:
    """Return the tensors of all files that an index names."""
    index = _parse(path.read_bytes(), f"{path} is no index of safetensors files")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise SettingError(f"{path} is no index of safetensors files: it needs a weight_map of names of files")
    found: dict[str, Span] = {}
    for shard in dict.fromkeys(weight_map.values()):
        if Path(shard).name != shard or "\\" in shard or "\0" in shard:
            raise SettingError(f"{path} names the file {shard!r}, only files in its own folder are read")
        if not (path.parent / shard).is_file():
            raise SettingError(f"{path} names {shard}, which is missing: download it or make it again")
        for name, span in _listed(path.parent / shard).items():
            if name in found:
                raise SettingError(f"{name!r} is in two files, {found[name].path.name} and {shard}: remove one of them")
            if weight_map.get(name) != shard:
                raise SettingError(f"{shard} has {name!r}, which {path.name} does not place there: correct the index")
            found[name] = span
    if missing := [name for name in weight_map if name not in found]:
        raise SettingError(f"{path} places {missing[0]!r} in {weight_map[missing[0]]}, which does not have it")
    return found


def _listed(path: Path) -> dict[str, Span]:
    """Return the tensors of one file, after a check that they fill it without gaps."""
    wrong = f"{path} is no safetensors file, or a damaged one"
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(size - 8, MAX_HEADER):
            raise SettingError(f"{wrong}: its header would have {length} bytes of {size}")
        header = _parse(file.read(length), wrong)
    header.pop("__metadata__", None)
    spans = [(*_offsets(name, entry, wrong), name, entry) for name, entry in header.items()]
    found, end = {}, 0
    for start, stop, name, entry in sorted(spans, key=lambda span: span[:2]):
        if start != end or stop < start:
            raise SettingError(f"{wrong}: {name!r} is at byte {start}, where the tensor before it ends at {end}")
        found[name] = _span(path, 8 + length + start, stop - start, name, entry, wrong)
        end = stop
    if 8 + length + end != size:
        raise SettingError(f"{wrong}: its header declares {8 + length + end} bytes, it has {size}")
    return found


def _offsets(name: str, entry: Any, wrong: str) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise SettingError(f"{wrong}: {name!r} has no valid data_offsets")
    return offsets[0], offsets[1]


def _span(path: Path, start: int, n_bytes: int, name: str, entry: dict[str, Any], wrong: str) -> Span:
    shape, dtype = entry.get("shape"), entry.get("dtype")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in shape):
        raise SettingError(f"{wrong}: {name!r} has no valid shape")
    if dtype not in DTYPES or not hasattr(torch, DTYPES[dtype]):
        raise SettingError(f"{path}: {name!r} is of dtype {str(dtype)[:40]!r}, only {', '.join(DTYPES)} can be stored")
    if why := why_too_large(shape):
        raise SettingError(f"{path}: {name!r} {why}")
    kind: torch.dtype = getattr(torch, DTYPES[dtype])
    if math.prod(shape) * kind.itemsize != n_bytes:
        raise SettingError(f"{wrong}: {name!r} of shape {shape} and dtype {dtype} has {n_bytes} bytes")
    return Span(path, start, kind, torch.Size(shape))


def _parse(raw: bytes, wrong: str) -> dict[str, Any]:
    """Return a JSON object without a key twice."""
    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise SettingError(f"{wrong}: {str(error)[:100]}") from None
    if not isinstance(found, dict):
        raise SettingError(f"{wrong}: it should have a JSON object")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key[:40]!r} occurs twice")
        found[key] = value
    return found
