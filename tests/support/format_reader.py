"""Reads `.muws` files in plain Python and numpy, written from docs/format.md alone: slow, trusting, independent."""

import hashlib
import json
import math
import zlib
from pathlib import Path

import numpy as np

WIDTH = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "grid": 2, "palette": 2}
BYTES = ("int8", "uint8", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
WIDTH |= dict.fromkeys(BYTES, 1)
ITEM = {"bool": 1, "complex32": 4, "complex64": 8, "complex128": 16}


def read(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return dtype, shape and bytes of each tensor."""
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    about = header.pop("__metadata__")
    coded = {k: data[8 + n + v["data_offsets"][0] : 8 + n + v["data_offsets"][1]] for k, v in header.items()}
    raw = coded["manifest"]
    if len(raw) != int(about["manifest_bytes"]):
        raw = zlib.decompress(raw)
    assert hashlib.sha256(raw).hexdigest() == about["manifest_sha256"]
    manifest = json.loads(raw)
    units = [[] for _ in manifest["tensors"]]
    at, unit = 0, 0
    for i, chunk in enumerate(manifest["chunks"]):
        last, stop = chunk["until"]
        pieces = []
        while (at, unit) < (last, stop):
            entry = manifest["tensors"][at]
            end = stop if at == last else n_units(entry)
            if "same_as" not in entry and end > unit:
                pieces.append((at, entry, end - unit))
            at, unit = (at, end) if at == last else (at + 1, 0)
        streams = {}
        for name, (coder, crc) in chunk["streams"].items():
            assert zlib.crc32(coded[f"c{i}.{name}"]) == crc
            streams[name] = (coder, coded[f"c{i}.{name}"])
        for index, values in read_chunk(pieces, streams):
            units[index] += values
    return {e["name"]: finish(e, units, manifest["tensors"]) for e in manifest["tensors"]}


def item(dtype: str) -> int:
    if dtype in WIDTH:
        return WIDTH[dtype]
    return ITEM.get(dtype) or int("".join(c for c in dtype.split("_")[0] if c.isdigit())) // 8


def is_other(entry: dict) -> bool:
    return entry["dtype"] not in WIDTH or (entry["dtype"] in BYTES and "block" not in entry)


def matrix(entry: dict) -> tuple[int, int]:
    shape = entry["shape"]
    rows = shape[1] * entry.get("groups", 1) if entry.get("out_axis") else shape[0]
    return rows, math.prod(shape) // rows


def n_units(entry: dict) -> int:
    return matrix(entry)[0] if "block" in entry else math.prod(entry["shape"])


def read_chunk(pieces, streams):
    def stream(name: str, n: int) -> list[int]:
        return decode(*streams[name], n) if name in streams else [0] * n

    def blocks(entry, rows):
        (r, c), (_, cols) = entry["block"], matrix(entry)
        return (rows // r) * (cols // c)

    n_blocks = sum(blocks(e, rows) for _, e, rows in pieces if "block" in e)
    packed = stream("kinds", -(-n_blocks // 3))
    kinds = [k for byte in packed for k in (byte % 5, byte // 5 % 5, byte // 25)][:n_blocks]
    n_signs, needed, at = 0, {}, 0
    for _, e, rows in pieces:
        if is_other(e):
            continue
        stored = e.get("stored", e["dtype"])
        if "block" not in e:
            needed["free", stored] = needed.get(("free", stored), 0) + rows
            continue
        size, n = math.prod(e["block"]), blocks(e, rows)
        mine, at = kinds[at : at + n], at + n
        n_signs += mine.count(1) * size
        free = rows * matrix(e)[1] - n * size + mine.count(0) * size
        needed["free", stored] = needed.get(("free", stored), 0) + free
        unified = n - mine.count(0) - mine.count(2)
        needed["magnitudes", stored] = needed.get(("magnitudes", stored), 0) + unified
    signs = iter([byte >> bit & 1 for byte in stream("signs", -(-n_signs // 8)) for bit in range(8)])
    values = {}
    for (role, stored), n in needed.items():
        planes = [stream(f"{role}.{stored}.{i}", n) for i in range(WIDTH[stored])]
        top = 8 * WIDTH[stored] - 1
        turned = [sum(plane[k] << 8 * i for i, plane in enumerate(planes)) for k in range(n)]
        values[role, stored] = iter([t >> 1 | (t & 1) << top for t in turned])
    n_other = sum(rows * item(e["dtype"]) for _, e, rows in pieces if is_other(e))
    other, kinds = iter(stream("other", n_other)), iter(kinds)
    for index, e, rows in pieces:
        if is_other(e):
            planes = [[next(other) for _ in range(rows)] for _ in range(item(e["dtype"]))]
            yield index, [bytes(column) for column in zip(*planes, strict=True)]
            continue
        stored = e.get("stored", e["dtype"])
        if "block" not in e:
            yield index, [next(values["free", stored]) for _ in range(rows)]
            continue
        yield index, read_blocks(e, rows, stored, kinds, signs, values)


def read_blocks(e, rows, stored, kinds, signs, values):
    (r, c), (_, cols), sign = e["block"], matrix(e), 1 << 8 * WIDTH[stored] - 1
    out = [[0] * cols for _ in range(rows)]
    for down in range(rows // r):
        for across in range(cols // c):
            kind = next(kinds)
            magnitude = next(values["magnitudes", stored]) if kind in (1, 3, 4) else 0
            for i in range(down * r, down * r + r):
                for j in range(across * c, across * c + c):
                    if kind == 0:
                        out[i][j] = next(values["free", stored])
                    else:
                        out[i][j] = magnitude | (sign if kind == 4 or (kind == 1 and next(signs)) else 0)
    for i in range(rows // r * r, rows):
        for j in range(cols):
            out[i][j] = next(values["free", stored])
    for i in range(rows // r * r):
        for j in range(cols // c * c, cols):
            out[i][j] = next(values["free", stored])
    return out


def decode(coder: str, coded: bytes, n: int) -> list[int]:
    if coder == "parts":
        return parts(coded, n)
    *filters, inner = coder.split("-")
    at, undo = 0, []
    for name in filters:
        numbers = []
        for _ in range({"repeat": 3, "xor": 1}.get(name, 0)):
            value, at = number(coded, at)
            numbers.append(value)
        undo.append((name, n, numbers))
        if name == "repeat":
            row, rows, cols = numbers
            n = -(-(n // row) // rows) * -(-row // cols)
        elif name == "bits":
            n = -(-n // 8)
    coded = coded[at:]
    data = {
        "raw": lambda: list(coded),
        "zlib": lambda: list(zlib.decompress(coded)),
        "zlib2": lambda: list(zlib.decompress(zlib.decompress(coded))),
        "rans": lambda: rans(coded, n),
    }
    found = data[inner]()
    assert len(found) == n
    for name, n, numbers in reversed(undo):
        found = unfilter(name, found, n, numbers)
        assert len(found) == n
    return found


def unfilter(name: str, found: list[int], n: int, numbers: list[int]) -> list[int]:
    if name == "repeat":
        row, rows, cols = numbers
        across = -(-row // cols)
        return [found[i // rows * across + j // cols] for i in range(n // row) for j in range(row)]
    if name == "bits":
        return [byte >> bit & 1 for byte in found for bit in range(8)][:n]
    out = []
    for k, byte in enumerate(found):
        lag = numbers[0] if name == "xor" else 1
        before = out[k - lag] if k >= lag else 0
        out.append(byte ^ before if name == "xor" else (byte + before) % 256)
    return out


def number(coded: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte, at = coded[at], at + 1
        value, shift = value + ((byte & 127) << shift), shift + 7
        if byte < 128:
            return value, at


def parts(coded: bytes, n: int) -> list[int]:
    n_parts, at = number(coded, 0)
    lengths = []
    for _ in range(n_parts - 1):
        length, at = number(coded, at)
        lengths.append(length)
    lengths.append(n - sum(lengths))
    coders = []
    for _ in range(n_parts):
        name = coded[at + 1 : at + 1 + coded[at]].decode()
        n_coded, at = number(coded, at + 1 + coded[at])
        coders.append((name, n_coded))
    out = []
    for (name, n_coded), length in zip(coders, lengths, strict=True):
        out += decode(name, coded[at : at + n_coded], length)
        at += n_coded
    assert at == len(coded)
    return out


def rans(coded: bytes, n: int) -> list[int]:
    at = 0

    def next_number() -> int:
        nonlocal at
        value, at = number(coded, at)
        return value

    lanes = max(1, min(8192, n // 2048))
    steps = -(-n // lanes)
    n_tables = next_number()
    lengths = [next_number() for _ in range(n_tables - 1)]
    lengths.append(steps - sum(lengths))
    tables = []
    for _ in range(n_tables):
        first, last = coded[at], coded[at + 1]
        at += 2
        f = {s: next_number() for s in range(first, last + 1)}
        assert sum(f.values()) == 4096
        tables.append([(s, f[s], sum(f[q] for q in range(first, s))) for s in f for _ in range(f[s])])
    x = [int.from_bytes(coded[at + 4 * i : at + 4 * i + 4], "little") for i in range(lanes)]
    at += 4 * lanes
    out = []
    for table, length in zip(tables, lengths, strict=True):
        for _ in range(length):
            for lane in range(lanes):
                s, frequency, below = table[x[lane] % 4096]
                out.append(s)
                x[lane] = frequency * (x[lane] // 4096) + x[lane] % 4096 - below
            for lane in range(lanes):
                if x[lane] < 65536:
                    x[lane] = x[lane] * 65536 + int.from_bytes(coded[at : at + 2], "little")
                    at += 2
    assert at == len(coded)
    assert x == [65536] * lanes
    return out[:n]


def finish(entry: dict, units: list, entries: list) -> tuple[str, tuple[int, ...], bytes]:
    index = entry.get("same_as", next(i for i, e in enumerate(entries) if e is entry))
    stored = entries[index]
    dtype, shape, mine = entry["dtype"], tuple(entry["shape"]), units[index]
    if is_other(stored):
        return dtype, shape, b"".join(mine)
    if "block" in stored:
        flat = [u for row in mine for u in row]
        if stored.get("out_axis"):
            groups = stored.get("groups", 1)
            turned = (groups, shape[1], shape[0] // groups, *shape[2:])
            flat = np.array(flat, object).reshape(turned).swapaxes(1, 2).reshape(-1).tolist()
    else:
        flat = mine
    return dtype, shape, to_bytes(flat, stored, dtype)


def to_bytes(flat: list[int], entry: dict, dtype: str) -> bytes:
    how = entry.get("stored", dtype)
    width = WIDTH[how]
    if how in ("int8", "uint8"):
        zero = 128 if how == "uint8" else 0
        numbers = (-128 if u == 128 else 128 - u if u > 128 else u for u in flat)
        return bytes((number + zero) % 256 for number in numbers)
    if how == dtype:
        return b"".join(u.to_bytes(width, "little") for u in flat)
    if how == "palette":
        size, raw = WIDTH[dtype], bytes.fromhex(entry["palette"])
        table = [0, *(int.from_bytes(raw[i : i + size], "little") for i in range(0, len(raw), size))]
        return b"".join((table[u & 32767] | u >> 15 << 8 * size - 1).to_bytes(size, "little") for u in flat)
    if how == "grid":
        wide = np.float64 if dtype == "float64" else np.float32
        numbers = [wide(u & 32767) * wide(entry["step"]) * (-1 if u >> 15 else 1) for u in flat]
    elif how == "bfloat16":
        numbers = np.array([u << 16 for u in flat], "<u4").view("<f4").tolist()
    else:
        numbers = np.array(flat, f"<u{width}").view(f"<f{width}").tolist()
    if dtype == "bfloat16":
        bits = np.array(numbers, "<f4").view("<u4").astype(np.uint64)
        return (((bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)).astype("<u2")).tobytes()
    return np.array(numbers).astype(f"<f{WIDTH[dtype]}").tobytes()
