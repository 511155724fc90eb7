"""What a reader does is bounded by the bytes of the tensors and of the file, whatever a file declares."""

import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_muws import inspect_compressed, load_compressed, save_compressed, verify_compressed
from lightning_muws.artifact import rans
from lightning_muws.artifact.chunk import ChunkReader
from lightning_muws.artifact.streams import count_kinds, pack_kinds, unpack_kinds
from lightning_muws.errors import FormatError
from tests.support import many_tables
from tests.support.coder import coder, levels
from tests.support.forge import put_together


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model.muws"


def skewed(n: int) -> np.ndarray:
    return np.minimum(9, np.random.default_rng(0).geometric(0.6, n)).astype(np.uint8)


def file_of_chunks(n_chunks: int, data: np.ndarray) -> bytes:
    """Return a file of one uint8 tensor, cut into chunks of the same bytes."""
    coded = rans._encode(data, rans._stretches(data)[0])
    streams = {f"c{i}.other": coded for i in range(n_chunks)}
    ends = [[0, (i + 1) * len(data)] for i in range(n_chunks - 1)] + [[1, 0]]
    about = {"other": ["rans", zlib.crc32(coded)]}
    tensor = {"name": "w", "dtype": "uint8", "shape": [n_chunks * len(data)]}
    chunks = [{"until": end, "streams": about} for end in ends]
    return put_together({"version": "1.0", "tensors": [tensor], "chunks": chunks}, streams)


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """Return a list that grows by the steps of each stream that numpy decodes step by step."""
    counted, decode_steps = [], rans._decode_steps

    def count(stretches, x, words):
        counted.append(sum(n for n, _ in stretches))
        return decode_steps(stretches, x, words)

    monkeypatch.setattr(rans, "_decode_steps", count)
    monkeypatch.setenv("MUWS_CODER", "none")
    return counted


def test_chunks_of_few_symbols_take_no_steps_over_few_lanes(path, steps):
    data = skewed(4095)
    path.write_bytes(file_of_chunks(200, data))
    loaded = load_compressed(path)["w"]
    assert np.array_equal(loaded.view(200, -1).numpy(), np.tile(data, (200, 1)))
    assert sum(steps) == 0


@pytest.mark.parametrize("n", [1, 4095, 40_000, 41_000, 300_000, 9 << 20])
def test_the_steps_of_a_stream_are_bounded_by_its_bytes(n, steps):
    data = skewed(n)
    rans.decode(rans._encode(data, rans._stretches(data)[0]), n)
    assert sum(steps) <= n / 20 + 1


@given(st.integers(1, 200_000), st.integers(0, 10**6), st.sampled_from([0.02, 0.6, 0.999, 1.0]), st.data())
def test_decoding_symbol_by_symbol_is_decoding_step_by_step(n, seed, p, data):
    symbols = np.minimum(255, np.random.default_rng(seed).geometric(p, n)).astype(np.uint8)
    coded = bytearray(rans._encode(symbols, rans._stretches(symbols)[0]))
    if data.draw(st.booleans()):
        coded[data.draw(st.integers(0, len(coded) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    lanes, head = rans.n_lanes(n), rans._Head(bytes(coded))
    try:
        stretches = head.stretches(-(-n // lanes))
        x = np.frombuffer(bytes(coded), "<u4", lanes, head.at).astype(np.int64)
        words = np.frombuffer(bytes(coded[: len(coded) - (len(coded) - head.at) % 2]), "<u2", -1, head.at + 4 * lanes)
    except (FormatError, ValueError):
        return
    found = [outcome(run, stretches, x, words) for run in (rans._decode_steps, rans._decode_symbols)]
    assert found[0] == found[1]


def outcome(run, stretches, x, words):
    try:
        out, states, read = run(stretches, x.copy(), words)
    except FormatError as error:
        return str(error)
    return out.tobytes(), states.tolist(), read


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("n", [1024, 40_000])
def test_a_table_for_each_step_takes_no_more_time_than_its_bytes_are_worth(level, n, path):
    with coder(level):
        assert min(many_tables.seconds_a_megabyte(path, n, 500_000) for _ in range(3)) < 0.2


def test_a_stream_of_as_many_tables_as_steps_is_read_alike(path):
    found = []
    for level in ("none", *levels()):
        with coder(level):
            many_tables.write(path, 1500, 1)
            found.append(load_compressed(path)["w"].numpy().tobytes())
    assert len(found[0]) == 8 * 1500
    assert len(set(found)) == 1


def test_a_file_of_more_chunks_than_its_tensors_need_is_refused_before_any_is_decoded(path, monkeypatch):
    path.write_bytes(file_of_chunks(4000, skewed(4096)))
    monkeypatch.setattr(ChunkReader, "__init__", None)
    with pytest.raises(FormatError, match="the file has 4000 chunks, at most 1039 are allowed"):
        load_compressed(path)


def test_blocks_of_other_kinds_are_refused_before_memory_is_taken(path, monkeypatch):
    """A tensor of 4 GiB in a file of 1 KB, whose very last block is of another kind than the manifest declares."""
    rows, cols = 1 << 14, 1 << 16
    n = rows // 4 * (cols // 4)
    per_chunk = n // 32
    ends = [[0, (i + 1) * rows // 32] for i in range(31)] + [[1, 0]]
    streams, chunks = {}, [{"until": end, "streams": {}} for end in ends]
    kinds = np.zeros(per_chunk, np.uint8)
    kinds[-1] = 2
    streams["c31.kinds"] = zlib.compress(pack_kinds(kinds).tobytes(), 9)
    chunks[-1]["streams"]["kinds"] = ["zlib", zlib.crc32(streams["c31.kinds"])]
    tensor = {"name": "w", "dtype": "float32", "shape": [rows, cols], "block": [4, 4], "kinds": [n, 0, 0]}
    path.write_bytes(put_together({"version": "1.0", "tensors": [tensor], "chunks": chunks}, streams))
    assert path.stat().st_size < 2000
    monkeypatch.setattr(ChunkReader, "__init__", None)
    for read in (load_compressed, verify_compressed):
        with pytest.raises(FormatError, match=rf"w has blocks \({n - 1}, 0, 1\), the manifest declares \({n}, 0, 0\)"):
            read(path)


@given(st.lists(st.integers(0, 4), max_size=60), st.data())
def test_kinds_are_counted_as_they_are_unpacked(kinds, data):
    packed = pack_kinds(np.array(kinds, np.uint8))
    start, stop = sorted(data.draw(st.integers(0, len(kinds))) for _ in "ab")
    expected = np.bincount(unpack_kinds(packed, len(kinds))[start:stop], minlength=5)
    assert np.array_equal(count_kinds(packed, start, stop), expected)


def test_a_byte_of_no_kinds_is_refused_when_counted():
    with pytest.raises(FormatError, match="200 stands for no kinds"):
        count_kinds(np.array([0, 200, 0], np.uint8), 0, 9)


def lines_run(function, *args) -> int:
    """Return how many lines Python runs in a call, each turn of a loop or a comprehension counted."""
    n = 0

    def trace(frame, event, arg):
        nonlocal n
        n += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*args)
    finally:
        sys.settrace(before)
    return n


@pytest.mark.parametrize("read", [inspect_compressed, verify_compressed])
def test_the_work_on_many_streams_grows_with_their_number(read, path):
    found = []
    for n_chunks in (200, 800):
        path.write_bytes(file_of_chunks(n_chunks, skewed(4)))
        found.append(lines_run(read, path))
    assert found[1] < 5 * found[0]


def test_kinds_that_were_checked_are_not_decoded_again(path, monkeypatch):
    from lightning_muws.artifact import load

    save_compressed({"w": torch.eye(64)}, path)
    names, stream = [], load.stream_bytes
    monkeypatch.setattr(load, "stream_bytes", lambda *args: names.append(args[3]) or stream(*args))
    load_compressed(path)
    assert names.count("kinds") == 1
    names.clear()
    monkeypatch.setattr(load, "KEPT_BYTES", 0)
    load_compressed(path)
    assert names.count("kinds") == 2
