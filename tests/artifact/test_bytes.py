"""Values of one byte in blocks: quantised weights keep their structure in a small file."""

import lzma

import pytest
import torch

from lightning_muws import MicroStructure, inspect_compressed, load_compressed, save_compressed, verify_compressed
from lightning_muws.structure.grid import BlockGrid
from tests.support import format_reader
from tests.support.strategies import normal, raw_bytes, same_bytes

DTYPES = ["int8", "uint8", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"]


def quantised(dtype: str, size: int = 256) -> torch.Tensor:
    w = MicroStructure((4, 4), 0.5, 0.3).project(normal(0, size, size, dtype=torch.float32))
    if dtype.startswith("float8"):
        return w.to(getattr(torch, dtype))
    steps = (w / w.abs().max() * 127).round()
    return (steps if dtype == "int8" else steps + 128).to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_structured_values_of_one_byte_are_smaller_than_what_lzma_makes_of_them(dtype, tmp_path):
    x = quantised(dtype)
    report = save_compressed({"w": x}, tmp_path / "m.muws")
    verify_compressed(tmp_path / "m.muws")
    info = inspect_compressed(tmp_path / "m.muws")
    assert (info.version, info.tensors[0].stored) == ("1.1", dtype)
    assert same_bytes(load_compressed(tmp_path / "m.muws")["w"], x)
    assert format_reader.read(tmp_path / "m.muws")["w"][2] == raw_bytes(x)
    assert report.n_bytes < len(lzma.compress(raw_bytes(x)))
    if "int" in dtype:
        assert info.tensors[0].block_shape == (4, 4)
        assert info.tensors[0].counts[2] == 2048


@pytest.mark.parametrize("dtype", [*DTYPES, "float8_e8m0fnu"])
def test_every_byte_comes_back_in_any_blocks(dtype, tmp_path):
    x = torch.arange(256, dtype=torch.uint8).repeat(17).view(-1, 64)
    x[5:20, 3:30] = 128
    x[30:50] = 255
    x = x.view(getattr(torch, dtype))
    for grid in (BlockGrid((1, 1)), BlockGrid((4, 4)), BlockGrid((3, 5))):
        save_compressed({"w": x}, tmp_path / "m.muws", blocks={"w": grid})
        assert inspect_compressed(tmp_path / "m.muws").tensors[0].block_shape == grid.block_shape
        assert same_bytes(load_compressed(tmp_path / "m.muws")["w"], x)
        assert format_reader.read(tmp_path / "m.muws")["w"][2] == raw_bytes(x)


def test_bytes_without_structure_and_few_of_them_stay_as_they_are(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {
        "dense": torch.randint(-127, 128, (128, 128), generator=generator).to(torch.int8),
        "small": quantised("int8", 32),
        "flat": quantised("int8").view(-1),
        "ids": quantised("int8").int(),
    }
    save_compressed(state, tmp_path / "m.muws", blocks=(4, 4))
    info = inspect_compressed(tmp_path / "m.muws")
    assert (info.version, {t.stored for t in info.tensors}) == ("1.0", {"bytes"})


@pytest.mark.parametrize("settings", [{"max_error": 0.1, "lossy": "all"}, {"compression": 9}])
def test_they_lose_nothing_in_a_lossy_file(settings, tmp_path):
    state = {"q": quantised("int8"), "w": normal(0, 200, 200, dtype=torch.float32)}
    save_compressed(state, tmp_path / "m.muws", **settings)
    assert same_bytes(load_compressed(tmp_path / "m.muws")["q"], state["q"])
    save_compressed(tmp_path / "m.muws", tmp_path / "n.muws")
    assert inspect_compressed(tmp_path / "n.muws").tensors[0].block_shape == (4, 4)
