"""The native coder and numpy: the same bytes, values and refusals; without a compiler everything works."""

import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_muws import load_compressed, save_compressed
from lightning_muws.artifact import native, rans, stretches
from lightning_muws.artifact.codecs import decode, encode
from lightning_muws.artifact.entropy import count
from lightning_muws.artifact.streams import block_kinds, join, join_planes, planes, split
from lightning_muws.errors import FormatError, SettingError
from tests.artifact.test_codecs import skewed, streams
from tests.artifact.test_streams import matrices
from tests.support.coder import coder, levels
from tests.support.strategies import same_bytes, state_dicts

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.muws"))
SOURCE = Path(native.__file__).parent / "src" / "coder.h"
needs_coder = pytest.mark.skipif(not levels(), reason="the native coder is not built")
each_level = pytest.mark.parametrize("level", levels())


def same_parts(a, b) -> bool:
    return all(x.dtype == y.dtype and x.shape == y.shape and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@each_level
@given(data=streams(), repeats=st.sampled_from([1, 3, 17]))
def test_rans_makes_the_same_bytes_of_a_stream(level, data, repeats):
    data = np.resize(data, repeats * len(data))  # of more lanes than a vector has, and of a number that is no multiple
    found = rans._stretches(data)[0]
    with coder("none"):
        wanted = rans._encode(data, found)
        assert np.array_equal(rans.decode(wanted, len(data)), data)
    with coder(level):
        assert rans._encode(data, found) == wanted
        assert np.array_equal(rans.decode(wanted, len(data)), data)


@each_level
@given(data=streams(), seed=st.integers(0, 10**6))
def test_rans_reads_or_refuses_a_changed_stream_as_numpy_does(level, data, seed):
    random, lied = np.random.default_rng(seed), bytearray(rans._encode(data, rans._stretches(data)[0]))
    for _ in range(random.integers(1, 4)):
        match random.integers(4):
            case 0:
                lied[random.integers(len(lied))] = random.integers(256)
            case 1:
                lied[random.integers(min(20, len(lied)))] ^= 1 << random.integers(8)
            case 2:
                del lied[-2 * random.integers(1, 5) :]
            case 3:
                lied += bytes(2 * random.integers(1, 5))
        lied = lied or bytearray(1)
    found = []
    for name in ("none", level):
        with coder(name):
            try:
                found.append(rans.decode(bytes(lied), len(data)).tobytes())
            except FormatError as error:
                found.append(str(error))
    assert found[0] == found[1]


@needs_coder
def test_a_stream_with_many_tables_and_an_odd_number_of_lanes():
    data = np.concatenate([skewed(seed, 9001, 0.2 + seed / 20, 40 * seed + 20) for seed in range(6)])
    coded = set()
    for name in ("none", *levels()):
        with coder(name):
            coded.add(rans.encode(data, 1e9))
            assert len(rans._stretches(data)[0]) > 3
            assert np.array_equal(rans.decode(rans.encode(data, 1e9), len(data)), data)
    assert len(coded) == 1
    assert rans.n_lanes(len(data)) % 16


@needs_coder
@given(streams(), st.integers(300, 5000))
def test_counts_and_tables_are_those_of_numpy(data, stretch):
    found = []
    for name in ("none", "portable"):
        with coder(name):
            counts = stretches.counts(data, stretch)
            assert count(data).tolist() == counts.sum(0).tolist() == np.bincount(data, minlength=256).tolist()
            firsts, tables, total = stretches.merged(counts.copy())
            found.append((counts.tolist(), firsts.tolist(), tables.tolist(), total))
    assert found[0] == found[1]


@given(st.lists(st.integers(0, 1 << 26), min_size=256, max_size=256).filter(any))
def test_what_a_table_costs_is_the_entropy_and_the_table(counts):
    c = np.array(counts, np.int64)
    p = c[c > 0] / c.sum()
    there = np.flatnonzero(c)
    wanted = -(c[c > 0] * np.log2(p)).sum() + 9.6 * (there[-1] - there[0] + 1) + 32
    assert int(stretches.costs(c)) / (1 << stretches.POINT) == pytest.approx(wanted, rel=1e-6, abs=1e-3)


@needs_coder
@given(st.binary(max_size=1000), st.integers(0, 70))
def test_the_checksum_is_that_of_zlib(data, times):
    data = data * times + data[:times]
    assert native.crc32(data) == zlib.crc32(data)


@needs_coder
@given(st.integers(0, 10**6), st.integers(0, 3000), st.sampled_from(["u1", "u2", "u4", "u8"]))
def test_planes_are_those_of_numpy(seed, n, dtype):
    values = np.random.default_rng(seed).integers(0, 256, n * np.dtype(dtype).itemsize, np.uint8).view(dtype)
    found = []
    for name in ("none", "portable"):
        with coder(name):
            found.append([plane.tolist() for plane in planes(values)])
            again = np.empty_like(values)
            join_planes(planes(values), again)
            assert np.array_equal(again, values)
    assert found[0] == found[1]


@needs_coder
@given(matrices(), st.booleans())
def test_blocks_are_those_of_numpy(given_, is_view):
    u, shape = given_
    u = np.concatenate([u, u], axis=1)[:, : u.shape[1]] if is_view else u  # a row is longer than the matrix is wide
    found = []
    for name in ("none", "portable"):
        with coder(name):
            parts = split(u, shape)
            assert np.array_equal(block_kinds(u, shape).reshape(-1), parts.kinds)
            out = np.zeros((len(u), 2 * u.shape[1]), u.dtype)[:, : u.shape[1]] if is_view else np.empty_like(u)
            join(parts, out, shape)
            assert np.array_equal(out, u)
            found.append(parts)
    assert same_parts(*found)


@needs_coder
def test_lists_that_do_not_fit_the_kinds_are_refused():
    out = np.zeros((2, 4), np.uint32)
    one, four, none = np.ones(1, np.uint32), np.ones(4, np.uint32), np.zeros(0, np.uint32)
    minus, positive_and_free = np.zeros(0, np.uint8), np.array([3, 0], np.uint8)
    native.join_blocks(positive_and_free, minus, one, four, out, (2, 2))
    for magnitudes, free in ((none, four), (one, four[:3]), (one, np.ones(8, np.uint32))):
        with pytest.raises(RuntimeError, match="refused"):
            native.join_blocks(positive_and_free, minus, magnitudes, free, out, (2, 2))
    with pytest.raises(RuntimeError, match="refused"):
        native.join_blocks(np.array([3, 5], np.uint8), minus, one, four, out, (2, 2))
    with pytest.raises(ValueError, match="kinds"):
        native.join_blocks(positive_and_free[:1], minus, one, four, out, (2, 2))
    with pytest.raises(ValueError, match="whole blocks"):
        native.split_blocks(out, (2, 3))
    with pytest.raises(ValueError, match="planes"):
        native.join_planes([np.zeros(3, np.uint8)], one)
    with pytest.raises(RuntimeError, match="refused"):
        native.rans_encode(np.zeros(256, np.int64), np.zeros((1, 1), np.uint8), np.full(1, rans.LOW, np.uint32))


@each_level
@settings(max_examples=25)
@given(state=state_dicts(), options=st.sampled_from([{}, {"max_error": 0.01}, {"value_dtype": "float16"}]))
def test_files_are_equal_byte_for_byte(level, state, options, tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("files"), []
    for name in ("none", level):
        with coder(name):
            save_compressed(state, folder / name, **options)
            found.append(load_compressed(folder / name))
    assert (folder / "none").read_bytes() == (folder / level).read_bytes()
    assert found[0].keys() == found[1].keys()
    assert all(same_bytes(x, y) for x, y in zip(found[0].values(), found[1].values(), strict=True))


@pytest.mark.parametrize("name", ["none", *levels()])
@pytest.mark.parametrize("path", GOLDEN, ids=[path.stem for path in GOLDEN])
def test_golden_files_load(name, path):
    with coder(name):
        found = load_compressed(path)
    wanted = torch.load(path.with_suffix(".pt"), weights_only=True)
    assert found.keys() == wanted.keys()
    assert all(same_bytes(found[key], wanted[key]) for key in wanted)


def test_without_the_library_numpy_does_it_all(tmp_path, monkeypatch):
    for content in (None, b"no library"):
        if content:
            (tmp_path / "coder.so").write_bytes(content)
        monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
        assert native.library.__wrapped__() is None
    monkeypatch.setattr(native, "_best", lambda: None)
    assert native.level() is None
    data = skewed(0, 50_000)
    name, coded = encode(data)
    assert name == "rans"
    assert np.array_equal(decode(name, coded, len(data)), data)


@needs_coder
def test_a_level_is_chosen_by_name_and_a_wrong_one_is_refused():
    for i, name in enumerate(levels()):
        with coder(name):
            assert native.level() == i
    with coder("none"):
        assert native.level() is None
    with coder("sse"), pytest.raises(SettingError, match=r"MUWS_CODER='sse'.*portable.*none"):
        native.level()


@pytest.mark.skipif(not SOURCE.is_file(), reason="the source of the coder is not installed")
@pytest.mark.parametrize("kind", [native._Costs, native._Blocks, native._Parts])
def test_structures_have_the_fields_of_the_header(kind):
    body = re.search(rf"struct Muws{kind.__name__.strip('_')} {{(.*?)}};", SOURCE.read_text(), re.DOTALL)[1]
    lines = [re.sub(r"^\s*(const )?\w+ ", "", line) for line in body.split(";") if line.strip()]
    names = [name.strip(" *\n") for line in lines for name in line.split(",")]
    assert names == [name for name, _ in kind._fields_]
    assert f"MUWS_CODER_VERSION {native.VERSION}" in SOURCE.read_text()
