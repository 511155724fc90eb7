"""FSDP2 with two real processes: the same as one process, the constraint exact, nothing gathered for good."""

import pytest
import torch

from lightning_muws import load_compressed
from tests.support.strategies import same_bits
from tests.trainer.test_ranks import launch

pytestmark = pytest.mark.slow
CASES = [(unified, optimizer) for unified in ("tied", "frozen") for optimizer in ("sgd", "adam")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch("tests.support.fsdp_worker", tmp_path_factory.mktemp("fsdp"), SHARDED="1")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return launch("tests.support.fsdp_worker", tmp_path_factory.mktemp("alone"), n_ranks=1, SHARDED="0")[0]


@pytest.mark.parametrize("case", CASES)
def test_the_constraint_is_exact_on_shards(ranks, case):
    for rank in ranks:
        assert len(rank[case]["errors"]) == 3 * 8 * 3
        assert all(error == 0 for error in rank[case]["errors"])


@pytest.mark.parametrize("case", CASES)
def test_the_file_holds_whole_weights(ranks, case):
    state = load_compressed(ranks[0][case]["file"])
    for name, weight in ranks[1][case]["weights"].items():
        assert same_bits(state[name], weight), name


@pytest.mark.parametrize("case", CASES)
def test_v_and_the_moments_stay_sharded(ranks, case):
    for rank in ranks:
        assert rank[case]["sharded"]
        assert all(rank[case]["sharded"])


@pytest.mark.parametrize("case", CASES)
def test_each_rank_keeps_its_half_of_the_choices(ranks, case):
    for rank in ranks:
        assert set(rank[case]["rows"]) == {16 // 4 // 2}


@pytest.mark.parametrize("case", CASES)
def test_shards_choose_what_one_process_chooses(ranks, alone, case):
    one, two = (rank[case] for rank in ranks)
    for name, kinds in alone[case]["kinds"].items():
        assert torch.equal(one["kinds"][name], kinds)
        assert torch.equal(two["kinds"][name], kinds)
    assert one["history"] == two["history"]
    for name, weight in alone[case]["weights"].items():
        assert same_bits(one["weights"][name], two["weights"][name])
        # gradients are averaged over ranks, which rounds
        torch.testing.assert_close(one["weights"][name], weight, rtol=1e-4, atol=1e-5)
