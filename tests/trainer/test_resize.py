"""A run goes on with another number of processes: four ranks, then two in the ADMM phase, then one in retraining.

All ranks see the same batches. So gradients are means of equal numbers, and more ranks do what one process does.
"""

import itertools

import pytest
import torch

from tests.support.resize_worker import STRATEGIES
from tests.support.strategies import same_bits
from tests.trainer.test_ranks import launch

pytestmark = pytest.mark.slow
STAGES = (("four", 4, "alone"), ("two", 2, "four"), ("one", 1, "two"))  # a run, its ranks, the run before it
LEFT = {"four": 2, "two": 4}  # the epochs at whose ends a run is left: in the ADMM phase, and in retraining


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What each run came to, and the folder of its checkpoints; ``alone`` is one process in one go."""
    found, folders = {}, {}
    for name, n_ranks, before in (("alone", 1, ""), *STAGES):
        folders[name] = tmp_path_factory.mktemp(name)
        start = {"FROM": f"{folders[before]}/{{}}/epoch={LEFT[before]}.ckpt"} if before in LEFT else {}
        found[name] = launch("tests.support.resize_worker", folders[name], n_ranks, RANKS=str(n_ranks), **start)
    return found, folders


def differing(a: object, b: object, place: str = "") -> list[str]:
    """Return the places at which two nested values differ, tensors by a bit."""
    if isinstance(a, torch.Tensor):
        return [] if same_bits(a, b) else [place]
    if isinstance(a, (list, tuple)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict):
        inner = [differing(a[key], b[key], f"{place}/{key}") for key in a.keys() & b.keys()]
        return [*(f"{place}/{key}" for key in a.keys() ^ b.keys()), *itertools.chain(*inner)]
    return [] if a == b else [f"{place}: {a!r} {b!r}"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("name", "before"), [("two", "four"), ("one", "two")])
def test_fewer_ranks_load_what_more_ranks_saved_bit_for_bit(runs, name, before, strategy):
    found, folders = runs
    saved = torch.load(folders[before] / strategy / f"epoch={LEFT[before]}.ckpt", weights_only=True)
    for rank in found[name]:
        weights, state = rank[strategy]["loaded"]
        assert differing(weights, saved["state_dict"]) == []
        assert differing(state, saved["callbacks"][rank[strategy]["key"]]) == []


@pytest.mark.parametrize(("name", "n_ranks", "_"), STAGES)
def test_replicas_go_on_as_if_nothing_had_happened(runs, name, n_ranks, _):
    expected = runs[0]["alone"][0]["ddp"]
    assert len(runs[0][name]) == n_ranks
    for rank in runs[0][name]:
        assert differing(rank["ddp"] | {"loaded": ()}, expected | {"loaded": ()}) == []


@pytest.mark.parametrize(("name", "n_ranks", "_"), STAGES)
def test_shards_go_on_but_for_the_rounding_of_their_sums(runs, name, n_ranks, _):
    expected = runs[0]["alone"][0]["fsdp"]
    assert len(runs[0][name]) == n_ranks
    for rank in runs[0][name]:
        assert differing(rank["fsdp"]["kinds"], expected["kinds"]) == []
        for weight, value in expected["weights"].items():
            torch.testing.assert_close(rank["fsdp"]["weights"][weight], value, rtol=1e-4, atol=1e-5)
        assert differing(rank["fsdp"]["weights"], runs[0][name][0]["fsdp"]["weights"]) == []
