"""A dry run reads no weight, and what it computes is what a real run keeps and a real file takes."""

import pytest
import torch
from torch import nn

from lightning_muws import CompressionRun, LayerRule, MicroStructure, NMStructure, Phases, dry_run, save_compressed
from lightning_muws.errors import MuwsError, SettingError
from lightning_muws.structure.plan import make_plan

STRUCTURES = [
    MicroStructure((4, 4), 0.5, 0.25),
    MicroStructure((4, 4), 0.9, 0.0),
    MicroStructure((8, 2), 0.0, 1.0),
    MicroStructure((4, 1), 0.25, 0.5, signs="shared"),
]


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(256, 509))


def kept_bytes(*roots: object) -> int:
    """Return the bytes of all tensors that objects hold, each memory once."""
    found, seen, stack = {}, set(), list(roots)
    while stack:
        x = stack.pop()
        if id(x) in seen or isinstance(x, nn.Parameter):
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, dict):
            stack.extend(x.values())
        elif isinstance(x, (list, tuple)):
            stack.extend(x)
        elif type(x).__module__.startswith("lightning_muws"):
            stack.extend(getattr(x, name) for name in (*getattr(x, "__dict__", ()), *getattr(x, "__slots__", ())))
    return sum(found.values())


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_memory_is_what_a_run_keeps(structure, dtype):
    torch.manual_seed(0)
    model = network().to(dtype)
    plan, phases = make_plan(model, structure), Phases(interval="step", admm_start=0, admm_end=2, update_every=1)
    run, timeline = CompressionRun(plan.weights(model), plan.covered, phases), phases.on(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sizes = []
    for step in range(4):
        run.tick(step, timeline, [optimizer])
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        run.before_step(optimizer)
        optimizer.step()
        run.after_step(optimizer)
        sizes.append(kept_bytes(run.method, run.constraint))
    found = dry_run(model, structure).memory
    assert found["admm"] == pytest.approx(sizes[1], rel=0.02)
    assert found["retraining"] == pytest.approx(sizes[-1], rel=0.02)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_lossless_file_of_random_weights_takes_at_most_the_bytes(structure, tmp_path):
    torch.manual_seed(0)
    model = network()
    plan = make_plan(model, structure)
    for name, weight in plan.weights(model).items():
        entry = plan.covered[name]
        weight.data.copy_(entry.structure.project(weight.data, entry.grid, name))
    blocks = {name: entry.grid for name, entry in plan.covered.items()}
    n_bytes = save_compressed(model, tmp_path / "model.muws", blocks=blocks).n_bytes
    assert 0.7 <= n_bytes / dry_run(model, structure).file_bytes <= 1  # exponents of float32 have redundancy


def test_no_weight_is_read_and_shapes_are_enough():
    with torch.device("meta"):
        empty = network()
    for structure in STRUCTURES:
        assert dry_run(empty, structure).to_dict() == dry_run(network(), structure).to_dict()
    assert dry_run(empty, compression=20).to_dict() == dry_run(network(), compression=20).to_dict()


def test_a_compression_says_the_bytes_and_ranks_share_the_memory():
    one, many = (dry_run(network(), compression=10, n_ranks=n) for n in (1, 4))
    dense = sum(x.numel() * x.element_size() for x in network().state_dict().values())
    assert (one.dense_bytes, one.file_bytes) == (dense, dense // 10)
    assert one.memory["admm"] == pytest.approx(4 * many.memory["admm"], rel=0.001)
    assert one.memory["retraining"] == pytest.approx(4 * many.memory["retraining"], rel=0.001)
    assert one.memory["update"] == many.memory["update"] == 13 * 509 * 256  # a layer is gathered whole
    assert one.largest == "3.weight"


def test_a_weight_of_two_layers_counts_once_and_rules_hold():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    apart = dry_run(model, STRUCTURES[0])
    model[1].weight = model[0].weight
    shared = dry_run(model, STRUCTURES[0])
    assert (apart.n_covered, shared.n_covered) == (2 * 4096, 4096)
    assert apart.dense_bytes - shared.dense_bytes == 4 * 4096
    ruled = dry_run(network(), NMStructure(2, 4), [LayerRule("0.*", skip=True)])
    assert list(ruled.plan.covered) == ["3.weight"]


def test_the_table_says_it_for_people():
    text = str(dry_run(network(), compression=20, n_ranks=8))
    assert "20 times smaller" in text
    assert "each of 8 ranks with sharded weights" in text
    assert "3.weight" in text


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"n_ranks": 0, "compression": 20}, "n_ranks=0 is not allowed"),
        ({"n_ranks": True, "compression": 20}, "n_ranks=True is not allowed"),
        ({"compression": 1}, "compression=1 is not allowed"),
        ({}, "prune_ratio and unify_ratio are 0"),
    ],
)
def test_settings_that_say_nothing_are_refused(given, match):
    with pytest.raises(MuwsError, match=match) as caught:
        dry_run(network(), **given)
    assert isinstance(caught.value, SettingError) or not given
