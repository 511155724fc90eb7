"""A checkpoint compressed without training: as small as asked for, and no worse than rounding alone."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from lightning_muws import MicroStructure, inspect_compressed, load_compressed, save_compressed
from lightning_muws.artifact.compress import compress_file
from lightning_muws.errors import SettingError
from tests.support.strategies import normal, same_bytes


def trained(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return weights as training leaves them: rows and columns of unlike size, heavy tails, biases, a counter."""

    def weight(seed: int, rows: int, cols: int) -> torch.Tensor:
        x = (
            normal(seed, rows, cols)
            * normal(seed + 1, rows, 1).exp()
            * (2 * normal(seed + 2, 1, cols // 8)).exp().repeat(1, 8)
        )
        return x.to(torch.float32)

    return {
        "conv.weight": weight(seed, 64, 288).view(64, 32, 3, 3),
        "conv.bias": normal(seed, 64, dtype=torch.float32),
        "linear.weight": weight(seed + 3, 256, 256),
        "head.weight": normal(seed + 9, 64, 256, dtype=torch.float32),
        "norm.running_var": normal(seed + 8, 64).exp().to(torch.float32),
        "norm.num_batches_tracked": torch.tensor(1234567),
    }


def relative_errors(loaded, state) -> dict[str, float]:
    return {
        name: float((loaded[name].double() - x.double()).square().sum() / x.double().square().sum())
        for name, x in state.items()
        if x.ndim > 1
    }


@pytest.mark.parametrize("compression", [4, 8, 12, 20, 40])
def test_the_file_has_the_size_and_loses_no_more_than_rounding_to_as_many_bytes(compression, tmp_path):
    state, path = trained(), tmp_path / "m.muws"
    report = compress_file(state, path, compression)
    dense_bytes = sum(x.nbytes for x in state.values())
    assert report.n_bytes == path.stat().st_size
    assert compression <= dense_bytes / path.stat().st_size <= 1.05 * compression
    lost = relative_errors(load_compressed(path), state)
    assert report.relative_error == pytest.approx(sum(lost.values()) / len(lost), rel=1e-5)
    assert {t.name: t.relative_error for t in report.tensors if t.name in lost} == pytest.approx(lost, rel=1e-5)
    asked = compression
    while True:  # rounding alone, with at least as many bytes
        rounded = save_compressed(state, tmp_path / "rounded.muws", compression=asked)
        if rounded.n_bytes >= report.n_bytes:
            break
        asked *= 0.997
    of_rounding = sum(relative_errors(load_compressed(tmp_path / "rounded.muws"), state).values())
    saved = rounded.n_bytes / report.n_bytes  # squared errors fall as 4 ** -bits
    assert sum(lost.values()) <= 1.02 * of_rounding * 4 ** (32 / compression * (saved - 1))


def test_blocks_are_pruned_where_that_is_cheaper_and_the_gain_is_real(tmp_path):
    state = trained()
    report = compress_file(state, tmp_path / "m.muws", 20)
    rounded = save_compressed(state, tmp_path / "r.muws", compression=report.compression_ratio * 0.98)
    assert rounded.n_bytes > report.n_bytes
    assert sum(tensor.counts[2] for tensor in report.tensors) > 100
    lost, of_rounding = (
        sum(relative_errors(load_compressed(tmp_path / n), state).values()) for n in ("m.muws", "r.muws")
    )
    assert lost < 0.96 * of_rounding


def test_the_recorded_error_is_against_the_weights_that_were_given(tmp_path):
    state = trained()
    compress_file(state, tmp_path / "m.muws", 20)
    loaded = load_compressed(tmp_path / "m.muws")
    for tensor in inspect_compressed(tmp_path / "m.muws").tensors:
        x = state[tensor.name]
        assert float((loaded[tensor.name].double() - x.double()).abs().max()) == tensor.max_error


def test_a_checkpoint_in_several_files_gives_the_file_of_the_same_tensors(tmp_path):
    state = trained()
    names, folder = list(state), tmp_path / "model"
    folder.mkdir()
    for i in range(2):
        save_file({name: state[name] for name in names[i::2]}, folder / f"{i}.safetensors")
    weight_map = {name: f"{i}.safetensors" for i in range(2) for name in names[i::2]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    from_files = compress_file(folder, tmp_path / "a.muws", 12)
    compress_file({t.name: state[t.name] for t in from_files.tensors}, tmp_path / "b.muws", 12)
    assert (tmp_path / "a.muws").read_bytes() == (tmp_path / "b.muws").read_bytes()


def test_what_cannot_be_rounded_keeps_every_bit_and_shared_tensors_stay_shared(tmp_path):
    state = trained() | {
        "ids": torch.arange(5000),
        "mask": normal(0, 40, 40) > 0,
        "empty": torch.empty(0, 7),
        "bad": torch.tensor([[1.0, math.nan], [math.inf, -0.0]]),
        "zero": torch.zeros(64, 64),
        "tiny": torch.full((16, 16), 1e-42),
        "half": normal(0, 64, 64, dtype=torch.float16),
        "eighth": normal(0, 8, 8, dtype=torch.float32).to(torch.float8_e4m3fn),
    }
    state["tied"] = state["linear.weight"]
    torch.save(state, tmp_path / "m.pt")
    report = compress_file(tmp_path / "m.pt", tmp_path / "m.muws", 6)
    loaded = load_compressed(tmp_path / "m.muws")
    assert list(loaded) == list(state)
    for name in ("ids", "mask", "empty", "bad", "zero", "eighth", "norm.num_batches_tracked"):
        assert same_bytes(loaded[name], state[name]), name
    assert loaded["tied"] is loaded["linear.weight"]
    assert 6 <= report.compression_ratio <= 6.3
    torch.testing.assert_close(loaded["norm.running_var"], state["norm.running_var"], rtol=2**-10, atol=0)


def test_weights_that_have_their_structure_already_keep_it(tmp_path):
    structure = MicroStructure((2, 4), 0.6, 0.3)
    state = {"w": structure.project(normal(0, 256, 256, dtype=torch.float32)), "b": torch.ones(8)}
    compress_file(state, tmp_path / "m.muws", 18)
    loaded = load_compressed(tmp_path / "m.muws")["w"]
    kinds = [structure.support(x).kinds for x in (state["w"], loaded)]
    assert torch.equal(*kinds)


def test_equal_checkpoints_give_equal_bytes(tmp_path):
    for name in "ab":
        compress_file(trained(), tmp_path / name, 15)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("compression", [1, 0, -3, math.nan, math.inf, True, "8"])
def test_a_compression_that_is_none_is_refused(compression, tmp_path):
    with pytest.raises(SettingError, match=r"compression=.* is not allowed: give a finite number above 1"):
        compress_file(trained(), tmp_path / "m.muws", compression)


def test_beyond_the_reachable_range_the_old_file_stays(tmp_path):
    (tmp_path / "m.muws").write_bytes(b"before")
    with pytest.raises(SettingError, match=r"compression=9000 cannot be reached.* allows [\d.]+ to [\d.]+,"):
        compress_file(trained(), tmp_path / "m.muws", 9000)
    assert (tmp_path / "m.muws").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["m.muws"]


def test_a_checkpoint_without_anything_to_compress_is_refused_with_what_it_allows(tmp_path):
    for state in ({}, {"ids": torch.arange(100)}):
        with pytest.raises(SettingError, match="cannot be reached"):
            compress_file(state, tmp_path / "m.muws", 2)
    with pytest.raises(SettingError, match=r"block_shape=\(0, 4\) is not allowed"):
        compress_file(trained(), tmp_path / "m.muws", 8, block_shape=(0, 4))
