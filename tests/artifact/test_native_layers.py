"""Layers of the C library: packed weights are those of the file, outputs those of torch, memory within the limit."""

import os
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_muws import MicroStructure, load_compressed, save_compressed
from lightning_muws.artifact.maps import map_compressed
from lightning_muws.structure.grid import BlockGrid
from tests.support.forge import newer_model, small_model
from tests.support.native_reader import (
    ARGUMENT,
    MAX_BYTES,
    REFUSED,
    ROOT,
    SIGNS,
    TOO_LARGE,
    VALUES,
    Conv2d,
    Reader,
    ReaderError,
    compiled,
    library,
    opened,
)
from tests.support.random_files import random_file
from tests.support.strategies import DTYPES, normal

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.muws"))
LEVELS = ("", "avx2", "portable")
MOST_ROWS = 97  # one more than the samples that are computed together
SETTINGS = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", autouse=True)
def _built():
    library()


@contextmanager
def level(name: str):
    """Use the kernels of a level, "" for the best one."""
    old = os.environ.pop("MUWS_LEVEL", None)
    if name:
        os.environ["MUWS_LEVEL"] = name
    try:
        yield
    finally:
        os.environ.pop("MUWS_LEVEL", None)
        if old is not None:
            os.environ["MUWS_LEVEL"] = old


def matrix_of(x: torch.Tensor, groups: int = 0) -> torch.Tensor:
    """Return a weight as its matrix in float32; with groups that of a transposed convolution."""
    if groups:
        x = x.reshape(groups, -1, *x.shape[1:]).transpose(1, 2).reshape(groups * x.shape[1], -1)
    return x.reshape(x.shape[0], -1).float() if x.numel() else x.float().reshape(x.shape[0], x.shape[1:].numel())


def assert_runs(packed, w: torch.Tensor, seed: int, sizes: tuple[int, ...] = (1, 3, 4, 17, MOST_ROWS)) -> None:
    """Compare outputs with torch in float64, within the rounding error of a sum in float32 of any order."""
    n_out, n_in = w.shape
    for n in sizes:
        x, bias = normal(seed, n, n_in, dtype=torch.float32), normal(seed + 1, n_out, dtype=torch.float32)
        for b, relu in ((bias, True), (None, False)):
            wanted = F.linear(x.double(), w.double(), None if b is None else b.double())
            absolute = F.linear(x.double().abs(), w.double().abs(), None if b is None else b.double().abs())
            # Higham 2002, section 3.1: gamma_n times the sum of absolute values; signs add 2 (total - 2 under)
            bound = 3 * (n_in + 8) * 2.0**-24 * (absolute + F.linear(x.double().abs(), w.double().abs()))
            found = torch.from_numpy(packed.linear(x.numpy(), None if b is None else b.numpy(), relu=relu)).double()
            found_error = (found - (wanted.relu() if relu else wanted)).abs()
            assert bool((found_error <= bound + 1e-37).all()), (n, relu, float((found_error - bound).max()))


def packed_or_none(reader: Reader, index: int, form: int):
    """Return a packed weight; None if its blocks have no such form, or this machine has not the level."""
    try:
        return reader.pack(index, form)
    except ReaderError as error:
        if error.code == ARGUMENT and ("MUWS_LEVEL" in str(error) or "signs are for" in str(error)):
            return None
        raise


def packs(reader: Reader, index: int):
    """Yield the weight in each form that the library has for it, at each level of this machine."""
    for name in LEVELS:
        for form in (VALUES, SIGNS):
            with level(name):
                packed = packed_or_none(reader, index, form)
            if packed:
                yield name, form, packed


def assert_packs(path: Path, index: int, w: torch.Tensor, seed: int = 0, **sizes) -> set[int]:
    """Compare packed weights with a matrix, and outputs with torch; return the forms."""
    forms, tried = set(), 0
    with opened(path) as reader:
        for _, form, packed in packs(reader, index):
            assert (packed.info.outputs, packed.info.inputs) == tuple(w.shape)
            assert np.array_equal(packed.dense(), w.numpy(), equal_nan=True)
            if bool(w.isfinite().all()) and float(w.abs().max() if w.numel() else 0) < 1e30:
                assert_runs(packed, w, seed, **sizes)
            forms.add(form)
            tried += 1
        assert reader.peak_bytes <= MAX_BYTES
    assert tried
    return forms


def test_a_layer_of_two_blocks_by_hand(tmp_path):
    w = torch.tensor([[0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 3.0, 4.0]])
    save_compressed({"w": w}, tmp_path / "m.muws", blocks=(2, 2))
    with opened(tmp_path / "m.muws") as reader:
        packed = reader.pack(0)
        y = packed.linear(np.array([[9, 9, 1, 10]], np.float32), np.array([0.5, -50], np.float32), relu=True)
        assert y.tolist() == [[21.5, 0.0]]
        assert packed.info.values.n_blocks * packed.info.values.rows * packed.info.values.cols == 4


@SETTINGS
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    blocks=st.sampled_from(
        [(1, 1), (2, 2), (3, 2), (4, 4), (4, 8), (8, 8), (16, 8), (1, 8), (8, 1), (5, 3), (4, 16), (64, 64)]
    ),
    shares=st.sampled_from([(0.0, 0.0), (0.3, 0.4), (0.6, 0.3), (0.0, 1.0), (1.0, 0.0), (0.8, 0.0)]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
)
@example(shape=(33, 37), blocks=(4, 4), shares=(0.5, 0.4), dtype=torch.float32, seed=0)
@example(shape=(12, 64), blocks=(4, 8), shares=(0.5, 0.3), dtype=torch.float32, seed=1)
@example(shape=(1, 1), blocks=(1, 1), shares=(0.0, 0.0), dtype=torch.float64, seed=2)
def test_outputs_are_those_of_torch_for_all_blocks_kinds_and_edges(shape, blocks, shares, dtype, seed, tmp_path):
    w = MicroStructure(blocks, *shares).project(normal(seed, *shape)).to(dtype)
    save_compressed({"w": w}, tmp_path / "m.muws", blocks=blocks)
    assert_packs(tmp_path / "m.muws", 0, w.float(), seed, sizes=(1, 2, 5, 33))


@pytest.mark.parametrize("blocks", [(4, 4), (4, 8), (8, 8), (16, 16)])
def test_unified_blocks_can_be_packed_as_signs(blocks, tmp_path):
    w = MicroStructure(blocks, 0.4, 0.4).project(normal(0, 51, 70)).float()
    save_compressed({"w": w}, tmp_path / "m.muws", blocks=blocks)
    assert assert_packs(tmp_path / "m.muws", 0, w) == {VALUES, SIGNS}
    unified = MicroStructure(blocks, 0.0, 1.0).project(normal(1, 256, 256)).float()
    save_compressed({"w": unified}, tmp_path / "m.muws", blocks=blocks)
    with opened(tmp_path / "m.muws") as reader:
        info = reader.pack(0, SIGNS).info
        assert info.values.n_blocks == 0
        assert info.signs.n_blocks * blocks[0] * blocks[1] == unified.numel()


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_is_packed_as_its_matrix(groups, tmp_path):
    conv = torch.nn.ConvTranspose2d(16, 12, 3, groups=groups)
    torch.nn.init.normal_(conv.weight, generator=torch.Generator().manual_seed(0))
    conv.weight.data[:, 1] = 0.5
    conv.weight.data[:8] = 0
    grid = BlockGrid((2, 3), out_axis=1, groups=groups)
    save_compressed(conv, tmp_path / "m.muws", blocks={"weight": grid})
    assert_packs(tmp_path / "m.muws", 0, matrix_of(conv.weight.detach(), groups))


def test_a_convolution_is_packed_as_its_matrix(tmp_path):
    w = MicroStructure((4, 4), 0.5, 0.3).project(normal(0, 10, 5, 3, 3)).float()
    save_compressed({"w": w}, tmp_path / "m.muws", blocks=(4, 4))
    assert_packs(tmp_path / "m.muws", 0, matrix_of(w))


@SETTINGS
@given(
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 9), st.integers(1, 9), st.integers(1, 20), st.integers(1, 20)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    name=st.sampled_from(LEVELS),
    seed=st.integers(0, 10**6),
)
@example(sizes=(20, 8, 9, 5, 6), kernel=(3, 3), stride=(1, 1), padding=(1, 1), name="", seed=0)
@example(sizes=(1, 9, 8, 20, 20), kernel=(3, 3), stride=(2, 2), padding=(1, 1), name="", seed=1)
@example(sizes=(2, 8, 8, 19, 20), kernel=(1, 1), stride=(1, 1), padding=(0, 0), name="", seed=2)
def test_convolutions_are_those_of_torch(sizes, kernel, stride, padding, name, seed, tmp_path):
    n, c, o, h, w = sizes
    assume(kernel[0] <= h + 2 * padding[0] and kernel[1] <= w + 2 * padding[1])
    weight = MicroStructure((4, 4), 0.5, 0.3).project(normal(seed, o, c, *kernel)).float()
    save_compressed({"w": weight}, tmp_path / "m.muws", blocks=(4, 4))
    x, bias = normal(seed + 1, n, c, h, w, dtype=torch.float32), normal(seed + 2, o, dtype=torch.float32)
    wanted = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding).relu()
    absolute = F.conv2d(x.double().abs(), weight.double().abs(), bias.double().abs(), stride, padding)
    with level(name), opened(tmp_path / "m.muws") as reader:
        packed = packed_or_none(reader, 0, VALUES)
        if packed is None:
            return
        shape = Conv2d(n, c, h, w, kernel, stride, padding)
        found = packed.conv2d(x.numpy(), shape, tuple(wanted.shape), bias.numpy(), relu=True)
    bound = (c * kernel[0] * kernel[1] + 8) * 2.0**-24 * absolute
    assert bool(((torch.from_numpy(found).double() - wanted).abs() <= bound).all())


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_weights_of_the_golden_files_run(path):
    with opened(path) as reader:
        names = {reader.name(i): i for i in range(len(reader))}
    n = 0
    for name, x in load_compressed(path).items():
        if x.dtype in DTYPES and x.dim() >= 2:
            n += 1
            assert_packs(path, names[name], matrix_of(x), sizes=(1, 5))
    assert n or path.stem == "1.1-masks"


def test_weights_of_random_files_are_packed_as_they_are_decoded(tmp_path):
    n = 0
    for seed in range(40):
        random_file(seed, tmp_path / "m.muws")
        with opened(tmp_path / "m.muws") as reader:
            for i in range(len(reader)):
                tensor, shape = reader.tensor(i), reader.shape(i)
                if tensor.dtype.decode() not in ("float16", "bfloat16", "float32", "float64") or len(shape) < 2:
                    with pytest.raises(ReaderError, match=r"can be packed|two or more") as caught:
                        reader.pack(i)
                    assert caught.value.code == ARGUMENT
                    continue
                packed = reader.pack(i)
                dense = np.frombuffer(reader.decode(i, 1), np.float32).reshape(shape)
                if dense.size:
                    assert np.array_equal(packed.dense(), dense.reshape(shape[0], -1), equal_nan=True)
                    n += 1
    assert n > 30


def test_a_weight_in_many_chunks_is_packed_whole(tmp_path):
    w = MicroStructure((4, 4), 0.7, 0.2).project(normal(0, 2050, 4100).float())
    save_compressed({"a": w, "b": w[:7].clone()}, tmp_path / "m.muws", blocks=(4, 4))
    with opened(tmp_path / "m.muws") as reader:
        packed = reader.pack(0)
        assert packed.info.n_bytes < 0.45 * w.nbytes  # 30 % of the blocks, and 6 % for their columns
        x = normal(1, 5, 4100, dtype=torch.float32)
        torch.testing.assert_close(torch.from_numpy(packed.linear(x.numpy())), F.linear(x, w), rtol=1e-4, atol=1e-4)


def test_infinite_inputs_of_pruned_columns_are_not_multiplied(tmp_path):
    w = torch.zeros(8, 8)
    w[:, 4:] = 1.0
    save_compressed({"w": w}, tmp_path / "m.muws", blocks=(4, 4))
    x = np.array([[np.inf, np.nan, 0, 0, 1, 2, 3, 4]], np.float32)
    with opened(tmp_path / "m.muws") as reader:
        assert reader.pack(0).linear(x).tolist() == [[10.0] * 8]
        assert np.isnan(reader.pack(0).linear(x[:, ::-1].copy(), relu=True)).all()


def test_layers_without_inputs_outputs_samples_or_blocks(tmp_path):
    state = {"no inputs": torch.zeros(3, 0), "no outputs": torch.zeros(0, 3), "nothing": torch.zeros(4, 4)}
    save_compressed(state, tmp_path / "m.muws", blocks=(4, 4))
    bias = np.array([1, -2, 3], np.float32)
    with opened(tmp_path / "m.muws") as reader:
        assert reader.pack(0).linear(np.zeros((2, 0), np.float32), bias, relu=True).tolist() == [[1, 0, 3]] * 2
        assert reader.pack(1).linear(np.ones((2, 3), np.float32)).shape == (2, 0)
        assert reader.pack(2).linear(np.ones((2, 4), np.float32)).tolist() == [[0] * 4] * 2
        assert reader.pack(2).linear(np.ones((0, 4), np.float32)).shape == (0, 4)


# ---- memory


def test_packing_stays_within_the_limit_and_takes_no_dense_tensor(tmp_path):
    path = tmp_path / "m.muws"
    w = MicroStructure((4, 4), 0.9, 0.05).project(normal(0, 1024, 2048).float())
    save_compressed({"w": w}, path, blocks=(4, 4))
    with opened(path) as reader:
        packed = reader.pack(0)
        peak, n_bytes = reader.peak_bytes, packed.info.n_bytes
    assert peak < 0.5 * w.nbytes
    with opened(path, peak) as reader:
        assert reader.pack(0).info.n_bytes == n_bytes
        assert reader.peak_bytes <= peak
        kept = [reader.pack(0)]
        with pytest.raises(ReaderError, match=f"at most max_bytes={peak} are allowed") as caught:
            kept += [reader.pack(0) for _ in range(20)]
        assert caught.value.code == TOO_LARGE
        del kept
        reader.pack(0)
    for limit in range(peak // 4, peak, peak // 16):
        with pytest.raises(ReaderError) as caught, opened(path, limit) as reader:
            reader.pack(0)
        assert caught.value.code == TOO_LARGE


@pytest.mark.parametrize("shape", [(3, 20_000), (7, 3001), (3000, 5), (1, 1)], ids=str)
def test_no_call_takes_more_memory_than_was_counted(shape, tmp_path):
    w = normal(0, *shape).float()
    w[:, : shape[1] // 2] = 0
    save_compressed({"w": w}, tmp_path / "m.muws", blocks=(1, 4))
    with opened(tmp_path / "m.muws") as reader:
        for _, _, packed in packs(reader, 0):
            assert_runs(packed, w, 0, sizes=(3, 4, 16, 96, 97))  # the library refuses a call that takes more


def test_a_packed_weight_outlives_its_file_and_serves_threads(tmp_path):
    w = MicroStructure((4, 4), 0.5, 0.3).project(normal(0, 64, 96).float())
    save_compressed({"w": w}, tmp_path / "m.muws", blocks=(4, 4))
    with opened(tmp_path / "m.muws") as reader:
        packed = reader.pack(0, SIGNS)
    inputs = [normal(i, 20, 96, dtype=torch.float32).numpy() for i in range(4)]
    wanted, found = [packed.linear(x) for x in inputs], {}

    def run(i: int) -> None:
        found[i] = [packed.linear(inputs[i]) for _ in range(50)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(y, wanted[i]) for i in range(4) for y in found[i])


# ---- refusals


def test_a_caller_that_is_wrong_is_told(tmp_path):
    path = tmp_path / "m.muws"
    state = {
        "w": torch.ones(6, 4),
        "b": torch.ones(4),
        "q": torch.ones(4, 4, dtype=torch.int8),
        "wide": torch.ones(1, 65537),
    }
    save_compressed(state, path, blocks=(3, 2))
    x = np.ones((1, 4), np.float32)
    with opened(path) as reader:
        packed = reader.pack(0)
        for call, says in (
            (lambda: reader.pack(9), "no tensor 9, the file has 4"),
            (lambda: reader.pack(0, 7), "tensor 'w': 7 is no form of packed weights"),
            (lambda: reader.pack(0, SIGNS), "tensor 'w': it has blocks of 3x2, signs are for"),
            (lambda: reader.pack(1), "tensor 'b': it has 1 axes, a weight has two or more"),
            (lambda: reader.pack(2), "tensor 'q': it is int8, only floating tensors"),
            (lambda: reader.pack(3), "tensor 'wide': it has 65537 inputs, at most 65536"),
            (lambda: packed.linear(x, widths=(5, 6)), "4 inputs and 6 outputs, not 5 and 6"),
            (lambda: packed.linear(x, widths=(4, 4)), "4 inputs and 6 outputs, not 4 and 4"),
        ):
            with pytest.raises(ReaderError, match=says) as caught:
                call()
            assert caught.value.code == ARGUMENT
        assert library().muws_linear(packed.address, None, 4, x.ctypes.data, 6, 1, None, 0, None) == ARGUMENT
        with level("sse9"), pytest.raises(ReaderError, match="MUWS_LEVEL=sse9 is not allowed here"):
            reader.pack(0)
    library().muws_free_packed(None)


def test_a_convolution_that_does_not_fit_is_told(tmp_path):
    path = tmp_path / "m.muws"
    save_compressed({"w": torch.ones(6, 2, 3, 3), "s": torch.ones(4, 4)}, path, blocks=(4, 4))
    x, good = np.ones((1, 2, 5, 5), np.float32), ((3, 3), (1, 1), (0, 0))
    with opened(path) as reader:
        packed = reader.pack(0)
        for shape, out, says in (
            (Conv2d(1, 2, 5, 5, *good), (1, 6, 3, 2), "1 images of 6x3x3, not 36 numbers"),
            (Conv2d(1, 3, 5, 5, *good), (1, 6, 3, 3), "18 columns, not 3 channels of 3x3"),
            (
                Conv2d(1, 2, 2, 5, *good),
                (1, 6, 3, 3),
                "a kernel of 3 with stride 1 and padding 0 does not fit 2 pixels",
            ),
            (Conv2d(1, 2, 5, 5, (3, 3), (0, 1), (0, 0)), (1, 6, 3, 3), "stride 0"),
            (Conv2d(1, 2, 5, 1 << 63, *good), (1, 6, 3, 3), "does not fit 9223372036854775808 pixels"),
            (Conv2d(1 << 63, 2, 5, 5, *good), (1, 6, 3, 3), "9223372036854775808 images"),
            (Conv2d(1, 1 << 63, 5, 5, *good), (1, 6, 3, 3), "9223372036854775808 channels"),
        ):
            with pytest.raises(ReaderError, match=says) as caught:
                packed.conv2d(x, shape, out)
            assert caught.value.code == ARGUMENT
        with pytest.raises(ReaderError, match="packed with MUWS_VALUES"):
            reader.pack(1, SIGNS).conv2d(x, Conv2d(1, 4, 5, 5, (1, 1), (1, 1), (0, 0)), (1, 4, 5, 5))


def test_a_damaged_stream_is_refused(tmp_path):
    path = tmp_path / "m.muws"
    w = MicroStructure((4, 4), 0.5, 0.3).project(normal(0, 64, 96).float())
    save_compressed({"w": w}, path, blocks=(4, 4))
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little") + 200] ^= 1
    with (
        opened(bytes(data)) as reader,
        pytest.raises(ReaderError, match=r"tensor 'w': .*the file is damaged") as caught,
    ):
        reader.pack(0)
    assert caught.value.code == REFUSED


# ---- the example


def test_the_example_runs_a_perceptron_as_torch_does(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(50, 34), torch.nn.ReLU(), torch.nn.Linear(34, 10, bias=False))
    for i, layer in enumerate((model[0], model[2])):
        layer.weight.data = MicroStructure((4, 4), 0.5, 0.3).project(normal(i, *layer.weight.shape).float())
    save_compressed(model, tmp_path / "m.muws", blocks=(4, 4))
    source = (ROOT / "examples" / "07_deploy" / "mlp.c").read_text(encoding="utf-8")
    compiled(source, tmp_path, "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", run=False)
    x = normal(2, 130, 50, dtype=torch.float32)

    def run(*words: object) -> subprocess.CompletedProcess[bytes]:
        command = [tmp_path / "program", *words]
        return subprocess.run(command, input=x.numpy().tobytes(), capture_output=True, check=False)  # noqa: S603

    done = run(tmp_path / "m.muws", "0", "2")
    assert (done.returncode, done.stderr) == (0, b"")
    y = torch.from_numpy(np.frombuffer(done.stdout, np.float32).reshape(130, 10).copy())
    torch.testing.assert_close(y, model(x).detach(), rtol=1e-5, atol=1e-5)
    wrong = run(tmp_path / "m.muws", "2", "0")
    assert (wrong.returncode, wrong.stderr) == (1, b"the layer has 50 inputs and 34 outputs, not 10 and 34\n")
    assert run(tmp_path / "m.muws", "0", "3").returncode == 1
    assert run(tmp_path / "none.muws", "0", "2").returncode == 1


# ---- stored bytes


def assert_sizes(path: Path) -> None:
    info, _ = map_compressed(path)
    with opened(path) as reader:
        assert reader.stored_bytes() == pytest.approx([tensor.n_bytes for tensor in info.tensors], rel=1e-12)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_stored_bytes_are_those_of_the_report(path):
    assert_sizes(path)


def test_stored_bytes_of_other_files(tmp_path):
    path = tmp_path / "m.muws"
    for write in (small_model, newer_model, *(lambda p, seed=seed: random_file(seed, p) for seed in range(20))):
        write(path)
        assert_sizes(path)
    with opened(path) as reader:
        assert library().muws_stored_bytes(reader._file, None, 1, None) == ARGUMENT
