"""The entropy coder: exact, near the entropy, and strict about what it reads."""

import contextlib
import lzma
import tracemalloc
import zlib
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_muws import inspect_compressed, load_compressed, save_compressed
from lightning_muws.artifact import rans
from lightning_muws.artifact.codecs import CODERS, INNER, Coder, decode, encode, inflate
from lightning_muws.artifact.entropy import entropy_bytes
from lightning_muws.artifact.filters import Filtered, _repeated
from lightning_muws.artifact.varint import number
from lightning_muws.errors import FormatError
from tests.support import format_reader


def skewed(seed: int, n: int, p: float = 0.35, low: int = 127) -> np.ndarray:
    return (low - np.minimum(low, np.random.default_rng(seed).geometric(p, n))).astype(np.uint8)


def test_a_stream_by_hand():
    # one lane; a table of the symbols 7 and 8, half each; the state holds the 3 symbols, as no word was needed yet
    data = np.array([7, 7, 8], np.uint8)
    coded = rans._encode(data, [(3, np.isin(np.arange(256), (7, 8)).astype(np.int64))])
    x = 65536
    for symbol in (8, 7, 7):
        x = x // 2048 * 4096 + x % 2048 + (2048 if symbol == 8 else 0)
    assert coded == bytes([1, 7, 8, 0x80, 0x10, 0x80, 0x10]) + x.to_bytes(4, "little")
    assert decode("rans", coded, 3).tolist() == [7, 7, 8]


@st.composite
def streams(draw) -> np.ndarray:
    """Return streams of one symbol, of few, of all, changing in the middle, or repeating."""
    n, seed = draw(st.integers(1, 20_000)), draw(st.integers(0, 10**6))
    random = np.random.default_rng(seed)
    kind = draw(st.sampled_from(["constant", "skewed", "uniform", "two", "repeating", "rare"]))
    match kind:
        case "constant":
            return np.full(n, seed % 256, np.uint8)
        case "skewed":
            return skewed(seed, n, draw(st.sampled_from([0.05, 0.5, 0.99])))
        case "uniform":
            return random.integers(0, 256, n, np.uint8)
        case "two":
            return np.concatenate([skewed(seed, n), skewed(seed + 1, n, 0.8, 40)])
        case "repeating":
            return np.resize(random.integers(0, 256, 37, np.uint8), n)
    return (random.random(n) < 1e-3).astype(np.uint8) * np.uint8(255)


@given(streams())
def test_decode_undoes_encode(data):
    coder, coded = encode(data)
    assert len(coded) <= len(data)
    assert np.array_equal(decode(coder, coded, len(data)), data)


@given(streams())
def test_rans_is_exact_whether_it_pays_or_not(data):
    coded = rans._encode(data, rans._stretches(data)[0])
    assert np.array_equal(rans.decode(coded, len(data)), data)


@pytest.mark.parametrize("data", [skewed(0, 5000), np.concatenate([skewed(1, 9000), skewed(2, 9000, 0.9, 30)])])
def test_another_decoder_reads_the_same(data):
    coded = rans._encode(data, rans._stretches(data)[0])
    assert format_reader.rans(coded, len(data)) == data.tolist()


def test_the_size_is_the_entropy():
    data = skewed(3, 1 << 20)
    coder, coded = encode(data)
    assert coder == "rans"
    assert len(coded) < 1.01 * entropy_bytes(np.bincount(data))


def test_a_new_table_where_the_symbols_change():
    data = np.concatenate([skewed(4, 1 << 18), skewed(5, 1 << 18, 0.7, 60)])
    assert len(rans._stretches(data)[0]) == 2
    assert len(encode(data)[1]) < 0.85 * entropy_bytes(np.bincount(data))
    assert len(rans._stretches(skewed(6, 1 << 20))[0]) == 1


def test_long_repeats_are_left_to_zlib():
    data = np.tile(np.random.default_rng(0).integers(0, 256, 1000, np.uint8), 200)
    assert encode(data)[0] == "zlib"
    assert encode(np.random.default_rng(0).integers(0, 256, 10_000, np.uint8))[0] == "raw"


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=256).filter(any))
def test_frequencies_sum_to_the_total_and_forget_no_symbol(counts):
    counts = np.pad(np.array(counts), (0, 256 - len(counts)))
    f = rans._frequencies(counts)
    assert f.sum() == 4096
    assert ((f > 0) == (counts > 0)).all()


# ---- what is refused


def coded_by_rans(data: np.ndarray) -> bytes:
    return rans._encode(data, rans._stretches(data)[0])


@pytest.mark.parametrize(
    ("coder", "coded", "n", "says"),
    [
        ("lzma", b"", 0, "coder 'lzma' is not known"),
        ("raw", b"abc", 4, "holds 3 bytes, 4 are needed"),
        ("zlib", b"abc", 3, "zlib stream is broken"),
        ("zlib", zlib.compress(b"abcd"), 3, "does not hold the 3 bytes"),
        ("zlib", zlib.compress(b"abcd"), 5, "does not hold the 5 bytes"),
        ("zlib", zlib.compress(b"abcd")[:-1], 4, "does not hold the 4 bytes"),
        ("zlib", zlib.compress(b"abcd") + b"x", 4, "does not hold the 4 bytes"),
        ("rans", b"", 1, "ends within the tables of rans"),
        ("rans", bytes([0]), 1, "declares 0 tables"),
        ("rans", bytes([2, 0, 0, 1]), 1, "declares 2 tables"),
        ("rans", bytes([0x81, 8]) + bytes([1]) * 9999, 5000, "declares 1025 tables"),
        ("rans", bytes([2, 9]) + bytes([5, 5, 0x80, 0x20]) * 2, 9, "are not for its 9 steps"),
        ("rans", bytes([1, 5, 5, 0x81, 0x20]), 1, "sum to 4097"),
        ("rans", bytes([1, 5, 4]), 1, "sum to 0"),
        ("rans", bytes([1, 5, 5, 0x80, 0x20, 0, 0]), 1, "ends within its states"),
        ("rans", coded_by_rans(skewed(0, 5000))[:-2], 5000, "ends too early"),
        ("rans", coded_by_rans(skewed(0, 5000)) + b"ab", 5000, "not end where it should"),
        ("rans", coded_by_rans(skewed(0, 5000)), 4990, "not end where it should"),
    ],
)
def test_refused(coder, coded, n, says):
    with pytest.raises(FormatError, match=says):
        decode(coder, coded, n)


@given(streams(), st.data())
def test_a_damaged_rans_stream_is_refused_or_read_as_so_many_bytes(data, draw):
    coded = bytearray(coded_by_rans(data))
    for _ in range(draw.draw(st.integers(1, 4))):
        coded[draw.draw(st.integers(0, len(coded) - 1))] = draw.draw(st.integers(0, 255))
    with contextlib.suppress(FormatError):
        assert len(rans.decode(bytes(coded), len(data))) == len(data)


def test_a_zlib_bomb_takes_no_memory():
    bomb = zlib.compress(bytes(1 << 28), 9)
    tracemalloc.start()
    with pytest.raises(FormatError, match="does not hold the 1000 bytes"):
        inflate(bomb, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


# ---- a new coder is one row


def _raw_inflate(coded: bytes, n: int) -> np.ndarray:
    stream = zlib.decompressobj(wbits=-15)
    try:
        data = stream.decompress(coded, n + 1)
    except zlib.error as error:
        raise FormatError(f"a deflate stream is broken: {error}") from None
    if len(data) != n or not stream.eof or stream.unused_data:
        raise FormatError(f"a deflate stream does not hold the {n} bytes that are needed")
    return np.frombuffer(data, np.uint8)


DEFLATE = Coder(lambda data, size: zlib.compress(data.tobytes(), 9, wbits=-15), _raw_inflate)


@pytest.fixture
def deflate(monkeypatch):
    monkeypatch.setitem(CODERS, "deflate", DEFLATE)


@pytest.mark.usefixtures("deflate")
@given(streams())
def test_a_coder_added_by_one_row_round_trips(data):
    coder, coded = encode(data)
    assert np.array_equal(decode(coder, coded, len(data)), data)
    assert np.array_equal(decode("deflate", DEFLATE.encode(data, 0), len(data)), data)


@pytest.mark.usefixtures("deflate")
@given(streams(), st.data())
def test_a_coder_added_by_one_row_refuses_what_is_damaged(data, draw):
    coded = bytearray(DEFLATE.encode(data, 0))
    for _ in range(draw.draw(st.integers(1, 4))):
        coded[draw.draw(st.integers(0, len(coded) - 1))] = draw.draw(st.integers(0, 255))
    with contextlib.suppress(FormatError):
        assert len(decode("deflate", bytes(coded), len(data))) == len(data)
    with pytest.raises(FormatError, match="does not hold the 3 bytes"):
        decode("deflate", DEFLATE.encode(np.zeros(1 << 20, np.uint8), 0), 3)


def test_a_file_with_the_new_coder_loads_where_the_row_is_and_is_refused_elsewhere(tmp_path, monkeypatch):
    state = {"w": torch.randint(0, 256, (97,), generator=torch.Generator().manual_seed(0)).repeat(9)}
    with monkeypatch.context() as patch:
        patch.setitem(CODERS, "deflate", DEFLATE)
        assert save_compressed(state, tmp_path / "m.muws").streams[0].coder == "deflate"
        assert torch.equal(load_compressed(tmp_path / "m.muws")["w"], state["w"])
    with pytest.raises(FormatError, match="coder 'deflate' is not known"):
        load_compressed(tmp_path / "m.muws")


# ---- filters


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blocks_of(mask: torch.Tensor) -> torch.Tensor:
    """Return a mask of blocks of 4x4."""
    return mask.repeat_interleave(4, 0).repeat_interleave(4, 1)


CHAINS = [
    [name for name in chain if name]
    for chain in product(("", "repeat"), ("", "xor"), ("", "delta"), ("", "bits"))
    if any(chain)
]
FILTERED = ["-".join((*chain, inner)) for chain in CHAINS for inner in INNER]


def filtered(data: np.ndarray, row: int, chain: list[str]) -> Filtered:
    """Return what filters make of bytes, whether they pay or not."""
    found = Filtered((), (), data)
    for name in chain:
        assume(name != "xor" or len(found.data) > 1)  # there is no lag to an earlier byte
        numbers, rest = {
            "repeat": lambda x: _repeated(x, row) or ((row, 1, 1), x),
            "delta": lambda x: ((), np.diff(x, prepend=np.uint8(0))),
            "xor": lambda x: ((1 + row % (len(x) - 1),), xored(x, 1 + row % (len(x) - 1))),
            "bits": lambda x: ((), np.packbits(x & 1, bitorder="little")),
        }[name](found.data)
        found = Filtered((*found.names, name), found.numbers + numbers, rest)
    return found


def xored(x: np.ndarray, lag: int) -> np.ndarray:
    return np.concatenate([x[:lag], x[lag:] ^ x[:-lag]])


@pytest.mark.parametrize("name", FILTERED)
@settings(max_examples=8)
@given(
    seed=st.integers(0, 10**6),
    row=st.integers(1, 300),
    rows=st.integers(2, 60),
    group=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    data=st.data(),
)
def test_a_filtered_stream_round_trips_and_its_damage_is_refused_or_read_as_so_many_bytes(
    name, seed, row, rows, group, data
):
    *chain, inner = name.split("-")
    generator = np.random.default_rng(seed)
    few = generator.integers(0, 2 if "bits" in chain else 5, (-(-rows // group[0]), -(-row // group[1])), np.uint8)
    x = few.repeat(group[0], 0).repeat(group[1], 1)[:rows, :row].reshape(-1)
    if "delta" in chain and "bits" in chain:  # as many ones as there are steps up
        x = np.cumsum(x, dtype=np.uint8)
        chain = [one for one in chain if one != "xor"]
    if "bits" in chain and filtered(x, row, chain[:-1]).data.max() > 1:
        return
    one = filtered(x, row, chain)
    coded = INNER[inner].encode(one.data, np.inf)
    if len(one.data) < 2 or coded is None:
        return
    name, coded = "-".join((*chain, inner)), b"".join(map(number, one.numbers)) + coded
    assert np.array_equal(decode(name, coded, len(x)), x)
    assert format_reader.decode(name, coded, len(x)) == x.tolist()
    bad = bytearray(coded)
    for _ in range(data.draw(st.integers(1, 4))):
        bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(FormatError):
        assert len(decode(name, bytes(bad), len(x))) == len(x)


@pytest.mark.parametrize(
    ("tensor", "coder", "most"),
    [
        (torch.arange(100_000), "delta-zlib2", 300),
        (torch.arange(0, 300_000, 3, dtype=torch.int32), "delta-zlib2", 300),
        (
            torch.randint(0, 10**7, (50_000,), generator=torch.Generator().manual_seed(0)).sort().values,
            "delta-rans",
            66e3,
        ),
        (torch.arange(256)[:, None] - torch.arange(256) + 255, "xor-delta-zlib2", 300),
        (torch.ones(512, 512, dtype=torch.bool).tril(), "xor-bits-zlib2", 100),
        (torch.ones(600, 600, dtype=torch.bool).tril().triu(-99), "xor-bits-zlib2", 100),
        (blocks_of(torch.randn(64, 64, generator=seeded(0)) > 0), "repeat-bits-raw", 520),
        (blocks_of(torch.randn(50, 96, generator=seeded(0)) > 0)[:-1, :-3], "repeat-bits-raw", 608),
        ((torch.randn(800, 1, generator=seeded(0)) > 0).expand(800, 300), "repeat-bits-raw", 108),
        ((torch.randn(1, 800, generator=seeded(0)) > 0).expand(300, 800), "repeat-bits-raw", 108),
        (torch.arange(5000).repeat(40, 1), "repeat-delta-zlib2", 100),
    ],
    ids=[
        "count", "multiples", "sorted", "relative positions", "causal mask", "sliding window", "block mask",
        "blocks over the edge", "pruned rows", "pruned columns", "positions of a batch",
    ],
)  # fmt: skip
def test_indices_and_masks_are_small(tensor, coder, most, tmp_path):
    report = save_compressed({"i": tensor}, tmp_path / "m.muws")
    (stream,) = report.streams
    assert (stream.name, stream.coder) == ("other", coder)
    assert stream.n_bytes < most
    loaded = load_compressed(tmp_path / "m.muws")["i"]
    assert loaded.dtype == tensor.dtype
    assert torch.equal(loaded, tensor)
    assert inspect_compressed(tmp_path / "m.muws").version == "1.1"
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    assert format_reader.read(tmp_path / "m.muws")["i"][2] == raw
    assert report.n_bytes - report.header_bytes <= min(
        len(lzma.compress(np.ascontiguousarray(planes).tobytes()))
        for planes in (np.frombuffer(raw, np.uint8), np.frombuffer(raw, np.uint8).reshape(-1, tensor.element_size()).T)
    )


def test_a_filter_is_used_only_if_it_clearly_pays(tmp_path):
    for i in range(5):
        x = torch.randn(64, 64, generator=torch.Generator().manual_seed(i))
        save_compressed({"w": x, "ids": torch.tensor([3, 1, 2])}, tmp_path / "m.muws")
        assert inspect_compressed(tmp_path / "m.muws").version == "1.0"


@pytest.mark.parametrize("name", FILTERED)
def test_a_bomb_in_a_filtered_stream_takes_no_memory(name):
    bomb = zlib.compress(bytes(1 << 28), 9)
    bomb = zlib.compress(bomb, 9) if name.endswith("2") else bomb
    tracemalloc.start()
    with pytest.raises(FormatError):
        decode(name, bomb, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
