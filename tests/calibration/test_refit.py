"""The refit of one weight: laws, brute force on tiny problems, and the layers whose inputs it needs."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_muws.calibration.layers import columns, layer_grid
from lightning_muws.calibration.moments import Moments, energy, output_error, second_moments, toward_dense
from lightning_muws.calibration.refit import Rate, inverse_factor, nearest, refit
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.kinds import Kind
from tests.support.strategies import normal, same_bits


def moments(seed: int, groups: int, n: int, samples: int = 200, spread: float = 1.0) -> torch.Tensor:
    """Return the moments of inputs that are correlated."""
    mixing = torch.eye(n, dtype=torch.float64) + spread * normal(seed, n, n) / n**0.5
    x = normal(seed + 1, groups, samples, n) @ mixing
    return x.transpose(1, 2) @ x / samples


def block_kinds(weight: torch.Tensor, grid: BlockGrid) -> list[int]:
    blocks = grid.split(weight).abs()
    is_one = (blocks == blocks[:, :1]).all(1)
    return torch.where(is_one, torch.where(blocks[:, 0] == 0, Kind.PRUNED, Kind.UNIFIED), Kind.DENSE).tolist()


def test_an_error_is_put_onto_the_columns_behind_it():
    h = torch.tensor([[[1.0, 0.9], [0.9, 1.0]]])
    # the first column loses 0.4; 0.9 times that goes to the second one: 0.4 + 0.36 rounds to 1
    found = refit(torch.tensor([[0.4, 0.4]]), h, Rate(step=1.0), damping=0.0)
    assert found.tolist() == [[0.0, 1.0]]


@given(st.integers(0, 10**6), st.sampled_from([0.05, 0.3, 1.0]), st.sampled_from([1, 3]))
def test_inputs_without_correlation_round_to_the_nearest(seed, step, groups):
    weight = normal(seed, 6, 7)
    h = torch.diag(normal(seed + 1, 7).abs() + 0.1).expand(groups, 7, 7)
    assert same_bits(refit(weight, h, Rate(step)), nearest(weight, step, None, None, False))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2]), st.sampled_from([0.1, 0.5]), st.booleans())
def test_the_refitted_weight_has_no_larger_error_than_the_nearest_one(seed, groups, step, is_cut):
    weight, h = normal(seed, 8, 12), moments(seed, groups, 12)
    grid = BlockGrid((2, 2))
    kinds = torch.arange(24).remainder(3).view(4, 6).to(torch.uint8) if is_cut else None
    found = refit(weight, h, Rate(step), grid if is_cut else None, kinds)
    plain = nearest(weight, step, grid if is_cut else None, kinds, False)
    assert energy(weight - found, h) <= energy(weight - plain, h)


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=30, deadline=None)
def test_values_are_steps_and_blocks_have_the_given_kinds(seed, shares_signs):
    weight, grid, step = normal(seed, 9, 11), BlockGrid((2, 3)), 0.125
    kinds = torch.randint(0, 3, (4, 3), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    rate = Rate(step, shares_signs=shares_signs)
    for found in (
        refit(weight, moments(seed, 1, 11), rate, grid, kinds),
        nearest(weight, step, grid, kinds, shares_signs),
    ):
        assert torch.equal(found, (found / step).round() * step)
        assert not (found.signbit() & (found == 0)).any()
        for kind, given_kind in zip(block_kinds(found, grid), kinds.flatten().tolist(), strict=True):
            assert kind == given_kind or given_kind == Kind.DENSE  # a dense block may round to one magnitude
        if shares_signs:
            unified = grid.split(found)[kinds.flatten() == Kind.UNIFIED]
            assert (unified == unified[:, :1]).all()


@pytest.mark.parametrize("seed", range(20))
def test_the_error_is_near_the_least_of_all_weights(seed):
    weight, h = normal(seed, 1, 4), moments(seed, 1, 4, spread=2.0)
    near = torch.tensor(list(product(range(-4, 5), repeat=4)), dtype=torch.float64) + weight.round()
    apart = weight - near
    best = float(((apart @ h[0]) * apart).sum(1).min())
    found = energy(weight - refit(weight, h, Rate(1.0), damping=0.0), h)
    assert best <= found + 1e-12
    assert found <= 2.5 * best


def test_on_average_half_of_what_rounding_loses_is_won_back():
    lost = [[], []]
    for seed in range(40):
        weight, h = normal(seed, 4, 16), moments(seed, 1, 16, spread=2.0)
        lost[0].append(energy(weight - refit(weight, h, Rate(0.5)), h))
        lost[1].append(energy(weight - nearest(weight, 0.5, None, None, False), h))
    assert sum(lost[0]) < 0.5 * sum(lost[1])


def test_a_dearer_bit_makes_more_zeros_and_pruned_blocks():
    weight, h, grid = normal(0, 32, 32), moments(0, 1, 32), BlockGrid((4, 4))
    found = [refit(weight, h, Rate(0.5, bit, (1.0, 2.0, 3.0), 4.0), grid) for bit in (1e-4, 0.3, 3.0)]
    zeros = [int((x == 0).sum()) for x in found]
    assert zeros[0] < zeros[1] < zeros[2]
    assert block_kinds(found[0], grid).count(Kind.PRUNED) < block_kinds(found[2], grid).count(Kind.PRUNED)


def test_the_last_column_takes_any_value_and_the_mean_error():
    x = normal(1, 500, 5) + 1.0
    ones = torch.cat([x, x.new_ones(500, 1)], 1)
    h = (ones.T @ ones / 500)[None]
    weight = normal(2, 3, 6)
    found = refit(weight, h, Rate(0.5), n_free=1, damping=1e-9)
    assert torch.equal(found[:, :5], (found[:, :5] * 2).round() / 2)
    torch.testing.assert_close((ones @ found.T).mean(0), (ones @ weight.T).mean(0))


def test_panels_change_no_bit_of_the_result():
    weight, h = normal(3, 4, 300), moments(3, 1, 300, samples=900)
    from lightning_muws.calibration import refit as module

    usual = refit(weight, h, Rate(0.25))
    wide = module.PANEL
    try:
        module.PANEL = 10**6
        one = refit(weight, h, Rate(0.25))
    finally:
        module.PANEL = wide
    assert (usual == one).float().mean() > 0.99  # sums in another order may tip a value
    torch.testing.assert_close(energy(weight - usual, h), energy(weight - one, h), rtol=0.02, atol=0)


def test_the_factor_is_that_of_the_inverse():
    h = moments(5, 2, 9)
    factor = inverse_factor(h, damping=0.0)
    torch.testing.assert_close(factor.transpose(1, 2) @ factor @ h, torch.eye(9, dtype=torch.float64).expand(2, -1, -1))
    assert not factor.tril(-1).any()


def test_the_factor_of_no_inputs_exists():
    assert torch.isfinite(inverse_factor(torch.zeros(1, 3, 3))).all()


LAYERS = [
    (nn.Linear(5, 7), (2, 3, 5)),
    (nn.Conv2d(6, 8, 3, 2, 1, groups=2, dilation=2), (2, 6, 9, 11)),
    (nn.Conv1d(4, 4, 3, padding="same", padding_mode="reflect"), (2, 4, 9)),
    (nn.Conv2d(6, 6, 3, groups=6), (6, 9, 11)),
    (nn.Conv3d(2, 3, 2), (2, 2, 4, 5, 6)),
    (nn.ConvTranspose2d(6, 8, 3, 2, 1, output_padding=1, groups=2), (2, 6, 5, 4)),
    (nn.ConvTranspose2d(6, 8, (3, 2), 2, dilation=2), (2, 6, 5, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "")
def test_a_layer_is_its_matrix_times_its_columns(layer, shape):
    layer, x = layer.double(), normal(0, *shape)
    matrix, groups = layer_grid(layer).matrix(layer.weight.detach()), getattr(layer, "groups", 1)
    found = torch.cat(list(columns(layer, x)))
    y = torch.einsum("sgn,gon->sgo", found, matrix.view(groups, len(matrix) // groups, -1)).flatten(1) + layer.bias
    expected = layer(x).detach()
    if not isinstance(layer, nn.Linear):
        expected = (expected if x.ndim == layer.weight.ndim else expected[None]).movedim(1, -1)
    torch.testing.assert_close(y.detach(), expected.reshape(-1, len(matrix)))


def test_columns_come_in_slabs_that_hold_the_same_samples(monkeypatch):
    layer, x = nn.Conv2d(3, 4, 3, padding=1), normal(0, 3, 3, 8, 8, dtype=torch.float32)
    (whole,) = columns(layer, x)
    monkeypatch.setattr("lightning_muws.calibration.layers.SLAB_NUMEL", 500)
    slabs = list(columns(layer, x))
    assert len(slabs) > 3
    assert all(slab.numel() <= 500 for slab in slabs)
    assert torch.equal(torch.cat(slabs), whole)


def test_a_convolution_has_the_moments_of_the_linear_layer_on_its_unfolded_inputs():
    layer, x = nn.Conv2d(3, 4, 3, padding=1, stride=2), normal(0, 2, 3, 9, 9, dtype=torch.float32)
    unfolded = torch.nn.functional.unfold(x, 3, padding=1, stride=2).transpose(1, 2)
    found = second_moments(layer, [(x, x)], has_bias=True)
    expected = second_moments(nn.Linear(27, 4), [(unfolded, unfolded)], has_bias=True)
    torch.testing.assert_close(found.own, expected.own)


def test_moments_are_means_over_all_samples():
    parts = [normal(i, n, 4, dtype=torch.float32) for i, n in enumerate((3, 9))]
    found = second_moments(nn.Linear(4, 2), [(x, 2 * x) for x in parts], has_bias=False)
    x = torch.cat(parts)
    torch.testing.assert_close(found.own[0], x.T @ x / 12)
    torch.testing.assert_close(found.cross[0], 2 * x.T @ x / 12)
    assert second_moments(nn.Linear(4, 2), [], has_bias=False) is None


def test_a_weight_moved_toward_the_dense_outputs_is_their_least_squares_fit():
    x, dense, weight = normal(0, 400, 6), normal(1, 400, 6), normal(2, 3, 6)
    dense = dense + 2 * x
    found = Moments((x.T @ x / 400)[None], (dense.T @ x / 400)[None], 400)
    expected = torch.linalg.lstsq(x, dense @ weight.T).solution.T
    torch.testing.assert_close(toward_dense(weight, found, 0.0), expected)
    error = (dense @ weight.T - x @ expected.T).square().sum(1).mean()
    size = (dense @ weight.T).square().sum(1).mean()
    torch.testing.assert_close(output_error(weight, expected, found, float(size)), float(error))


def test_fewer_samples_are_trusted_less():
    few, many = (second_moments(nn.Linear(4, 2), [(x, x)], False).damping for x in (normal(0, 8, 4), normal(0, 800, 4)))
    assert few == pytest.approx(0.01 + 2 * 4 / 8)
    assert many == pytest.approx(0.01 + 2 * 4 / 800)
