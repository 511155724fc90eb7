"""Filters by hand, streams in parts, and what is refused of both."""

import zlib

import numpy as np
import pytest
import torch

from lightning_muws import inspect_compressed, load_compressed, save_compressed, verify_compressed
from lightning_muws.artifact import parts, rans
from lightning_muws.artifact.codecs import decode, encode
from lightning_muws.artifact.filters import FILTERS
from lightning_muws.artifact.parts import MAX_PARTS, PARTS, Rows
from lightning_muws.artifact.varint import Cursor, number
from lightning_muws.errors import FormatError
from tests.support import format_reader
from tests.support.strategies import raw_bytes, same_bytes


def of(*values: int) -> np.ndarray:
    return np.array(values, np.uint8)


@pytest.mark.parametrize(
    ("name", "numbers", "filtered", "data"),
    [
        ("repeat", (5, 2, 3), of(1, 2, 3, 4), of(1, 1, 1, 2, 2, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4)),
        ("repeat", (2, 1, 1), of(1, 2, 3, 4), of(1, 2, 3, 4)),
        ("repeat", (1, 3, 1), of(7, 8), of(7, 7, 7, 8)),
        ("xor", (2,), of(1, 0, 1, 3, 0), of(1, 0, 0, 3, 0)),
        ("delta", (), of(1, 2, 255), of(1, 3, 2)),
        ("bits", (), of(5, 1), of(1, 0, 1, 0, 0, 0, 0, 0, 1)),
    ],
)
def test_filters_by_hand(name, numbers, filtered, data):
    one = FILTERS[name]
    assert one.length(len(data), numbers) == len(filtered)
    assert one.undo(filtered, len(data), numbers).tolist() == data.tolist()
    assert format_reader.unfilter(name, filtered.tolist(), len(data), list(numbers)) == data.tolist()


@pytest.mark.parametrize("lag", [1, 63, 64, 257, 9_999])
def test_xor_is_undone_at_any_distance(lag):
    data = np.random.default_rng(lag).integers(0, 256, 10_000, np.uint8)
    filtered = data.copy()
    filtered[lag:] ^= data[:-lag]
    assert np.array_equal(FILTERS["xor"].undo(filtered, len(data), (lag,)), data)


@pytest.mark.parametrize(
    ("name", "coded", "n", "says"),
    [
        ("repeat-raw", bytes([3, 1, 1, 0]), 4, "4 bytes cannot repeat 1 rows of 3 and 1 columns"),
        ("repeat-raw", bytes([0, 1, 1, 0]), 4, "cannot repeat 1 rows of 0"),
        ("repeat-raw", bytes([2, 3, 1, 0]), 4, "cannot repeat 3 rows of 2"),
        ("repeat-raw", bytes([2, 0, 1, 0]), 4, "cannot repeat 0 rows"),
        ("repeat-raw", bytes([2, 1, 3, 0]), 4, "and 3 columns"),
        ("repeat-raw", bytes([2, 1, 2, 0]), 4, "holds 1 bytes, 2 are needed"),
        ("repeat-raw", bytes([2, 1]), 4, "ends within the numbers of repeat-raw"),
        ("xor-raw", bytes([0, 1, 2]), 2, "0 places before"),
        ("xor-raw", bytes([2, 1, 2]), 2, "2 places before"),
        ("bits-raw", bytes([4]), 2, "followed by others than zeros"),
        ("bits-xor-raw", bytes([1, 4]), 2, "coder 'bits-xor-raw' is not known"),
        ("xor-xor-raw", bytes([1, 1, 4]), 2, "is not known"),
        ("-raw", bytes([4]), 1, "is not known"),
        ("delta-", bytes([4]), 1, "is not known"),
        ("delta-parts", bytes([4]), 1, "is not known"),
        ("zlib2", bytes([4]), 1, "is not known"),
    ],
)
def test_refused(name, coded, n, says):
    with pytest.raises(FormatError, match=says):
        decode(name, coded, n)


# ---- parts


def mixed() -> dict[str, torch.Tensor]:
    """Return counters, masks and indices in turns, as networks have them."""
    ones = torch.ones(96, 96, dtype=torch.bool)
    return {
        "bn.num_batches_tracked": torch.tensor(7),
        "mask": ones.tril(),
        "bn2.num_batches_tracked": torch.tensor(9),
        "ids": torch.arange(700),
        "window": ones.tril().triu(-9),
        "random": torch.randint(0, 256, (5000,), generator=torch.Generator().manual_seed(0)).to(torch.uint8),
        "last": torch.tensor([1, 2], dtype=torch.int16),
    }


def test_masks_and_indices_are_small_whatever_lies_beside_them(tmp_path):
    state = mixed()
    report = save_compressed(state, tmp_path / "m.muws")
    assert [(s.name, s.coder) for s in report.streams] == [("other", "parts")]
    assert report.streams[0].n_bytes < 5000 + 350
    assert all(same_bytes(x, state[name]) for name, x in load_compressed(tmp_path / "m.muws").items())
    assert all(found[2] == raw_bytes(state[k]) for k, found in format_reader.read(tmp_path / "m.muws").items())
    assert verify_compressed(tmp_path / "m.muws").version == "1.1"


def test_tensors_alike_stay_together(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {f"{i}": torch.randint(0, 9, (90, 90), generator=generator).to(torch.uint8) for i in range(4)}
    save_compressed(state, tmp_path / "m.muws")
    assert inspect_compressed(tmp_path / "m.muws").coders == {"other": "rans"}


def test_a_thousand_masks_have_no_more_parts_than_a_reader_allows():
    generator = np.random.default_rng(0)
    masks = [generator.integers(0, 256, 65, np.uint8).repeat(32) for _ in range(1500)]
    data = np.concatenate(masks)
    name, coded = parts.encode(data, [Rows(65 * 32, 65 * 32)] * len(masks))
    assert name == PARTS
    assert Cursor(coded).number() <= MAX_PARTS
    assert np.array_equal(parts.decode(name, coded, len(data)), data)


RAW = bytes([3]) + b"raw"


@pytest.mark.parametrize(
    ("coded", "n", "says"),
    [
        (b"", 9, "ends within the head of its parts"),
        (bytes([0]), 9, "of 9 bytes has 0 parts, 1 to 1 are allowed"),
        (bytes([2, 5]) + RAW + bytes([5]) + RAW + bytes([4]) + bytes(9), 9, "has 2 parts, 1 to 1"),
        (number(1025) + bytes(9999), 1 << 21, "has 1025 parts, 1 to 1024"),
        (bytes([2, 0]) + RAW + bytes([0]) + RAW + number(2000) + bytes(2000), 2000, "are not for its 2000 bytes"),
        (bytes([2]) + number(2000) + RAW + number(2000) + bytes(2000), 2000, "are not for its 2000 bytes"),
        (bytes([1]) + RAW + bytes([8]) + bytes(9), 9, "holds 8 bytes, 9 are needed"),
        (bytes([1]) + RAW + bytes([9]) + bytes(8), 9, "ends within the head of its parts"),
        (bytes([1]) + RAW + bytes([9]) + bytes(10), 9, "goes on after its last part"),
        (bytes([1, 5]) + b"parts" + bytes([9]) + bytes(9), 9, "coder 'parts' is not known"),
        (bytes([1, 5]) + b"m\xffgic" + bytes([9]) + bytes(9), 9, "coder 'm.gic' is not known"),
        (bytes([1, 4]) + b"rans" + bytes([9]) + bytes(9), 9, "a part of 9 bytes is coded by rans"),
    ],
)
def test_parts_that_are_refused(coded, n, says):
    with pytest.raises(FormatError, match=says):
        parts.decode(PARTS, coded, n)


def test_small_parts_are_not_decoded_symbol_by_symbol(monkeypatch):
    """Reading takes time in proportion to bytes: rans is slow where it is short, and a file may have many parts."""
    data = (np.random.default_rng(0).random(30_000) < 0.1).astype(np.uint8) * 7
    name, coded = parts.encode(np.concatenate([data, data + 1, data]), [Rows(30_000, 0)] * 3)
    monkeypatch.setattr(rans, "_decode_symbols", None)
    monkeypatch.setenv("MUWS_CODER", "none")
    if name == PARTS:
        parts.decode(name, coded, 90_000)
    with pytest.raises(FormatError, match="which only parts of 40960 bytes and more may be"):
        parts.decode(PARTS, bytes([1, 4]) + b"rans" + number(9) + bytes(9), 30_000)


def test_a_zlib_bomb_in_a_part_is_refused():
    bomb = zlib.compress(bytes(1 << 24), 9)
    with pytest.raises(FormatError, match="does not hold the 9 bytes"):
        parts.decode(PARTS, bytes([1, 4]) + b"zlib" + number(len(bomb)) + bomb, 9)


def test_a_filter_that_does_not_pay_is_not_used():
    data = np.random.default_rng(0).integers(0, 256, 4096, np.uint8)
    assert encode(data, 64)[0] == "raw"


@pytest.mark.parametrize("n", [1, 2, 3, 20])
@pytest.mark.parametrize("row", [1, 2, 19, 20, 21, 1000])
def test_a_piece_may_be_shorter_than_a_row_of_its_tensor(n, row):
    data = np.arange(n, dtype=np.uint8) % 2
    for least_gain in (-1000, 0):
        name, coded = encode(data, row, least_gain)
        assert np.array_equal(decode(name, coded, n), data)
