"""Parts of a choice on two real ranks, as FSDP shards weights: what a rank keeps, and how it is put together again."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_muws import MicroStructure
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.sharded import apply_, gathered, part, whole
from lightning_muws.structure.support import Support
from tests.support.strategies import normal, same_bits

CASES = [((3, 8, 12), 0), ((3, 12, 8), 1), ((1, 8, 12), 0)]  # the second rank has fewer experts, or none


def worker(rank: int, address: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for shape, out_axis in CASES:
        structure, grid = MicroStructure((4, 2), 0.5, 0.25), BlockGrid((4, 2), out_axis, batched=True)
        w = normal(0, *shape, dtype=torch.float32)
        x = distribute_tensor(w.clone(), mesh, [Shard(0)])
        choice = structure.nearest(w, grid)
        mine = part(x, *choice)
        down = grid.counts(shape)[0] // shape[0]
        assert len(mine.support.kinds) == down * len(x.to_local())  # whole experts, and no more
        apply_(x, mine.support, Support.place_, mine.magnitudes)
        assert same_bits(whole(x), choice.place(w))
        again = gathered(x, *mine)
        assert torch.equal(again.support.kinds, choice.support.kinds)
        assert torch.equal(again.support.negative, choice.support.negative)
        assert torch.equal(again.magnitudes, choice.magnitudes)
    dist.barrier()
    dist.destroy_process_group()


def test_each_rank_keeps_the_blocks_of_its_own_experts(tmp_path):
    mp.spawn(worker, (f"file://{tmp_path / 'meeting'}",), nprocs=2)
