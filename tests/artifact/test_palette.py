"""Values that repeat are stored as indices into the list of their magnitudes, bit for bit."""

import lzma
import math

import pytest
import torch

from lightning_muws import MicroStructure, inspect_compressed, load_compressed, save_compressed, verify_compressed
from lightning_muws.artifact import values, writer
from lightning_muws.errors import FormatError
from lightning_muws.structure.grid import BlockGrid
from tests.support import format_reader
from tests.support.forge import put_together, take_apart
from tests.support.strategies import DTYPES, normal, raw_bytes, same_bytes


def drawn(n: int, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Return a tensor of ``n`` different values that no step explains."""
    at = torch.randint(0, n, shape, generator=torch.Generator().manual_seed(seed))
    return normal(seed, n).to(dtype)[at]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [3, 16, 200, 1000])
def test_any_dtype_comes_back_and_is_small(dtype, n, tmp_path):
    x = drawn(n, 128, 256, dtype=dtype)
    report = save_compressed({"w": x}, tmp_path / "m.muws")
    verify_compressed(tmp_path / "m.muws")
    assert same_bytes(load_compressed(tmp_path / "m.muws")["w"], x)
    assert format_reader.read(tmp_path / "m.muws")["w"][2] == raw_bytes(x)
    entropy = x.numel() * math.log2(n) / 8
    assert report.n_bytes < 1.15 * entropy + 2 * n * x.element_size() + 1000
    if x.element_size() > 2 and n < 1000:
        assert inspect_compressed(tmp_path / "m.muws").tensors[0].stored == "palette"
        assert inspect_compressed(tmp_path / "m.muws").version == "1.1"
        assert report.n_bytes < 1.05 * len(lzma.compress(raw_bytes(x))) + 1000


def test_nan_infinity_and_minus_zero_are_magnitudes_as_others_are(tmp_path):
    values = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, math.pi, -math.e, 1e-42])
    x = values[torch.randint(0, 8, (100, 100), generator=torch.Generator().manual_seed(0))]
    save_compressed({"w": x}, tmp_path / "m.muws")
    assert inspect_compressed(tmp_path / "m.muws").tensors[0].stored == "palette"
    assert same_bytes(load_compressed(tmp_path / "m.muws")["w"], x)
    assert format_reader.read(tmp_path / "m.muws")["w"][2] == raw_bytes(x)


def test_blocks_of_few_values_are_blocks_and_indices(tmp_path):
    structure = MicroStructure((4, 4), 0.5, 0.3)
    w = structure.project(drawn(30, 256, 256))
    magnitudes = drawn(30, 1000).abs().unique()
    nearest = magnitudes[(w.abs()[..., None] - magnitudes).abs().argmin(-1)]
    w = torch.where(w == 0, w, nearest * w.sign())
    report = save_compressed({"w": w}, tmp_path / "m.muws", blocks={"w": BlockGrid((4, 4))})
    (tensor,) = report.tensors
    assert tensor.stored == "palette"
    assert tensor.counts[2] == 2048
    assert same_bytes(load_compressed(tmp_path / "m.muws")["w"], w)
    assert format_reader.read(tmp_path / "m.muws")["w"][2] == raw_bytes(w)


def test_values_that_do_not_repeat_have_no_palette(tmp_path):
    state = {"dense": normal(0, 200, 200, dtype=torch.float32), "short": drawn(5, 30, 30), "ones": torch.ones(5000)}
    save_compressed(state, tmp_path / "m.muws")
    assert "palette" not in {t.stored for t in inspect_compressed(tmp_path / "m.muws").tensors}
    assert inspect_compressed(tmp_path / "m.muws").version == "1.0"


@pytest.mark.parametrize("ratios", [(0.9, 0.08), (0.5, 0.45), (0.95, 0.0), (0.0, 1.0), (0.5, 0.3)])
@pytest.mark.parametrize("n", [20, 10**6])
def test_a_palette_makes_no_file_of_blocks_larger(ratios, n, tmp_path, monkeypatch):
    """Zeros of pruned blocks and equal magnitudes of unified ones repeat, but no stream holds them."""
    w = MicroStructure((4, 4), *ratios).project(drawn(n, 256, 384))
    with_palette = save_compressed({"w": w}, tmp_path / "m.muws", blocks=(4, 4))
    monkeypatch.setattr(values, "_with_palette", lambda x, grid, other: other)
    without = save_compressed({"w": w}, tmp_path / "m.muws", blocks=(4, 4))
    assert with_palette.n_bytes <= without.n_bytes
    if ratios == (0.0, 1.0) or n > 1000:
        assert with_palette.tensors[0].stored == "float32"


def test_all_palettes_together_stay_small(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "PALETTE_BYTES", 2 * 4 * 120)
    state = {f"{i}": drawn(50, 100, 100, seed=i) for i in range(4)}
    save_compressed(state, tmp_path / "m.muws")
    assert [t.stored for t in inspect_compressed(tmp_path / "m.muws").tensors] == ["palette"] * 2 + ["float32"] * 2
    assert all(same_bytes(x, state[name]) for name, x in load_compressed(tmp_path / "m.muws").items())


@pytest.mark.parametrize(
    ("palette", "says"),
    [
        ("", "has the palette '', 1 to 4096 magnitudes of 4 bytes in hex are needed"),
        ("0000803", "has the palette"),
        ("0000", "has the palette"),
        ("zz", "has the palette"),
        ("000080bf", "has the palette"),
        ("00" * 4 * 4097, "has the palette"),
        (3, "palette is '3', a str is needed"),
        ("0000803f", r"has index \d+ of a palette of 1 magnitudes"),
    ],
)
def test_a_palette_that_is_none_is_refused(palette, says, tmp_path):
    save_compressed({"w": drawn(16, 100, 100)}, tmp_path / "m.muws")
    manifest, streams = take_apart((tmp_path / "m.muws").read_bytes())
    manifest["tensors"][0]["palette"] = palette
    (tmp_path / "m.muws").write_bytes(put_together(manifest, streams))
    with pytest.raises(FormatError, match=says):
        load_compressed(tmp_path / "m.muws")
