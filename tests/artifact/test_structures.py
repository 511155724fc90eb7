"""Every structure and every cut of a weight through the file, bit for bit; format 1.0 has no word for a batch."""

import pytest
import torch
from torch import nn

from lightning_muws import LayerRule, MicroStructure, NMStructure, load_compressed, save_compressed
from lightning_muws.structure.plan import make_plan
from tests.support.strategies import normal, same_bits


class Experts(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(0, *shape, dtype=torch.float32))


@pytest.mark.parametrize("batched", ["out_in", "in_out"])
@pytest.mark.parametrize("block_shape", [(4, 4), (2, 5), (1, 8), (8, 3)])
def test_a_batch_of_matrices_comes_back_bit_for_bit_and_small(tmp_path, batched, block_shape):
    module = Experts(5, 32, 48 if batched == "out_in" else 40)
    rule = LayerRule(structure=MicroStructure(block_shape, 0.7, 0.2), batched=batched)
    entry = make_plan(module, MicroStructure(), [rule]).covered["weight"]
    module.weight.data = entry.structure.project(module.weight.data, entry.grid)
    dense = module.weight.numel() * 4
    for name, blocks in (("plan", {"weight": entry.grid}), ("found", None)):
        info = save_compressed(module, tmp_path / name, blocks=blocks)
        assert same_bits(load_compressed(tmp_path / name)["weight"], module.weight.data)
        assert info.n_bytes < 0.35 * dense
    (tensor,) = save_compressed(module, tmp_path / "plan", blocks={"weight": entry.grid}).tensors
    # no zero is left outside the file's pruned blocks
    assert tensor.counts[2] * tensor.block_shape[0] * tensor.block_shape[1] == int((module.weight == 0).sum())


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4)])
def test_n_of_m_comes_back_bit_for_bit_and_small(tmp_path, n, m):
    module = nn.Conv2d(32, 48, 3, bias=False)
    entry = make_plan(module, NMStructure(n, m)).covered["weight"]
    module.weight.data = entry.structure.project(module.weight.data, entry.grid)
    info = save_compressed(module, tmp_path / "m.muws", blocks={"weight": entry.grid})
    weight = load_compressed(tmp_path / "m.muws")["weight"]
    assert same_bits(weight, module.weight.data)
    assert same_bits(entry.structure.project(weight, entry.grid), weight)
    assert info.tensors[0].counts[2] == weight.numel() * (m - n) / m
    assert info.n_bytes < weight.numel() * 4 * (n / m + 0.05)
