"""A plain file of integer codes, as they are or as gaps between nonzero ones, packed by lzma or zstd."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Mapping
from io import BytesIO

import numpy as np
import torch
from torch import Tensor

from contestants.arena import State, Stored

try:
    import zstandard
except ImportError:  # then lzma alone
    zstandard = None

RAW = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]
PACKERS: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    "lzma": (
        lambda data: lzma.compress(data, lzma.FORMAT_RAW, filters=RAW),
        lambda data: lzma.decompress(data, lzma.FORMAT_RAW, filters=RAW),
    ),
}
if zstandard:
    PACKERS["zstd"] = (
        lambda data: zstandard.ZstdCompressor(22).compress(data),
        lambda data: zstandard.ZstdDecompressor().decompress(data),
    )
FILLER = 255  # a gap that leads to no value


def smallest(state: State, steps: Mapping[str, float]) -> Stored:
    """Return the smallest file of codes of a network whose tensors are whole multiples of their steps.

    Args:
        state: All tensors; those without a step are stored as they are.
        steps: By name; ``state[name] / steps[name]`` rounds to -128 to 127.
    """
    files = []
    for packer in PACKERS:
        for layout in ("codes", "gaps"):
            data = written(state, steps, packer, layout)
            files.append(Stored(len(data), f"{layout}, {packer}", read(data)))
    return min(files, key=lambda file: file.n_bytes)


def written(state: State, steps: Mapping[str, float], packer: str, layout: str) -> bytes:
    """Return a file: a head in JSON, then the streams of all tensors, packed each by itself."""
    head, streams = [], {"codes": [], "gaps": [], "exact": []}
    for name, x in state.items():
        if name in steps:
            codes = torch.round(x.double() / steps[name]).to(torch.int8).numpy().reshape(-1)
            if layout == "gaps":
                gaps, codes = with_gaps(codes)
                streams["gaps"].append(gaps.tobytes())
            streams["codes"].append(codes.tobytes())
            head.append([name, list(x.shape), steps[name], len(codes)])
        else:
            streams["exact"].append(x.contiguous().numpy().tobytes())
            head.append([name, list(x.shape), str(x.dtype).removeprefix("torch."), 0])
    pack = PACKERS[packer][0]
    packed = [pack(b"".join(parts)) if parts else b"" for parts in streams.values()]
    text = pack(json.dumps([packer, layout, head, [len(part) for part in packed]], separators=(",", ":")).encode())
    return b"".join((bytes([list(PACKERS).index(packer)]), len(text).to_bytes(4, "little"), text, *packed))


def read(data: bytes) -> dict[str, Tensor]:
    """Return the tensors of a file that `written` made."""
    unpack = list(PACKERS.values())[data[0]][1]
    end = 5 + int.from_bytes(data[1:5], "little")
    _, layout, head, lengths = json.loads(unpack(data[5:end]))
    streams = []
    for length in lengths:
        streams.append(BytesIO(unpack(data[end : end + length]) if length else b""))
        end += length
    codes, gaps, exact = streams
    state = {}
    for name, shape, kind, n_codes in head:
        n = int(np.prod(shape))
        if isinstance(kind, str):
            dtype = getattr(torch, kind)
            x = torch.frombuffer(bytearray(exact.read(n * dtype.itemsize)), dtype=dtype)
        else:
            found = np.frombuffer(codes.read(n_codes), np.int8)
            if layout == "gaps":
                found = without_gaps(np.frombuffer(gaps.read(n_codes), np.uint8), found, n)
            x = (torch.from_numpy(found.astype(np.float64)) * kind).float()
        state[name] = x.view(shape)
    return state


def with_gaps(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how many zeros stand before each nonzero code, and these codes (Han et al. 2016, section 2).

    A gap of 255 zeros or more takes fillers, each with the code 0.

    Example:
        >>> [x.tolist() for x in with_gaps(np.array([0, 0, 3, 0, -1, 0], np.int8))]
        [[2, 1], [3, -1]]
    """
    at = np.flatnonzero(codes)
    gaps = np.diff(at, prepend=-1) - 1
    fillers = gaps // FILLER
    places = np.arange(len(at)) + np.cumsum(fillers)
    n = len(at) + int(fillers.sum())
    all_gaps, values = np.full(n, FILLER, np.uint8), np.zeros(n, np.int8)
    all_gaps[places], values[places] = gaps % FILLER, codes[at]
    return all_gaps, values


def without_gaps(gaps: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """Return the ``n`` codes that `with_gaps` was given."""
    is_filler = values == 0
    places = np.cumsum(gaps.astype(np.int64) + ~is_filler)[~is_filler] - 1
    codes = np.zeros(n, np.int8)
    codes[places] = values[~is_filler]
    return codes
