"""Structures and plans: worked examples, refusals, and the nearest point against brute force."""

import copy
import itertools
import math
import re

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn.utils import prune

from lightning_muws import LayerRule, MicroStructure, MuwsError, NMStructure
from lightning_muws.errors import PlanError, SettingError, StateError
from lightning_muws.report import make_report
from lightning_muws.structure import assign
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.plan import make_plan
from tests.support.strategies import DTYPES, normal, small_integers

# ---- worked examples


def test_unify_by_hand():
    w = torch.tensor([[3.0, -1.0, 0.0, 4.0]])
    s = MicroStructure((1, 2), unify_ratio=0.5)
    assert s.project(w).tolist() == [[2.0, -2.0, 0.0, 4.0]]
    # one value a block: (3, -1) loses 8 as (1, 1), and (0, 4) loses 8 as (2, 2): a tie, which falls to the first
    assert MicroStructure((1, 2), unify_ratio=0.5, signs="shared").project(w).tolist() == [[1.0, 1.0, 0.0, 4.0]]


def test_prune_by_hand():
    w = torch.tensor([[3.0, -1.0, 0.0, 4.0]])
    assert MicroStructure((1, 2), prune_ratio=0.5).project(w).tolist() == [[0.0, 0.0, 0.0, 4.0]]


def test_of_equal_blocks_the_first_are_pruned():
    z = MicroStructure((1, 1), prune_ratio=0.5).project(torch.ones(2, 4))
    assert z.tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]


def test_joint_choice_beats_pruning_first():
    # Pruning first takes the smallest block (1, 1) for 2, and must then unify (0, 1.5) for 1.125: 3.125 in all.
    w = torch.tensor([[1.0, 1.0, 0.0, 1.5, 9.0, 1.0]])
    z = MicroStructure((1, 2), prune_ratio=1 / 3, unify_ratio=1 / 3).project(w)
    assert z.tolist() == [[1.0, 1.0, 0.0, 0.0, 9.0, 1.0]]  # 2.25 + 0


def test_a_block_of_magnitude_zero_has_no_negative_zero():
    z = MicroStructure((1, 2), unify_ratio=1.0).project(torch.tensor([[-0.0, 0.0]]))
    assert not torch.signbit(z).any()


@pytest.mark.parametrize("scale", [1e30, 1e-18])
def test_weights_whose_squares_overflow_are_ranked_correctly(scale):
    w = normal(0, 8, 8, dtype=torch.float32)
    s = MicroStructure((2, 2), prune_ratio=0.5, unify_ratio=0.25)
    expected = s.support(w)
    assert torch.equal(s.support(w * scale).kinds, expected.kinds)
    torch.testing.assert_close(s.project(w * scale) / scale, s.project(w))


# 3e38, 1e-30 and the like, in units of the largest and of the smallest normal value of a dtype
EXTREMES = [(dtype, scale) for dtype in DTYPES for scale in ("largest", "smallest")]


@pytest.mark.parametrize(("dtype", "scale"), EXTREMES)
@pytest.mark.parametrize("signs", ["free", "shared"])
@pytest.mark.parametrize(("prune_ratio", "unify_ratio"), [(0.0, 1.0), (0.5, 0.25)])
def test_weights_near_the_ends_of_a_dtype_are_projected_as_in_float64(dtype, scale, signs, prune_ratio, unify_ratio):
    unit = normal(0, 16, 16).clamp(-3, 3) / 3
    unit[:4, :4] = 1.0  # a block of the largest value there is
    unit[0, 4] = -1.0
    info = torch.finfo(dtype)
    size = info.max if scale == "largest" else info.tiny / info.eps
    w = (unit * size).to(dtype)
    structure = MicroStructure((4, 4), prune_ratio, unify_ratio, signs)
    exact = w.double() / size  # of ordinary size
    found, expected = structure.project(w), structure.project(exact)
    assert torch.isfinite(found).all()
    assert torch.equal(structure.support(w).kinds, structure.support(exact).kinds)
    torch.testing.assert_close(found.double() / size, expected, rtol=0, atol=4 * info.eps)
    assert torch.equal(structure.project(found), found)
    assert torch.equal(structure.support(w).project(w), found)


def test_the_mean_of_a_block_does_not_overflow():
    w = torch.tensor([[-3e38, 3e38, 3e38, 3e38], [3e38, 3e38, 3e38, 3e38]])
    z = MicroStructure((2, 4), unify_ratio=1.0, signs="shared").project(w)
    assert z.unique().tolist() == pytest.approx([2.25e38])
    assert torch.equal(MicroStructure((2, 4), unify_ratio=1.0).project(w), w)


# ---- against independent methods


def best_unified(block: torch.Tensor, shared: bool) -> float:
    """The squared distance to the nearest block of one magnitude, over all sign patterns."""
    patterns = [(1.0,) * len(block)] if shared else itertools.product((1.0, -1.0), repeat=len(block))
    costs = []
    for pattern in patterns:
        signs = torch.tensor(pattern, dtype=block.dtype)
        magnitude = (signs @ block) / len(block)
        costs.append(float((block - magnitude * signs).square().sum()))
    return min(costs)


@settings(max_examples=150)
@given(
    st.sampled_from([normal, small_integers]),
    st.integers(0, 10**6),
    st.sampled_from([(2, 6, (1, 2)), (4, 6, (2, 2)), (3, 4, (1, 2)), (4, 4, (4, 1))]),
    st.data(),
    st.sampled_from(["free", "shared"]),
)
def test_no_other_choice_of_blocks_is_nearer(make, seed, case, data, signs):
    rows, cols, block_shape = case
    w, grid = make(seed, rows, cols), BlockGrid(block_shape)
    blocks = grid.split(w)
    n = len(blocks)
    n_pruned = data.draw(st.integers(0, n))
    n_unified = data.draw(st.integers(0, n - n_pruned))
    s = MicroStructure(block_shape, n_pruned / n, n_unified / n, signs)
    unify = [best_unified(b, signs == "shared") for b in blocks]
    prune = blocks.square().sum(1).tolist()
    best = min(
        sum(prune[i] for i in p) + sum(unify[i] for i in u)
        for p in itertools.combinations(range(n), n_pruned)
        for u in itertools.combinations(sorted(set(range(n)) - set(p)), n_unified)
    )
    assert float((s.project(w) - w).square().sum()) == pytest.approx(best, abs=1e-9)


@settings(max_examples=80)
@given(st.integers(0, 10**6), st.integers(1, 60), st.booleans(), st.data())
def test_the_chosen_blocks_are_the_optimal_assignment(seed, n, ties, data):
    make = small_integers if ties else normal
    unify_cost, gain = make(seed, n).abs(), make(seed + 1, n).abs()
    n_pruned = data.draw(st.integers(0, n))
    n_unified = data.draw(st.integers(0, n - n_pruned))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            assign, "SAMPLE_ABOVE", data.draw(st.sampled_from([20, 10**9]))
        )  # with and without sampling first
        pruned, unified = assign.cheapest(unify_cost, gain, n_pruned, n_unified)
    assert (int(pruned.sum()), int(unified.sum()), int((pruned & unified).sum())) == (n_pruned, n_unified, 0)
    cost = torch.zeros(n, n, dtype=torch.float64)
    cost[:, :n_pruned] = (unify_cost + gain)[:, None]
    cost[:, n_pruned : n_pruned + n_unified] = unify_cost[:, None]
    best = cost.numpy()[linear_sum_assignment(cost.numpy())].sum()
    assert float((unify_cost + gain)[pruned].sum() + unify_cost[unified].sum()) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("n", [40_000, 200_000])
def test_sampling_does_not_change_the_answer(n, monkeypatch):
    unify_cost, gain = normal(1, n).abs(), normal(2, n).exp()
    quick = assign.cheapest(unify_cost, gain, n // 2, n // 5)
    monkeypatch.setattr(assign, "SAMPLE_ABOVE", 10**9)
    slow = assign.cheapest(unify_cost, gain, n // 2, n // 5)
    assert torch.equal(quick[0], slow[0])
    assert torch.equal(quick[1], slow[1])


@given(st.integers(0, 10**6), st.integers(1, 50), st.data())
def test_smallest_is_a_stable_sort(seed, n, data):
    costs, k = small_integers(seed, n), data.draw(st.integers(0, n))
    expected = torch.zeros(n, dtype=torch.bool)
    expected[costs.argsort(stable=True)[:k]] = True
    assert torch.equal(assign.smallest(costs, k), expected)


@given(st.integers(0, 2**31), st.integers(1, 20_000), st.sampled_from(["normal", "ties", "sorted", "heavy"]), st.data())
def test_kth_is_kthvalue(seed, n, form, data):
    x = normal(seed, n)
    x = {"normal": x, "ties": x.round(), "sorted": x.sort().values, "heavy": x**9}[form]
    k = data.draw(st.integers(1, n))
    assert assign.kth(x, k) == x.kthvalue(k).values


LAYERS = {
    "linear": (nn.Linear(6, 8), (2, 6)),
    "conv1d": (nn.Conv1d(6, 8, 3), (2, 6, 9)),
    "conv2d": (nn.Conv2d(6, 8, 3), (2, 6, 9, 9)),
    "conv3d": (nn.Conv3d(2, 4, 3), (2, 2, 5, 5, 5)),
    "grouped": (nn.Conv2d(6, 8, 3, groups=2), (2, 6, 9, 9)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), (2, 6, 9, 9)),
    "transposed1d": (nn.ConvTranspose1d(6, 8, 3), (2, 6, 9)),
    "transposed2d": (nn.ConvTranspose2d(6, 8, 3, stride=2), (2, 6, 9, 9)),
    "transposed grouped": (nn.ConvTranspose2d(6, 8, 3, groups=2), (2, 6, 9, 9)),
    "transposed3d": (nn.ConvTranspose3d(2, 4, 3), (2, 2, 5, 5, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_row_of_the_matrix_is_one_output(name):
    layer, shape = LAYERS[name]
    grid = make_plan(layer, MicroStructure((1, 1), 0.5)).covered["weight"].grid
    x = normal(0, *shape, dtype=torch.float32)
    before = layer(x)
    outputs = before.shape[1]
    assert grid.matrix_shape(layer.weight.shape)[0] == outputs
    for row in range(outputs):
        matrix = grid.matrix(layer.weight.detach()).clone()
        matrix[row] = 0
        weight = grid.weight(matrix, layer.weight.shape)
        after = torch.func.functional_call(layer, {"weight": weight}, x)
        others = torch.arange(outputs) != row
        assert torch.equal(after[:, others], before[:, others])
        # a transposed convolution may add the bias in another order
        torch.testing.assert_close(after[:, row], layer.bias[row].expand_as(after[:, row]))


# ---- N of M


@settings(max_examples=60)
@given(
    st.integers(0, 10**6), st.sampled_from([normal, small_integers]), st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 5)])
)
def test_no_other_choice_of_n_of_m_is_nearer(seed, make, case):
    n, m = case
    w = make(seed, 3, 2 * m + 1)
    z = NMStructure(n, m).project(w)
    assert torch.equal(z[:, 2 * m :], w[:, 2 * m :])  # the input that fills no group
    for row, group in itertools.product(range(3), range(2)):
        values, found = (x[row, group * m : (group + 1) * m] for x in (w, z))
        assert int((found != 0).sum()) <= n
        best = min(float(values[list(drop)].square().sum()) for drop in itertools.combinations(range(m), m - n))
        assert float((found - values).square().sum()) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_n_of_m_counts_are_those_of_the_plan_and_of_the_report(name):
    layer = LAYERS[name][0]
    plan = make_plan(layer, NMStructure(1, 3))
    entry = plan.covered["weight"]
    choice = entry.structure.nearest(layer.weight, entry.grid)
    assert choice.support.counts() == entry.structure.counts(entry.grid, entry.shape)
    with torch.no_grad():
        layer = copy.deepcopy(layer)
        choice.support.place_(layer.weight, choice.magnitudes)
    report = make_report(layer, plan, {"weight": choice.support}, {"weight": 0.0})
    assert report.layers[0].n_pruned == choice.support.counts()[Kind.PRUNED] == int((layer.weight == 0).sum())
    assert report.layers[0].n_unified == 0
    assert str(plan).splitlines()[2].split()[3:5] == ["1x1", str(report.layers[0].n_pruned)]


def test_n_of_m_is_given_by_rules_too():
    plan = make_plan(Net(), NMStructure(), [LayerRule("out.*", structure=MicroStructure(prune_ratio=0.5))])
    assert plan.covered["out.weight"].grid.block_shape == (4, 4)
    assert plan.covered["conv.weight"].grid.block_shape == (1, 1)
    assert reasons(plan)["small.weight"] == "fewer than 4 inputs"


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (2.0, 4), ("2", 4), (True, 4), (None, 4), (2, [4])])
def test_wrong_n_of_m_are_refused(n, m):
    with pytest.raises(SettingError, match=r"n=.* and m=.* are not allowed"):
        NMStructure(n, m)


# ---- batches of matrices


def experts(kind: str) -> nn.Module:
    """Experts of the transformers library: Mixtral's are (experts, out, in), GPT-OSS's (experts, in, out)."""
    if kind == "mixtral":
        config = transformers.MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=3)
        return transformers.models.mixtral.modeling_mixtral.MixtralExperts(config)
    config = transformers.GptOssConfig(hidden_size=8, intermediate_size=12, num_local_experts=3)
    return transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts(config)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_block_lies_in_one_expert_and_spans_outputs_times_inputs(kind):
    layer = experts(kind)
    plan = make_plan(layer, MicroStructure((4, 2), prune_ratio=0.5))
    assert set(plan.covered) == {"gate_up_proj", "down_proj"}
    for name, entry in plan.covered.items():
        shape = getattr(layer, name).shape
        expert, first, second = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
        output, input_ = (first, second) if kind == "mixtral" else (second, first)
        assert entry.n_blocks * 8 == math.prod(shape)
        assert entry.n_edge == 0
        for index, n_different in ((expert, 1), (output, 4), (input_, 2)):
            assert {len(set(block.tolist())) for block in entry.grid.split(index)} == {n_different}


def test_biases_of_experts_are_biases():
    assert reasons(make_plan(experts("gpt_oss"), MicroStructure(prune_ratio=0.5)))["gate_up_proj_bias"] == "a bias"


class Cube(nn.Module):
    """One weight of three axes."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


@pytest.mark.parametrize(
    ("batched", "counts"), [("auto", (8, 6)), ("out_in", (8, 6)), ("in_out", (12, 4)), ("never", (1, 48))]
)
def test_a_rule_says_how_a_weight_of_three_axes_is_cut(batched, counts):
    rule = LayerRule(structure=MicroStructure((4, 2), prune_ratio=0.5), batched=batched)
    entry = make_plan(Cube(4, 8, 12), MicroStructure(), [rule]).covered["weight"]
    assert entry.grid.counts(entry.shape) == counts


@pytest.mark.parametrize(
    "layer", [nn.Conv1d(4, 8, 3), nn.ConvTranspose1d(4, 8, 3), nn.Bilinear(4, 4, 8), Cube(1, 8, 8)]
)
def test_only_several_matrices_in_a_plain_tensor_are_batched_by_default(layer):
    assert not make_plan(layer, MicroStructure((1, 2), prune_ratio=0.5)).covered["weight"].grid.batched


def test_matrices_that_blocks_do_not_fill_are_left_out_with_the_reason():
    layer = nn.ModuleList([Cube(3, 6, 8), nn.Linear(8, 8)])
    plan = make_plan(layer, MicroStructure((4, 2), prune_ratio=0.5))
    assert reasons(plan)["0.weight"] == "each of its matrices has 6 outputs, which blocks of 4 rows do not fill"
    with pytest.raises(SettingError, match="6 outputs"):
        MicroStructure((4, 2), 0.5).project(torch.ones(3, 6, 8), BlockGrid((4, 2), batched=True))


@pytest.mark.parametrize("out_axis", [0, 1])
@pytest.mark.parametrize("block_shape", [(1, 1), (2, 3), (4, 4)])
def test_a_batch_is_projected_like_its_matrices_below_each_other(out_axis, block_shape):
    w, s = normal(0, 3, 8, 12), MicroStructure(block_shape, 0.4, 0.3)
    grid = BlockGrid(block_shape, out_axis, batched=True)
    matrices = w.transpose(1, 2) if out_axis else w
    expected = s.project(torch.cat(list(matrices))).view(matrices.shape)
    assert torch.equal(s.project(w, grid), expected.transpose(1, 2) if out_axis else expected)


@pytest.mark.parametrize("out_axis", [0, 1])
def test_a_batched_grid_and_its_unbatched_one_have_the_same_borders(out_axis):
    for shape, block_shape in (((3, 8, 12), (4, 4)), ((3, 8, 12), (4, 5)), ((2, 6, 9), (3, 1)), ((3, 8, 12), (1, 8))):
        grid = BlockGrid(block_shape, out_axis, batched=True)
        if not grid.fits(shape):
            continue
        covered = torch.zeros(shape, dtype=torch.int64)
        number = torch.arange(math.prod(grid.counts(shape))).view(-1, 1).expand(-1, grid.block_numel)
        numbered = grid.merge(number + 1, like=covered)  # 0 at the edges
        for block in grid.unbatched(shape).split(numbered):
            assert len(set(block.tolist())) == 1


# ---- refusals


@pytest.mark.parametrize(
    ("settings_", "says"),
    [
        ({"prune_ratio": 1.5}, "prune_ratio=1.5 is not allowed"),
        ({"unify_ratio": -0.1}, "unify_ratio=-0.1 is not allowed"),
        ({"prune_ratio": float("nan")}, "prune_ratio=nan"),
        ({"prune_ratio": "half"}, "prune_ratio='half'"),
        ({"prune_ratio": 0.7, "unify_ratio": 0.7}, "sum to more than 1"),
        ({"block_shape": (0, 4)}, re.escape("block_shape=(0, 4) is not allowed")),
        ({"block_shape": (4, 4, 4)}, re.escape("block_shape=(4, 4, 4)")),
        ({"block_shape": (2.0, 4)}, re.escape("block_shape=(2.0, 4)")),
        ({"block_shape": 4}, "block_shape=4 is not allowed"),
        ({"signs": "none"}, "signs='none' is not allowed"),
        ({"signs": ["free"]}, re.escape("signs=['free'] is not allowed")),
        ({"signs": np.array(["free", "shared"])}, "signs=array"),
        ({"prune_ratio": [0.5]}, re.escape("prune_ratio=[0.5] is not allowed")),
        ({"prune_ratio": True}, "prune_ratio=True"),
        ({"prune_ratio": None}, "prune_ratio=None"),
        ({"prune_ratio": torch.tensor(0.5)}, re.escape("prune_ratio=tensor(0.5000)")),
        ({"prune_ratio": np.float32("nan")}, "prune_ratio=.*nan"),
        ({"prune_ratio": 0.5 + 0j}, re.escape("prune_ratio=(0.5+0j)")),
        ({"block_shape": (True, 4)}, re.escape("block_shape=(True, 4)")),
        ({"block_shape": "44"}, "block_shape='44'"),
        ({"block_shape": None}, "block_shape=None"),
    ],
)
def test_wrong_structures_are_refused(settings_, says):
    with pytest.raises(SettingError, match=says) as caught:
        MicroStructure(**settings_)
    assert isinstance(caught.value, MuwsError)
    assert isinstance(caught.value, ValueError)


def test_numbers_of_numpy_become_plain_numbers():
    s = MicroStructure(np.array([2, 4]), np.float32(0.5), np.float64(0.25))
    assert s == MicroStructure((2, 4), 0.5, 0.25)
    values = (*s.block_shape, s.prune_ratio, s.unify_ratio)
    assert [type(value) for value in values] == [int, int, float, float]
    assert hash(BlockGrid([2, 4])) == hash(BlockGrid((np.int64(2), 4)))


@pytest.mark.parametrize(
    ("settings_", "says"),
    [
        ({"out_axis": 2}, "out_axis=2 is not allowed: give 0 or 1"),
        ({"out_axis": "0"}, "out_axis='0'"),
        ({"groups": 0}, "groups=0"),
        ({"groups": 2.0}, "groups=2.0"),
        ({"batched": "no"}, "batched='no'"),
        ({"batched": True, "groups": 2}, "groups=2"),
    ],
)
def test_wrong_grids_are_refused(settings_, says):
    with pytest.raises(SettingError, match=says):
        BlockGrid(**settings_)


@pytest.mark.parametrize(
    ("settings_", "says"),
    [
        (
            {"structure": 0.8},
            re.escape("structure=0.8 is not allowed: give a structure, such as MicroStructure(prune_"),
        ),
        ({"structure": {"prune_ratio": 0.8}}, "structure={'prune_ratio': 0.8}"),
        ({"structure": MicroStructure}, "structure=<class"),
        ({"structure": None}, "structure=None"),
        ({"name": 3}, "name=3 is not allowed"),
        ({"name": ["a", "b"]}, re.escape("name=['a', 'b'] is not allowed")),
        ({"module_type": nn.Linear}, "give the name of the class, 'Linear'"),
        ({"module_type": 3}, "module_type=3"),
        ({"module_type": nn.Linear(2, 2)}, "module_type=Linear"),
        ({"skip": "no"}, "skip='no' is not allowed: give True or False"),
        ({"skip": 1}, "skip=1"),
        ({"batched": True}, "batched=True"),
        ({"batched": ["auto"]}, "batched="),
    ],
)
def test_wrong_rules_are_refused(settings_, says):
    with pytest.raises(SettingError, match=says):
        LayerRule(**settings_)


@pytest.mark.parametrize(
    ("structure", "rules", "says"),
    [
        (0.8, (), "structure=0.8"),
        (MicroStructure, (), "structure=<class"),
        (MicroStructure(prune_ratio=0.5), LayerRule("out.*"), "rules=LayerRule.* is not allowed: give a list"),
        (MicroStructure(prune_ratio=0.5), "out.*", "rules='out"),
        (MicroStructure(prune_ratio=0.5), 3, "rules=3"),
        (MicroStructure(prune_ratio=0.5), [{"name": "out.*"}], "rules.*{'name': 'out"),
    ],
)
def test_a_plan_refuses_what_is_no_structure_and_no_rule(structure, rules, says):
    with pytest.raises(SettingError, match=says):
        make_plan(Net(), structure, rules)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [(0, 0), (8, 0), (0, 8)])
def test_non_finite_weights_are_refused_by_name(bad, where):
    w = normal(0, 9, 9)
    w[where] = bad
    with pytest.raises(StateError, match=r"encoder\.weight holds 1 values of 81 that are NaN or Inf"):
        MicroStructure((4, 4), 0.5, 0.25).project(w, name="encoder.weight")


def test_a_weight_smaller_than_a_block_is_all_edge():
    w = normal(0, 3, 3)
    assert torch.equal(MicroStructure((4, 4), 1.0).project(w), w)


# ---- the plan


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.conv = nn.Conv2d(4, 8, 3)
        self.up = nn.ConvTranspose2d(8, 4, 3)
        self.norm = nn.LayerNorm((8, 8))
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.lstm = nn.LSTM(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight
        self.small = nn.Linear(2, 2)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.cls_token = nn.Parameter(torch.zeros(1, 4, 8))
        self.out = nn.Linear(8, 8)


def reasons(plan):
    return {name: entry.reason for name, entry in plan.left_out.items()}


def test_by_default_linear_and_convolution_weights_are_covered():
    plan = make_plan(Net(), MicroStructure(prune_ratio=0.5))
    assert list(plan.covered) == [
        "conv.weight", "up.weight", "attention.in_proj_weight", "attention.out_proj.weight",
        "lstm.weight_ih_l0", "lstm.weight_hh_l0", "out.weight",
    ]  # fmt: skip
    why = reasons(plan)
    assert why["embed.weight"] == "an embedding"
    assert "head.weight" not in {**why, **plan.covered}
    assert why["norm.weight"] == "a normalisation"
    assert why["attention.bias_k"] == "a bias"
    assert why["conv.bias"] == "fewer than 2 axes"
    assert why["small.weight"] == "smaller than one block of (4, 4)"
    assert why["frozen.weight"] == "not trained (requires_grad=False)"
    assert why["cls_token"] == "smaller than one block of (4, 4)"
    assert plan.covered["up.weight"].grid.out_axis == 1


def test_the_last_rule_wins():
    one, two = MicroStructure((1, 2), 0.1), MicroStructure((2, 1), 0.2)
    rules = [
        LayerRule("*.weight", structure=one),
        LayerRule("re:(out|conv).weight", structure=two),
        LayerRule("conv.*", skip=True),
    ]
    plan = make_plan(Net(), MicroStructure(prune_ratio=0.5), rules)
    assert plan.covered["out.weight"].structure is two
    assert plan.covered["attention.out_proj.weight"].structure is one
    assert reasons(plan)["conv.weight"] == "a rule skips it"


def test_rules_choose_by_module_type_and_base_class():
    s = MicroStructure((1, 1), 0.5)
    plan = make_plan(Net(), MicroStructure(prune_ratio=0.5), [LayerRule(module_type="_ConvNd", structure=s)])
    assert [n for n, e in plan.covered.items() if e.structure is s] == ["conv.weight", "up.weight"]


def test_an_embedding_is_covered_when_its_type_is_named():
    plan = make_plan(
        Net(), MicroStructure(), [LayerRule(module_type="Embedding", structure=MicroStructure(prune_ratio=0.5))]
    )
    assert list(plan.covered) == ["embed.weight"]


class HeadFirst(nn.Module):
    """Shares its embedding with a layer that comes before it."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 16, bias=False)
        self.words = nn.Embedding(16, 8)
        self.words.weight = self.head.weight
        self.out = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("rule", "covered"),
    [
        (LayerRule("out.*", structure=MicroStructure(prune_ratio=0.5)), False),
        (LayerRule(module_type="Linear", structure=MicroStructure(prune_ratio=0.5)), False),
        (LayerRule("words.*", structure=MicroStructure(prune_ratio=0.5)), False),
        (LayerRule("words.*", "Embedding", MicroStructure(prune_ratio=0.5)), True),
        (LayerRule(module_type="Embedding", structure=MicroStructure(prune_ratio=0.5)), True),
    ],
)
def test_a_weight_shared_with_an_embedding_is_an_embedding(rule, covered):
    plan = make_plan(HeadFirst(), MicroStructure(prune_ratio=0.5), [rule])
    assert ("head.weight" in plan.covered) == covered
    assert covered or reasons(plan)["head.weight"] == "an embedding"
    assert "out.weight" in plan.covered


@pytest.mark.parametrize(("kind", "first", "other"), [(Net, "embed", "head"), (HeadFirst, "head", "words")])
def test_rules_match_a_shared_weight_under_each_of_its_names(kind, first, other):
    for name in (first, other):
        plan = make_plan(kind(), MicroStructure(prune_ratio=0.5), [LayerRule(f"{name}.*", skip=True)])
        assert reasons(plan)[f"{first}.weight"] == "a rule skips it"


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_parts_of_a_computed_weight_are_left_out():
    layers = {
        "weight_norm": nn.utils.weight_norm,
        "spectral_norm": nn.utils.spectral_norm,
        "prune": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
        "parametrized": nn.utils.parametrizations.weight_norm,
    }
    network = nn.ModuleDict({name: change(nn.Linear(8, 8, bias=False)) for name, change in layers.items()})
    network["plain"] = nn.Linear(8, 8, bias=False)
    plan = make_plan(network, MicroStructure(prune_ratio=0.5))
    assert list(plan.covered) == ["plain.weight"]
    assert set(reasons(plan).values()) == {"computed from other parameters"}
    assert len(plan.left_out) == 2 + 1 + 1 + 2


def test_a_rule_that_matches_nothing_lists_near_names():
    with pytest.raises(PlanError, match=r"name='con\.weight'; near names are conv\.weight"):
        make_plan(Net(), MicroStructure(prune_ratio=0.5), [LayerRule("con.weight")])
    with pytest.raises(PlanError, match=r"module_type='Linaer'.*Linear"):
        make_plan(Net(), MicroStructure(prune_ratio=0.5), [LayerRule(module_type="Linaer")])


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (LayerRule("*.bias", structure=MicroStructure(prune_ratio=0.5)), "conv.bias: fewer than 2 axes"),
        (LayerRule("attention.bias_k", structure=MicroStructure(prune_ratio=0.5)), "attention.bias_k: a bias"),
        (LayerRule(module_type="LayerNorm", structure=MicroStructure(prune_ratio=0.5)), "norm.weight: a normalisation"),
        (LayerRule("*.bias"), "conv.bias: fewer than 2 axes"),
    ],
)
def test_a_rule_for_what_no_structure_fits_is_refused_with_the_reason(rule, says):
    with pytest.raises(PlanError, match=says):
        make_plan(Net(), MicroStructure(prune_ratio=0.5), [rule])


def test_a_rule_may_skip_what_no_structure_fits():
    make_plan(Net(), MicroStructure(prune_ratio=0.5), [LayerRule("*.bias", skip=True), LayerRule("norm.*", skip=True)])


def test_a_rule_that_batches_no_weight_of_three_axes_is_refused():
    rule = LayerRule("weight", batched="out_in", structure=MicroStructure(prune_ratio=0.5))
    with pytest.raises(PlanError, match=r"name='weight' has batched='out_in', but it matches no weight of three axes"):
        make_plan(nn.Linear(8, 8), MicroStructure(), [rule])


def test_a_weight_that_no_optimizer_holds_is_left_out_unless_a_rule_names_it():
    net = Net()
    held = [p for name, p in net.named_parameters() if not name.startswith(("out", "lstm"))]
    s = MicroStructure(prune_ratio=0.5)
    plan = make_plan(net, s, optimized=iter(held))
    assert reasons(plan)["out.weight"] == reasons(plan)["lstm.weight_hh_l0"] == "no optimizer trains it"
    assert "conv.weight" in plan.covered
    named = make_plan(net, s, [LayerRule("out.*", structure=s)], optimized=held)
    assert "out.weight" in named.covered
    assert reasons(named)["lstm.weight_hh_l0"] == "no optimizer trains it"
    by_type = make_plan(net, s, [LayerRule(module_type="Linear", structure=s)], optimized=held)
    assert reasons(by_type)["out.weight"] == "no optimizer trains it"
    assert "out.weight" in make_plan(net, s).covered


def test_covering_nothing_is_refused_with_reasons():
    with pytest.raises(
        PlanError, match=r"no parameter of Linear is covered \(weight: prune_ratio and unify_ratio are 0"
    ):
        make_plan(nn.Linear(8, 8), MicroStructure())
    with pytest.raises(PlanError, match="round to none"):
        make_plan(nn.Linear(8, 8), MicroStructure(prune_ratio=0.01))


def test_lazy_parameters_are_refused():
    with pytest.raises(PlanError, match="run one batch"):
        make_plan(nn.LazyLinear(8), MicroStructure(prune_ratio=0.5))


def test_a_wrong_expression_is_refused():
    with pytest.raises(SettingError, match=r"name='re:\(' is no regular expression"):
        LayerRule("re:(")


def test_the_plan_prints_as_a_table():
    lines = str(make_plan(Net(), MicroStructure(prune_ratio=0.5, unify_ratio=0.25))).splitlines()
    assert lines[0].split()[:4] == ["parameter", "shape", "module", "block"]
    conv = next(line for line in lines if line.startswith("conv.weight"))
    assert conv.split() == ["conv.weight", "8x4x3x3", "Conv2d", "4x4", "9", "4", "18", "0"]


def test_edges_are_counted():
    entry = make_plan(nn.Linear(10, 9), MicroStructure(prune_ratio=0.5)).covered["weight"]
    assert (entry.n_blocks, entry.n_edge) == (4, 90 - 64)
    assert entry.structure.support(normal(0, 9, 10)).counts()[Kind.PRUNED] == 2
