"""Takes `.muws` files apart and puts them together again with other content, every checksum right."""

import hashlib
import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_muws import MicroStructure, save_compressed
from tests.support.strategies import normal

Dump = Callable[[Any], bytes]


def dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def small_model(path: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """Write a file of a few KB that has every kind of stream, and return its state_dict."""
    structure = MicroStructure((2, 4), 0.5, 0.3)
    state = {
        "conv.weight": structure.project(normal(seed, 8, 6, 3, 3, dtype=torch.float32)),
        "conv.bias": normal(seed, 8, dtype=torch.float32),
        "linear.weight": structure.project(normal(seed, 16, 34, dtype=torch.float16)),
        "steps.weight": torch.arange(-64.0, 64.0).view(8, 16) * 0.125,
        "count": torch.tensor(7 + seed),
        "mask": normal(seed, 5) > 0,
    }
    state["tied"] = state["conv.weight"]
    save_compressed(state, path)
    return state


def newer_model(path: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """Write a file of a few KB that uses all that format 1.1 adds, and return its state_dict."""
    generator = torch.Generator().manual_seed(seed)
    few = normal(seed, 9, dtype=torch.float32)[torch.randint(0, 9, (80, 90), generator=generator)]
    steps = MicroStructure((4, 4), 0.6, 0.3).project(normal(seed, 64, 64)).mul(30).round().clamp(-127, 127)
    kept = torch.rand(24, 24, generator=generator) > 0.5
    state = {
        "few": few,
        "again": few.clone(),
        "q": steps.to(torch.int8),
        "u": steps.add(128).to(torch.uint8),
        "n": torch.tensor(7 + seed),
        "causal": torch.ones(96, 96, dtype=torch.bool).tril(),
        "kept": kept.repeat_interleave(4, 0).repeat_interleave(4, 1),
        "ids": torch.arange(60 + seed)[:, None] - torch.arange(60) + 59,
        "batch": torch.arange(500).repeat(3, 1),
    }
    save_compressed(state, path)
    return state


def take_apart(data: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the manifest and the coded streams."""
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + n])
    header.pop("__metadata__")
    streams = {k: data[8 + n + v["data_offsets"][0] : 8 + n + v["data_offsets"][1]] for k, v in header.items()}
    raw = streams.pop("manifest")
    return json.loads(raw if raw.startswith(b"{") else zlib.decompress(raw)), streams


def put_together(
    manifest: Any,
    streams: dict[str, bytes],
    *,
    version: str | None = None,
    raw: bytes | None = None,
    packed: bytes | None = None,
    spans: Callable[[dict[str, Any]], Any] = lambda spans: spans,
) -> bytes:
    """Return a file with this manifest; or with these bytes of it; or with other spans in the header."""
    raw = dump(manifest) if raw is None else raw
    packed = zlib.compress(raw) if packed is None else packed
    about = {
        "format": "muws",
        "version": version or (manifest.get("version") if isinstance(manifest, dict) else None) or "1.0",
        "manifest_bytes": str(len(raw)),
        "manifest_sha256": hashlib.sha256(raw).hexdigest(),
    }
    body, entries = b"", {}
    for name, stream in [*streams.items(), ("manifest", packed)]:
        entries[name] = {"dtype": "U8", "shape": [len(stream)], "data_offsets": [len(body), len(body) + len(stream)]}
        body += stream
    header = dump({"__metadata__": about, **spans(entries)})
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + body


def corrupt(data: bytes, other: bytes, seed: int) -> bytes:
    """Return the file with a few bits flipped, or cut, or spliced from itself or another, in one of ten ways."""
    r = random.Random(seed)  # noqa: S311  no secret
    a, b = sorted(r.randrange(len(data) + 1) for _ in range(2))
    found = bytearray(data)
    match r.randrange(10):
        case 0 | 1 | 2 | 3:
            for _ in range(r.choice((1, 1, 2, 8))):
                found[r.randrange(len(found))] ^= 1 << r.randrange(8)
        case 4 | 5:
            del found[r.choice((a, b, len(data) - 1, r.randrange(600))) :]
        case 6:
            found[a:b] = b""
        case 7:
            found[a:a] = found[b : b + r.randrange(1, 64)] or b"\0"
        case 8:
            found[a:b] = other[a:b]
        case 9:
            found[a:b] = bytes(b - a)
    return bytes(found)
