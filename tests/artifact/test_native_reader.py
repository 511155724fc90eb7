"""The reader in C (muws.h) against the Python reader: the same bytes, the same refusals, within its limit of memory."""

import ctypes
import functools
import json
import os
import random
import shutil
import struct
import subprocess
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_muws import MicroStructure, inspect_compressed, load_compressed, save_compressed
from lightning_muws.artifact.manifest import DTYPES
from lightning_muws.errors import FormatError
from lightning_muws.structure.grid import BlockGrid
from tests.artifact.test_attacks import HOSTILE, MORE, many_keys, reframed
from tests.support import fuzz_streams
from tests.support.forge import corrupt, newer_model, put_together, small_model, take_apart
from tests.support.native_reader import (
    ARGUMENT,
    FLOAT32,
    HEADER,
    MAX_BYTES,
    NO_FILE,
    OK,
    OWN,
    REFUSED,
    ROOT,
    TOO_LARGE,
    BlockList,
    BlocksInfo,
    Conv2d,
    Error,
    Reader,
    ReaderError,
    Tensor,
    build,
    compiled,
    library,
    opened,
)
from tests.support.random_files import random_file
from tests.support.strategies import normal, raw_bytes
from tests.test_viewer import states

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.muws"))


@pytest.fixture(scope="module", autouse=True)
def _built():
    library()


def assert_same(source: Path | bytes, path: Path) -> None:
    """Compare all that the library returns of a file with what the Python reader loads."""
    state, info = load_compressed(path), inspect_compressed(path)
    with opened(source) as reader:
        reader.verify()
        assert reader.version == info.version
        assert json.loads(reader.extra) == info.extra
        assert [reader.name(i) for i in range(len(reader))] == list(state)
        for i, (name, x) in enumerate(state.items()):
            tensor = reader.tensor(i)
            assert (DTYPES[tensor.dtype.decode()], reader.shape(i)) == (x.dtype, x.shape), name
            assert (tensor.numel, tensor.n_bytes) == (x.numel(), x.nbytes), name
            assert reader.find(name) == i
            assert reader.decode(i) == raw_bytes(x), name
            if not x.is_complex():
                floats = np.frombuffer(reader.decode(i, FLOAT32), np.float32)
                assert np.array_equal(floats, x.reshape(-1).float().numpy(), equal_nan=True), name
        assert reader.peak_bytes <= MAX_BYTES


def outcome(data: bytes, max_bytes: int = MAX_BYTES) -> tuple[int, str, dict[str, bytes]]:
    """Return what the library makes of a file: the code, the message, and the bytes of each tensor."""
    try:
        with opened(data, max_bytes) as reader:
            reader.verify()
            found = {
                reader.name(i): reader.decode(i) for i in range(len(reader)) if reader.tensor(i).n_bytes <= max_bytes
            }
            assert reader.peak_bytes <= max_bytes
            return OK, "", found
    except ReaderError as error:
        return error.code, str(error), {}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_files_are_read_to_the_same_bytes(path):
    assert_same(path, path)
    assert_same(path.read_bytes(), path)


@functools.cache
def models() -> list:
    """Return state_dicts of every dtype, form and shape, and a transposed convolution, with their settings."""
    conv = torch.nn.ConvTranspose2d(8, 6, 3, groups=2)
    torch.nn.init.normal_(conv.weight, generator=torch.Generator().manual_seed(0))
    conv.weight.data[:, 1] = 0.5
    return [*states().values(), (conv, {"blocks": {"weight": BlockGrid((2, 3), out_axis=1, groups=2)}})]


@pytest.mark.parametrize("i", range(10))
def test_files_of_every_dtype_form_and_shape_are_read_to_the_same_bytes(i, tmp_path):
    assert len(models()) == 10
    model, settings = models()[i]
    save_compressed(model, tmp_path / "m.muws", **settings)
    assert_same(tmp_path / "m.muws", tmp_path / "m.muws")


def check_random_files(seeds: range, path: Path) -> set[str]:
    """Return the coders and filters that the files use."""
    used: set[str] = set()
    for seed in seeds:
        random_file(seed, path)
        assert_same(path, path)
        for coders in inspect_compressed(path).coders.values():
            used |= set(coders.replace("-", "+").split("+"))
    return used


def test_random_files_are_read_to_the_same_bytes(tmp_path):
    assert check_random_files(range(40), tmp_path / "m.muws") >= {"raw", "zlib", "rans", "repeat"}


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("MUWS_ATTACK"), reason="takes five minutes: make attack runs it")
def test_a_thousand_random_files_are_read_to_the_same_bytes(tmp_path):
    used = check_random_files(range(1000, 2000), tmp_path / "m.muws")
    assert used >= {"raw", "zlib", "zlib2", "rans", "repeat", "xor", "delta", "bits", "parts"}, used


def test_all_numbers_of_16_and_8_bits_become_float32(tmp_path):
    path = tmp_path / "m.muws"
    u16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    state = {name: u16.view(DTYPES[name]) for name in ("float16", "bfloat16", "int16", "uint16")}
    state |= {
        name: torch.arange(256).to(torch.uint8).view(x) for name, x in DTYPES.items() if name.startswith("float8_")
    }
    save_compressed(state, path)
    assert_same(path, path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float32_is_rounded_to_16_bits_as_torch_does(dtype, tmp_path):
    path = tmp_path / "m.muws"
    bits = (
        torch.randint(0, 1 << 32, (20_000,), generator=torch.Generator().manual_seed(0))
        .to(torch.uint32)
        .view(torch.float32)
    )
    near = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float16).float()
    halves = near + near.abs().nextafter(torch.tensor(torch.inf)) * 2**-12  # about between two values
    edges = torch.tensor(
        [65504.0, 65519.996, 65520.0, 2**-14, 2**-24, 2**-25, 2**-25 * 1.0001, 0.0, -0.0, 3.3895e38, 3.4e38]
    )
    x = torch.cat([bits, near, halves, edges])
    save_compressed({"x": x[~x.isnan()]}, path)
    manifest, streams = take_apart(path.read_bytes())
    manifest["tensors"][0].update(dtype=dtype, stored="float32")
    path.write_bytes(put_together(manifest, streams))
    assert_same(path, path)


def test_the_manifest_is_described(tmp_path):
    path = tmp_path / "m.muws"
    state = small_model(path)
    info = {tensor.name: tensor for tensor in inspect_compressed(path).tensors}
    with opened(path) as reader:
        for i, name in enumerate(state):
            tensor, told = reader.tensor(i), info[name]
            assert tensor.same_as == (0 if name == "tied" else -1)
            if name != "tied":
                assert tuple(tensor.block) == (told.block_shape or (0, 0))
                assert tuple(tensor.kinds) == told.counts
        assert reader.tensor(reader.find("steps.weight")).stored == b"grid"
        assert reader.find("nothing") == -1


def test_copies_are_told_from_shared_tensors(tmp_path):
    newer_model(tmp_path / "m.muws")
    with opened(tmp_path / "m.muws") as reader:
        again = reader.tensor(reader.find("again"))
        assert (again.same_as, again.is_copy) == (reader.find("few"), 1)


def test_one_tensor_takes_its_own_chunk_alone(tmp_path):
    path = tmp_path / "m.muws"
    structure = MicroStructure((4, 4), 0.9, 0.1)
    state = {name: structure.project(normal(i, 1024, 2048).float()) for i, name in enumerate("ab")}
    save_compressed(state, path)
    data = bytearray(path.read_bytes())
    n = 8 + int.from_bytes(data[:8], "little")
    spans = {name: one["data_offsets"] for name, one in json.loads(data[8:n]).items() if name.startswith("c")}
    data[n + spans["c1.signs"][0] + 100] ^= 1
    with opened(bytes(data)) as reader:
        assert reader.decode(0) == raw_bytes(state["a"])
        assert reader.peak_bytes < 2 * state["a"].nbytes
        for read in (lambda: reader.decode(1), reader.verify):
            with pytest.raises(
                ReaderError, match=r"stream 'c1.signs' of 'b': checksum \d+, expected \d+: the file is damaged"
            ):
                read()
        assert reader.decode(0) == raw_bytes(state["a"])


# ---- files that lie


BOMBS = {name: attack for name, (attack, _) in HOSTILE.items() if "bomb" in name}  # they take seconds to make


def check_hostile(attacks: dict[str, Callable[[bytes], bytes]], folder: Path) -> None:
    small_model(folder / "good.muws")
    good = (folder / "good.muws").read_bytes()
    for name, attack in attacks.items():
        data, tries = attack(good), []
        for _ in range(3):  # a busy machine may be slow once
            start = time.process_time()
            code, message, _ = outcome(data, 16 << 20)
            tries.append(time.process_time() - start)
            if tries[-1] < 0.1:
                break
        assert (code, bool(message)) == (REFUSED, True), (name, code, message)
        assert min(tries) < 0.1, name
        (folder / "bad.muws").write_bytes(data)
        assert isinstance(loaded(folder / "bad.muws", MAX_BYTES), str)


def test_hostile_files_are_refused_within_100_ms_and_16_mib(tmp_path):
    attacks = {name: attack for name, (attack, _) in {**HOSTILE, **MORE}.items() if name not in BOMBS}
    nested = struct.pack("<Q", 60_000) + b'{"a":' + b"[" * 29_997 + b"]" * 29_997 + b"}"
    check_hostile(attacks | {"keys": reframed(raw=many_keys()), "a header that nests": lambda _: nested}, tmp_path)


@pytest.mark.slow
def test_bombs_are_refused_within_100_ms_and_16_mib(tmp_path):
    assert len(BOMBS) == 2
    check_hostile(BOMBS, tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": "float12"}, "'conv.weight' has dtype 'float12', which this reader does not know"),
        ({"kinds": [10, 10, 32]}, r"'conv.weight' has blocks \(.*\), the manifest declares \(10, 10, 32\)"),
        ({"shape": [1 << 40, 1 << 40]}, "'conv.weight' has more weights than any memory holds"),
        (
            {"name": "\x1b[2J\ud800" + "x" * 999, "block": [0, 1]},
            r"'\?\[2J\?\?\?x{60,}\.\.\.': block_shape=\(0, 1\) is not allowed",
        ),
    ],
)
def test_a_refusal_names_the_tensor_and_the_reason(change, says, tmp_path):
    small_model(tmp_path / "m.muws")
    manifest, streams = take_apart((tmp_path / "m.muws").read_bytes())
    manifest["tensors"][0].update(change)
    manifest["tensors"] = [entry for entry in manifest["tensors"] if "same_as" not in entry]
    manifest["chunks"][-1]["until"] = [len(manifest["tensors"]), 0]
    with pytest.raises(ReaderError, match=says), opened(put_together(manifest, streams)) as reader:
        reader.decode(0)


def test_a_bool_and_an_index_beyond_are_refused_by_name(tmp_path):
    path = tmp_path / "m.muws"
    few = normal(0, 9, dtype=torch.float32)[torch.randint(0, 9, (80, 90), generator=torch.Generator().manual_seed(0))]
    save_compressed({"few": few, "mask": torch.ones(9, dtype=torch.bool)}, path)
    manifest, streams = take_apart(path.read_bytes())
    for name, value, says in (
        ("other", bytes([2] * 9), "'mask'.*a bool of 2"),
        ("free.palette.0", b"\xfe" * 7200, "'few'.*index 127 of"),
    ):
        lied, told = dict(streams), json.loads(json.dumps(manifest))
        lied[f"c0.{name}"] = value
        told["chunks"][0]["streams"][name] = ["raw", zlib.crc32(value)]
        with opened(put_together(told, lied)) as reader:
            with pytest.raises(ReaderError, match=says):
                reader.verify()
            with pytest.raises(ReaderError, match=says):
                reader.decode(0 if name.startswith("free") else 1)


def loaded(path: Path, max_bytes: int) -> dict[str, bytes] | str:
    """Return what the Python reader makes of a file: the bytes of each tensor, or why it is refused."""
    try:
        return {name: raw_bytes(x) for name, x in load_compressed(path, max_bytes=max_bytes).items()}
    except FormatError as error:
        return str(error)


def compare_with_python(files, path: Path, max_bytes: int) -> int:
    """Return how many of the files both readers accept; fail if one refuses a file alone or reads other bytes."""
    n_accepted = 0
    for i, data in enumerate(files):
        path.write_bytes(data)
        code, message, found = outcome(data)
        theirs = loaded(path, max_bytes)
        if isinstance(theirs, str):
            assert code == REFUSED or "max_bytes" in theirs, (i, theirs)
        else:
            assert (code, found) == (OK, theirs), (i, message)
            n_accepted += 1
    return n_accepted


def test_lies_with_right_checksums_are_accepted_and_refused_as_in_python(tmp_path):
    path, models = tmp_path / "m.muws", []
    for write in (small_model, newer_model):
        write(path)
        models.append(take_apart(path.read_bytes()))
    lies = (fuzz_streams.lie(models, random.Random(seed)) for seed in range(200))  # noqa: S311  no secret
    assert 10 < compare_with_python(lies, path, 1 << 20) < 100


def test_lies_in_the_header_are_accepted_and_refused_as_in_python(tmp_path):
    small_model(tmp_path / "a.muws")
    newer_model(tmp_path / "b.muws")
    good = [(tmp_path / name).read_bytes() for name in ("a.muws", "b.muws")]
    lies = (fuzz_streams.lie_in_header(good[seed % 2], random.Random(seed)) for seed in range(400))  # noqa: S311
    assert 5 < compare_with_python(lies, tmp_path / "m.muws", 1 << 20) < 100


def test_damaged_files_are_refused(tmp_path):
    small_model(tmp_path / "a.muws")
    newer_model(tmp_path / "b.muws")
    good = [(tmp_path / name).read_bytes() for name in ("a.muws", "b.muws")]
    damaged = (corrupt(good[seed % 2], good[1 - seed % 2], seed) for seed in range(1000))
    assert {outcome(data)[0] for data in damaged if data not in good} == {REFUSED}


NESTED = '"extra":{"a":' + "[" * 63 + "%s" + "]" * 63 + "}"
TAILS = [
    *('"x":1e999', '"x":1e-999', '"x":-0', '"x":01', '"x":1.', '"x":.5', '"x":+1', '"x":nul', '"x":[1,]', '"x":1 ]'),
    *('"x":"\t"', '"x":"\\x"', '"x":"\\ud800"', '"x":"\\u00"', '"x":"\x7f"', '"":1', '"x":1}{"a":1', '"extra":[]'),
    *(
        '"x":{"a":1,"\\u0061":2}',
        '"x":{"a":1,"b":2}',
        '"\\u0065xtra":{"a":1}',
        NESTED % 0,
        NESTED % "[0]",
        NESTED % "[]",
    ),
    *('"x":' + "9" * 4300, '"x":' + "9" * 4301, '"x":0.' + "0" * 400 + "1", '"x":123456789e-400', '"x":0.0000001e310'),
    *('"x":' + "1" * 320 + "e-300", '"x":' + "1" * 320 + ".5"),
]


def test_what_a_json_reader_may_do_otherwise_is_as_in_python(tmp_path):
    small_model(tmp_path / "m.muws")
    manifest, streams = take_apart((tmp_path / "m.muws").read_bytes())
    start = json.dumps(manifest)[:-1]
    files = (put_together(manifest, streams, raw=f"{start}, {tail}}}".encode()) for tail in TAILS)
    assert 8 < compare_with_python(files, tmp_path / "m.muws", MAX_BYTES) < len(TAILS) - 8


# ---- the interface


def test_no_limit_is_passed_and_the_peak_is_enough(tmp_path):
    small_model(tmp_path / "a.muws")
    newer_model(tmp_path / "b.muws")
    for path in (*GOLDEN, tmp_path / "a.muws", tmp_path / "b.muws"):
        data = path.read_bytes()
        with opened(data) as reader:
            reader.verify()
            wanted, peak = [reader.decode(i) for i in range(len(reader))], reader.peak_bytes
        for limit in (0, 100, *(peak * k // 20 for k in range(1, 20)), peak - 1):
            code, message, found = outcome(data, limit)
            assert code == TOO_LARGE, (path, limit, peak, message)
            assert f"at most max_bytes={limit} are allowed" in message
        code, _, found = outcome(data, peak)
        assert (code, list(found.values())) == (OK, [one for one in wanted if len(one) <= peak])


def test_a_caller_that_is_wrong_is_told(tmp_path):
    path = tmp_path / "m.muws"
    save_compressed({"z": torch.ones(3, dtype=torch.complex64), "x": torch.ones(4)}, path)
    with opened(path) as reader:
        for call, says in (
            (lambda: reader.tensor(2), "no tensor 2, the file has 2"),
            (lambda: reader.decode(1, n_bytes=15), "tensor 'x': it takes 16 bytes, 15 were given"),
            (lambda: reader.decode(1, 7, n_bytes=16), "tensor 'x': 7 is no way to decode"),
            (lambda: reader.decode(0, FLOAT32), "tensor 'z': it is complex64, which cannot become float32"),
        ):
            with pytest.raises(ReaderError, match=says) as caught:
                call()
            assert caught.value.code == ARGUMENT
        assert library().muws_decode(reader._file, 1, OWN, None, 16, None) == ARGUMENT
        assert library().muws_decode(reader._file, 1, OWN, 1 << 12 | 1, 16, None) == ARGUMENT
        assert library().muws_decode(reader._file, 9, OWN, None, 0, None) == ARGUMENT
    for missing in (tmp_path / "none.muws", tmp_path):
        with pytest.raises(ReaderError) as caught:
            Reader(missing)
        assert caught.value.code == NO_FILE
    assert not library().muws_open(None, MAX_BYTES, None)
    library().muws_close(None)


def test_threads_may_read_different_files(tmp_path):
    wanted = {}
    for i in range(4):
        state, path = {"w": normal(i, 300, 301).float()}, tmp_path / f"{i}.muws"
        save_compressed(state, path)
        wanted[path] = raw_bytes(state["w"])
    found: dict[Path, set[bytes]] = {path: set() for path in wanted}

    def read(path: Path) -> None:
        for _ in range(20):
            with opened(path) as reader:
                found[path].add(reader.decode(0))

    threads = [threading.Thread(target=read, args=(path,)) for path in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {path: {data} for path, data in wanted.items()}


STRUCTS = {
    "MuwsError": Error,
    "MuwsTensor": Tensor,
    "MuwsBlockList": BlockList,
    "MuwsBlocksInfo": BlocksInfo,
    "MuwsConv2d": Conv2d,
}


@pytest.mark.parametrize(
    ("compiler", "flags"),
    [("cc", ("-std=c99", "-pedantic-errors", "-Wall", "-Werror")), ("c++", ("-x", "c++", "-Wall", "-Werror"))],
)
def test_the_header_is_c_and_cxx_and_its_structs_are_those_of_ctypes(compiler, flags, tmp_path):
    fields = [(kind, name) for kind, struct in STRUCTS.items() for name, _ in struct._fields_]
    prints = "".join(f'printf("%d ", (int)offsetof({kind}, {name}));' for kind, name in fields)
    sizes = "".join(f'printf("%d ", (int)sizeof({kind}));' for kind in STRUCTS)
    body = f"int main(void) {{ {prints} {sizes} return 0; }}"
    source = f'#include <stddef.h>\n#include <stdio.h>\n#include "muws.h"\n{body}\n'
    found = list(map(int, compiled(source, tmp_path, *flags, compiler=compiler).split()))
    offsets = [getattr(STRUCTS[kind], name).offset for kind, name in fields]
    assert found == [*offsets, *map(ctypes.sizeof, STRUCTS.values())]


def test_the_example_lists_a_file_and_decodes_a_tensor(tmp_path):
    state = small_model(tmp_path / "m.muws")
    source = (ROOT / "examples" / "07_deploy" / "decode.c").read_text(encoding="utf-8")
    compiled(source, tmp_path, "-std=c99", "-Wall", "-Wextra", "-Werror", run=False)

    def run(*words: object) -> tuple[int, str, str]:
        done = subprocess.run([tmp_path / "program", *words], capture_output=True, text=True, check=False)  # noqa: S603
        return done.returncode, done.stdout, done.stderr

    code, listed, _ = run(tmp_path / "m.muws")
    assert code == 0
    assert listed.splitlines() == [
        f"{name} {str(x.dtype).removeprefix('torch.')} {list(x.shape)} {x.nbytes} bytes" for name, x in state.items()
    ]
    code, printed, _ = run(tmp_path / "m.muws", "linear.weight")
    *values, total = printed.split("\n")[:-1]
    w = state["linear.weight"].float()
    assert code == 0
    assert [float(value) for value in values] == pytest.approx(w.reshape(-1)[:4].tolist(), rel=1e-5)
    assert float(total.removeprefix("sum ")) == pytest.approx(float(w.double().sum()), rel=1e-5)
    assert run(tmp_path / "m.muws", "nothing") == (1, "", "there is no tensor 18446744073709551615, the file has 7\n")
    (tmp_path / "m.muws").write_bytes((tmp_path / "m.muws").read_bytes()[:-1])
    assert run(tmp_path / "m.muws")[0] == 1


def test_only_the_functions_of_the_header_are_exported():
    nm = shutil.which("nm") or pytest.skip("nm is not installed")
    listed = subprocess.run([nm, "-D", "--defined-only", build()], check=True, capture_output=True, text=True).stdout  # noqa: S603
    names = {line.split()[-1] for line in listed.splitlines() if " T " in line}
    declared = {
        word.split("(")[0].lstrip("*")
        for line in HEADER.read_text().splitlines()
        if line.startswith("MUWS_API")
        for word in line.split()
        if "(" in word and "muws_" in word
    }
    assert names == declared
    assert len(declared) == 18


@pytest.mark.slow
def test_the_fuzzer_under_sanitizers_has_no_finding():
    if not shutil.which(os.environ.get("CXX", "c++")):
        pytest.skip("no C++ compiler")
    script = ROOT / "tests" / "artifact" / "fuzz_reader.sh"
    done = subprocess.run([script, "3000"], capture_output=True, text=True, check=False)  # noqa: S603  our own script
    assert done.returncode == 0, done.stderr
    assert "3000 inputs" in done.stdout
