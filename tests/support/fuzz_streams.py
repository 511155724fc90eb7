"""Lies with every checksum right, in many random ways: refused or loaded, at once, in little memory.

Run: python -m tests.support.fuzz_streams 10000 [first seed]
"""

import collections
import copy
import json
import random
import resource
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import torch

from lightning_muws import load_compressed
from lightning_muws.artifact.codecs import CODERS, INNER
from lightning_muws.artifact.filters import FILTERS
from lightning_muws.errors import FormatError
from tests.support.forge import dump, newer_model, put_together, small_model, take_apart

MAX_BYTES = 1 << 20  # that tensors may take
CLEAR = Path("/proc/self/clear_refs")
SECONDS, MEMORY = 1.0, 64 << 20  # that a file may take, beyond MAX_BYTES
NUMBERS = (0, 1, 2, 3, 7, 63, 64, 127, 128, 255, 1 << 10, 1 << 13, 1 << 20, 1 << 28, 1 << 31, 1 << 59, 1 << 70)
VALUES = (
    None,
    True,
    -1,
    *NUMBERS,
    0.5,
    1e300,
    "",
    "float16",
    "grid",
    "palette",
    "int8",
    "bool",
    "00" * 8,
    [],
    [0, 0],
    {},
)
VERSIONS = ("1.0", "1.1", "1.2", "01.0", "1.00", "2.0", "0812", "+1", "1e3", "\u0661")  # and lengths of manifests
Parts = tuple[Any, dict[str, bytes]]


def places(value: Any, found: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to each value in a manifest."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found, *(place for key, one in inner for place in places(one, (*found, key)))]


def coder(r: random.Random) -> str:
    """Return the name of a coder, mostly one that there is."""
    filters = [name for name in FILTERS if r.random() < 0.4]
    if r.random() < 0.05:
        r.shuffle(filters)
    return r.choice(["-".join((*filters, r.choice([*INNER]))), *CODERS, "parts"])


def bent(data: bytes, r: random.Random) -> bytes:
    """Return bytes with a few of them changed, left out or added."""
    found = bytearray(data or b"\0")
    for _ in range(r.choice((1, 1, 2, 5))):
        at = r.choice((r.randrange(len(found)), r.randrange(min(12, len(found)))))
        match r.randrange(6):
            case 0 | 1:
                found[at] = r.choice((0, 1, 2, 127, 128, 255, r.randrange(256)))
            case 2:
                found[at] ^= 1 << r.randrange(8)
            case 3:
                del found[at : at + r.choice((1, 1, 4, len(found)))]
            case 4:
                found[at:at] = r.choice((b"\xff\xff\xff\x7f", b"\x80\x80\x01", r.randbytes(r.randrange(1, 9))))
            case 5:
                found[at:at] = found[: r.randrange(1, 64)]
        found = found or bytearray(1)
    return bytes(found)


def lie(models: list[Parts], r: random.Random) -> bytes:
    """Return a file whose streams, coders or manifest were changed."""
    good, streams = r.choice(models)
    manifest, streams = copy.deepcopy(good), dict(streams)
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        chunk = r.choice(manifest["chunks"])["streams"] if manifest.get("chunks") else {}
        names = [name for name in streams if name.partition(".")[2] in chunk]
        if names and r.random() < 0.75:
            name = r.choice(names)
            if r.random() < 0.3:
                chunk[name.partition(".")[2]] = [coder(r), 0]
            if r.random() < 0.1:
                streams[name] = zlib.compress(bytes(r.choice(NUMBERS[:13])), 9)
            elif r.random() < 0.85:
                streams[name] = bent(streams[name], r)
        else:
            change(manifest, r)
            break  # what is in the manifest now may be anything
    for name, stream in streams.items():
        index, _, key = name[1:].partition(".")
        try:
            manifest["chunks"][int(index)]["streams"][key][1] = zlib.crc32(stream)
        except (LookupError, TypeError):
            continue
    return put_together(manifest, streams)


def change(manifest: Any, r: random.Random) -> None:
    """Change or remove one value of a manifest."""
    place = r.choice([place for place in places(manifest) if place])
    owner = manifest
    for key in place[:-1]:
        owner = owner[key]
    if r.random() < 0.2:
        del owner[place[-1]]
    else:
        owner[place[-1]] = copy.deepcopy(r.choice(VALUES))


def lie_in_header(good: bytes, r: random.Random) -> bytes:
    """Return a file with one or two values of its header changed, moved or removed, also into others that are equal."""
    n = 8 + int.from_bytes(good[:8], "little")
    header = json.loads(good[8:n])
    for _ in range(r.choice((1, 1, 2))):
        place = r.choice([place for place in places(header) if place])
        owner = header
        for key in place[:-1]:
            owner = owner[key]
        match r.randrange(4):
            case 0 if type(owner[place[-1]]) is int:
                owner[place[-1]] = r.choice((float, bool, str))(owner[place[-1]])
            case 1 if isinstance(owner, dict):
                owner[place[-1]] = owner.pop(place[-1])
            case 2 if isinstance(owner, dict):
                del owner[place[-1]]
            case _:
                owner[place[-1]] = copy.deepcopy(r.choice((*VALUES, *VERSIONS)))
    raw = dump(header) + b" " * r.randrange(8)
    return len(raw).to_bytes(8, "little") + raw + good[n:]


def peak(*, reset: bool = False) -> int:
    """Return the most bytes that were resident at once; on Linux since the last reset, as a past peak hides others."""
    if not CLEAR.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if reset:
        CLEAR.write_text("5")  # proc(5): resets the peak to what is resident now
    return 1024 * int(CLEAR.with_name("status").read_text().partition("VmHWM:")[2].split()[0])


def fuzz(seeds: range, folder: Path) -> dict[str, Any]:
    """Return how many files were refused, loaded, slow, large in memory, or met with another exception."""
    path, models = folder / "a.muws", []
    for write in (small_model, newer_model, newer_model):
        write(path)
        load_compressed(path)
        models.append(take_apart(path.read_bytes()))
    found: dict[str, Any] = collections.Counter(refused=0, loaded=0, slow=0, large=0, other=0)
    for seed in seeds:
        path.write_bytes(lie(models, random.Random(seed)))  # noqa: S311  no secret
        before, start = peak(reset=True), time.process_time()
        try:
            load_compressed(path, max_bytes=MAX_BYTES)
            found["loaded"] += 1
        except FormatError:
            found["refused"] += 1
        except Exception as error:  # what is counted is that there is none
            found["other"] += 1
            found[f"{seed}: {error!r}"] += 1
        seconds, n_bytes = time.process_time() - start, peak() - before
        for is_too_much, key in ((seconds > SECONDS, "slow"), (n_bytes > MAX_BYTES + MEMORY, "large")):
            if is_too_much:
                found[key] += 1
                found[f"{seed}: {seconds:.2f} s, {n_bytes >> 20} MB"] += 1
    return dict(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    n, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as name:
        result = fuzz(range(first, first + n), Path(name))
    sys.stdout.write(f"{result}\n")
    sys.exit(bool(result["slow"] or result["large"] or result["other"]))
