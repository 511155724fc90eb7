"""A file of a requested compression: within 5 % of it, with every structure kept, or refused before it is written."""

import math

import pytest
import torch
from torch import nn

from lightning_muws import MicroStructure, load_compressed, save_compressed
from lightning_muws.errors import SettingError
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.kinds import Kind
from tests.support.strategies import normal

GRID = BlockGrid((4, 4))


class Network(nn.Module):
    """Convolutions, a norm with buffers, a linear layer, a shared weight, and an integer buffer."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.norm = nn.Conv2d(16, 64, 3), nn.BatchNorm2d(64)
            self.linear, self.last = nn.Linear(256, 128), nn.Linear(128, 10)
            self.norm.running_var.copy_(torch.rand(64).exp() * torch.logspace(-4, 1, 64))
        self.shared = self.linear.weight
        self.to(dtype)


def structured(dtype: torch.dtype = torch.float32) -> Network:
    """Return a network of which the linear layer has blocks of all kinds."""
    model = Network(dtype)
    structure = MicroStructure(prune_ratio=0.5, unify_ratio=0.3)
    model.linear.weight.data = structure.project(model.linear.weight.data)
    return model


BLOCKS = {"linear.weight": GRID, "conv.weight": GRID}


@pytest.mark.parametrize("compression", [5, 10, 20, 30])
@pytest.mark.parametrize("make", [Network, structured])
def test_the_file_is_as_much_smaller_as_requested_and_at_most_5_percent_more(compression, make, tmp_path):
    model, path = make(), tmp_path / "m.muws"
    report = save_compressed(model, path, blocks=BLOCKS, compression=compression)
    dense_bytes = sum(x.nbytes for name, x in model.state_dict().items() if name != "shared")
    assert report.n_bytes == path.stat().st_size
    assert compression <= dense_bytes / path.stat().st_size <= 1.05 * compression


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_meet_the_compression_of_their_own_bytes(dtype, tmp_path):
    model = structured(dtype)
    report = save_compressed(model, tmp_path / "m.muws", blocks=BLOCKS, compression=12)
    assert 12 <= report.compression_ratio <= 12 * 1.05
    assert all(x.dtype == model.state_dict()[name].dtype for name, x in load_compressed(tmp_path / "m.muws").items())


@pytest.mark.parametrize("compression", [10, 20, 30])
def test_unified_blocks_keep_one_magnitude_and_their_signs_and_pruned_ones_zero(compression, tmp_path):
    model = structured()
    before = model.linear.weight.detach().clone()
    kinds = MicroStructure(prune_ratio=0.5, unify_ratio=0.3).support(before).kinds.flatten()
    save_compressed(model, tmp_path / "m.muws", blocks=BLOCKS, compression=compression)
    old, new = GRID.split(before), GRID.split(load_compressed(tmp_path / "m.muws")["linear.weight"])
    assert (new[kinds == Kind.PRUNED] == 0).all()
    unified = new[kinds == Kind.UNIFIED]
    assert (unified.abs() == unified[:, :1].abs()).all()
    assert (unified != 0).all()
    assert torch.equal(unified.signbit(), old[kinds == Kind.UNIFIED].signbit())


def test_no_value_moves_by_more_than_its_recorded_error(tmp_path):
    model = structured()
    report = save_compressed(model, tmp_path / "m.muws", blocks=BLOCKS, compression=30)
    loaded = load_compressed(tmp_path / "m.muws")
    errors = {tensor.name: tensor.max_error for tensor in report.tensors}
    errors["linear.weight"] = errors["shared"]  # the first name of the two records it
    for name, x in model.state_dict().items():
        assert float((loaded[name].double() - x.double()).abs().max()) <= errors[name]
    assert errors["linear.weight"] > 0


def test_buffers_keep_their_relative_precision_and_integers_every_bit(tmp_path):
    model = Network()
    save_compressed(model, tmp_path / "m.muws", compression=40)
    loaded = load_compressed(tmp_path / "m.muws")
    torch.testing.assert_close(loaded["norm.running_var"], model.norm.running_var, rtol=2**-10, atol=0)
    assert torch.equal(loaded["norm.num_batches_tracked"], model.norm.num_batches_tracked)
    assert loaded["shared"] is loaded["linear.weight"]


def test_only_weights_lose_anything_if_only_they_may(tmp_path):
    model = Network()
    report = save_compressed(model, tmp_path / "m.muws", compression=10, lossy="weights")
    loaded = load_compressed(tmp_path / "m.muws")
    assert report.compression_ratio >= 10
    for name, x in model.state_dict().items():
        if x.ndim < 2:
            assert torch.equal(loaded[name], x)


def test_a_state_dict_does_not_tell_biases_from_buffers_and_keeps_the_precision_of_both(tmp_path):
    model = Network()
    save_compressed(dict(model.state_dict()), tmp_path / "m.muws", compression=30)
    loaded = load_compressed(tmp_path / "m.muws")
    for name in ("conv.bias", "norm.running_var"):
        torch.testing.assert_close(loaded[name], model.state_dict()[name], rtol=2**-10, atol=1e-7)


def test_a_compression_that_costs_nothing_loses_nothing(tmp_path):
    model = structured()
    lossless = save_compressed(model, tmp_path / "lossless.muws", blocks=BLOCKS).compression_ratio
    assert lossless > 1.3
    report = save_compressed(model, tmp_path / "m.muws", blocks=BLOCKS, compression=1.2)
    assert report.max_error == 0
    loaded = load_compressed(tmp_path / "m.muws")
    assert all(torch.equal(loaded[name], x) for name, x in model.state_dict().items())


def test_values_that_are_not_finite_stay_as_they_are(tmp_path):
    model = Network()
    with torch.no_grad():
        model.last.weight[0, 0], model.last.weight[0, 1] = math.nan, math.inf
    save_compressed(model, tmp_path / "m.muws", compression=10)
    loaded = load_compressed(tmp_path / "m.muws")["last.weight"]
    assert torch.equal(loaded.view(torch.int32), model.last.weight.detach().view(torch.int32))


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30, 1e38])
def test_very_small_and_very_large_weights_survive(scale, tmp_path):
    state = {"a": normal(0, 128, 128, dtype=torch.float32), "b": normal(1, 64, 64, dtype=torch.float64).mul(scale)}
    state["b"] = state["b"].clamp(-3e38, 3e38).to(torch.float32)
    report = save_compressed(state, tmp_path / "m.muws", compression=3)
    loaded = load_compressed(tmp_path / "m.muws")
    assert report.compression_ratio >= 3
    assert loaded["b"].isfinite().all()
    assert loaded["b"].any()


def test_the_steps_lose_less_than_one_relative_error_for_all_at_the_same_size(tmp_path):
    def lost(loaded):
        return sum(
            float((loaded[name] - x).square().sum() / x.square().sum()) for name, x in state.items() if x.ndim > 1
        )

    model = Network()
    state = {name: x for name, x in model.state_dict().items() if name != "shared"}
    state["conv.weight"] = state["conv.weight"] * normal(1, 64, 1, 1, 1, dtype=torch.float32).exp()
    one = save_compressed(state, tmp_path / "one.muws", max_error=0.03, lossy="weights")
    ours = save_compressed(state, tmp_path / "m.muws", compression=one.compression_ratio, lossy="weights")
    assert ours.n_bytes <= one.n_bytes
    assert lost(load_compressed(tmp_path / "m.muws")) < lost(load_compressed(tmp_path / "one.muws"))


def test_beyond_the_reachable_range_nothing_is_written_and_the_range_is_true(tmp_path):
    model, path = structured(), tmp_path / "m.muws"
    path.write_bytes(b"before")
    with pytest.raises(
        SettingError, match=r"compression=5000 cannot be reached.* allows ([\d.]+) to ([\d.]+),"
    ) as error:
        save_compressed(model, path, blocks=BLOCKS, compression=5000)
    assert path.read_bytes() == b"before"
    assert [file.name for file in tmp_path.iterdir()] == ["m.muws"]
    low, high = (float(word.rstrip(",")) for word in str(error.value).split("allows ")[1].split()[:3:2])
    assert save_compressed(model, path, blocks=BLOCKS, compression=0.99 * high).compression_ratio >= 0.99 * high
    assert save_compressed(model, path, blocks=BLOCKS).compression_ratio == pytest.approx(low, rel=0.01)


@pytest.mark.parametrize("compression", [1, 0.5, -3, math.nan, math.inf, True, "20"])
def test_a_compression_that_is_none_is_refused(compression, tmp_path):
    with pytest.raises(SettingError, match=r"compression=.* is not allowed: give a finite number above 1"):
        save_compressed(Network(), tmp_path / "m.muws", compression=compression)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("other", [{"max_error": 0.01}, {"value_dtype": "float16"}])
def test_two_ways_to_lose_precision_are_refused(other, tmp_path):
    with pytest.raises(SettingError, match=r"compression=10, max_error=.* are different ways to lose precision"):
        save_compressed(Network(), tmp_path / "m.muws", compression=10, **other)
    assert not list(tmp_path.iterdir())


def test_the_same_model_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        save_compressed(structured(), tmp_path / name, compression=17)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
