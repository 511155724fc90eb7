"""Two real processes under DDP: exact, alike, and refused where they are not."""

import atexit
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from lightning_muws import WeightUnificationCallback, load_compressed
from tests.support.ddp_worker import CASES, Unused
from tests.support.explicit import PHASES
from tests.support.modules import STRUCTURE, Probe, fit
from tests.support.strategies import same_bits

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def launch(module: str, folder: Path, n_ranks: int = 2, **environment: str) -> list[dict]:
    """Run a worker module in real processes and return what each saved."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    workers = [
        subprocess.Popen(command, env={**os.environ, **common, **environment, "LOCAL_RANK": str(rank)}, **pipes)  # noqa: S603  our own
        for rank in range(n_ranks)
    ]
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output[-4000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(n_ranks)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch("tests.support.ddp_worker", tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("case", CASES)
def test_the_penalty_is_the_explicit_one_on_two_ranks(ranks, case):
    for rank in ranks:
        for name, expected in rank[case]["explicit"].items():
            assert (rank[case]["after admm"][name] - expected).abs().max() <= 1e-12, name


@pytest.mark.parametrize("case", CASES)
def test_ranks_hold_the_same_bits(ranks, case):
    one, two = (rank[case] for rank in ranks)
    for name in one["final"]:
        assert same_bits(one["final"][name], two["final"][name]), name
    assert set(one["v"]) == set(one["kinds"])
    for name in one["kinds"]:
        assert same_bits(one["v"][name], two["v"][name]), name
        assert torch.equal(one["kinds"][name], two["kinds"][name])
    assert one["history"] == two["history"]
    assert one["checked"] == two["checked"] > 0


@pytest.mark.parametrize("case", CASES)
def test_the_first_rank_writes_the_file(ranks, case):
    assert [rank[case]["wrote"] for rank in ranks] == [True, False]
    state = load_compressed(ranks[0][case]["file"])
    assert all(same_bits(state[name], weight) for name, weight in ranks[1][case]["final"].items())


def test_a_layer_that_is_never_used_is_compressed_too(ranks):
    weight = ranks[0]["plain"]["final"]["unused.weight"]
    assert (weight == 0).sum() >= weight.numel() / 2


@pytest.mark.filterwarnings(
    "ignore:.*use of fork:DeprecationWarning",
    # lightning 2.6.6 on torch 2.13
    "ignore:torch.distributed.nn.functional.all_gather is deprecated:FutureWarning",
)
@pytest.mark.parametrize(
    "start", ["spawn", pytest.param("fork", marks=pytest.mark.skipif(sys.platform != "linux", reason="needs Linux"))]
)
def test_spawned_and_forked_ranks_bring_their_weights_home(start):
    callback, module = WeightUnificationCallback(STRUCTURE, phases=PHASES), Unused()
    # the callbacks here stay as they were: what they saw, they saw in the other processes
    strategy = DDPStrategy(start_method=start, find_unused_parameters=True, process_group_backend="gloo")
    options = {"strategy": strategy, "devices": 2, "limit_val_batches": 0}
    fit(module, callback, Counting(callback), max_epochs=6, **options)
    for name in ("layer.0.weight", "layer.2.weight", "unused.weight"):
        blocks = STRUCTURE.grid.split(module.get_parameter(name).detach())
        zero = (blocks == 0).all(1)
        assert int(zero.sum()) == len(blocks) // 2
        magnitudes = blocks[~zero].abs()
        assert int((magnitudes == magnitudes[:, :1]).all(1).sum()) >= len(blocks) // 4


class Counting(Probe):
    def on_fit_end(self, trainer, pl_module):
        assert self.n_checked == 2 * 8 * 3
        # or gloo's threads may outlive the interpreter of a spawned process, and abort it
        atexit.register(dist.destroy_process_group)


def test_ranks_that_differ_are_refused(ranks):
    for rank in ranks:
        assert rank["apart"].startswith("the ranks chose different structures (checksums [")
