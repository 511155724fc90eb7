"""The block maps of a file and the bytes of each tensor: against the decoded weights, and against the writer."""

import dataclasses
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_muws import inspect_compressed, load_compressed, save_compressed
from lightning_muws.artifact.maps import map_compressed
from lightning_muws.errors import FormatError
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.kinds import Kind
from tests.support.forge import newer_model, put_together, small_model, take_apart

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.muws"))


def kinds_by_hand(weight: torch.Tensor, block_shape: tuple[int, int]) -> np.ndarray:
    """Return the kind of each block of a decoded weight, from its values."""
    grid = BlockGrid(block_shape)
    blocks = grid.split(weight.double()).abs()
    least, most = blocks.amin(1), blocks.amax(1)
    kinds = torch.where(least == most, int(Kind.UNIFIED), int(Kind.DENSE)).masked_fill(most == 0, int(Kind.PRUNED))
    return kinds.view(grid.counts(weight.shape)).numpy()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_maps_show_the_kinds_of_the_decoded_blocks(path):
    state, (info, maps) = load_compressed(path), map_compressed(path)
    blocked = {tensor.name: tensor for tensor in info.tensors if tensor.block_shape}
    assert set(maps) == set(blocked)
    for name, found in maps.items():
        assert found.totals == blocked[name].counts
        if state[name].is_floating_point():
            shown = found.counts.argmax(axis=2)
            assert found.is_exact
            assert np.array_equal(shown, kinds_by_hand(state[name], blocked[name].block_shape))


@pytest.mark.parametrize("make", [small_model, newer_model])
def test_the_bytes_of_a_tensor_are_those_that_the_writer_estimates(make, tmp_path):
    path = tmp_path / "m.muws"
    saved = save_compressed(make(path), path)
    info, _ = map_compressed(path)
    assert [t.n_bytes for t in info.tensors] == pytest.approx([t.n_bytes for t in saved.tensors])
    unsized = tuple(dataclasses.replace(tensor, n_bytes=0.0) for tensor in info.tensors)
    assert dataclasses.replace(info, tensors=unsized) == inspect_compressed(path)


@pytest.mark.slow
def test_a_tensor_over_several_chunks_has_one_map(tmp_path):
    weight = torch.zeros(4100, 2562)  # 42 MB: two chunks, with edges
    weight[::60, ::32] = torch.arange(1.0, 82)
    path = tmp_path / "m.muws"
    saved = save_compressed({"w": weight}, path, blocks=(4, 4))
    manifest, _ = take_apart(path.read_bytes())
    assert len(manifest["chunks"]) == 2
    info, maps = map_compressed(path, most=10_000)
    assert np.array_equal(maps["w"].counts.argmax(axis=2), kinds_by_hand(weight, (4, 4)))
    assert info.tensors[0].n_bytes == pytest.approx(saved.tensors[0].n_bytes)
    assert max(map_compressed(path)[1]["w"].counts.shape) <= 192


def test_damaged_kinds_lying_counts_and_too_many_bytes_are_refused(tmp_path):
    path = tmp_path / "m.muws"
    small_model(path)
    manifest, streams = take_apart(path.read_bytes())
    with pytest.raises(FormatError, match="raise max_bytes"):
        map_compressed(path, max_bytes=100)
    path.write_bytes(put_together(manifest, {**streams, "c0.kinds": b"\1" + streams["c0.kinds"][1:]}))
    with pytest.raises(FormatError, match="the file is damaged"):
        map_compressed(path)
    manifest["chunks"][0]["streams"]["kinds"] = ["raw", zlib.crc32(bytes(82))]
    path.write_bytes(put_together(manifest, {**streams, "c0.kinds": bytes(82)}))
    with pytest.raises(FormatError, match="the manifest declares"):
        map_compressed(path)
