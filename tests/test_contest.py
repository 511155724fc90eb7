"""`make bench-peers`: files come back as they were, training is Lightning's, and an interrupted bench goes on."""

import copy
import doctest
import importlib
import math
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

EXAMPLES = Path(__file__).parents[1] / "examples"
FAMILIES = ("dense", "quantised", "sparse", "pruners", "ours")


@pytest.fixture(scope="module")
def contest():
    """The module of the bench; what it imports is forgotten afterwards, as its names are those of anybody's modules."""
    before = set(sys.modules)
    sys.path[:0] = [str(EXAMPLES / "benchmarks"), str(EXAMPLES)]
    try:
        yield importlib.import_module("contest")
    finally:
        del sys.path[:2]
        for name in set(sys.modules) - before:
            if str(EXAMPLES) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


@pytest.fixture
def data(contest):
    images = torch.randn(384, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    labels = (images.mean((1, 2, 3)) > 0).long()
    split = sys.modules["example_data"].Split(images, labels)
    return sys.modules["example_data"].Images(split, split)


@pytest.mark.parametrize("name", ["packed", "sparse", "pruners", "pictures"])
def test_the_examples_in_docstrings_are_right(contest, name):
    found = doctest.testmod(importlib.import_module(f"contestants.{name}"))
    assert found.attempted
    assert not found.failed


@given(st.lists(st.tuples(st.integers(0, 800), st.integers(-128, 127)), max_size=20), st.integers(0, 600))
def test_gaps_lead_back_to_the_codes(contest, runs, n_last):
    packed = importlib.import_module("contestants.packed")
    codes = np.array([code for n, value in runs for code in (*([0] * n), value)] + [0] * n_last, np.int8)
    gaps, values = packed.with_gaps(codes)
    assert np.array_equal(packed.without_gaps(gaps, values, len(codes)), codes)
    assert np.count_nonzero(values) == np.count_nonzero(codes)


@pytest.mark.parametrize("layout", ["codes", "gaps"])
def test_a_packed_file_returns_each_tensor(contest, layout):
    packed = importlib.import_module("contestants.packed")
    codes = torch.randint(-128, 128, (7, 300), generator=torch.Generator().manual_seed(0)) * (
        torch.arange(300) % 9 == 0
    )
    state = {"w": codes * 0.375, "exact": torch.rand(5), "count": torch.tensor(3), "half": torch.rand(2, 2).half()}
    for packer in packed.PACKERS:
        found = packed.read(packed.written(state, {"w": 0.375}, packer, layout))
        assert found.keys() == state.keys()
        for name, x in state.items():
            assert torch.equal(found[name], x.float() if name == "w" else x)
            assert found[name].shape == x.shape


@pytest.mark.parametrize("bits", ["8", "4", "3", "2", "ternary"])
def test_a_file_holds_the_network_that_was_trained_on_a_grid(contest, data, bits):
    quantised = importlib.import_module("contestants.quantised")
    arena = importlib.import_module("contestants.arena")
    torch.manual_seed(0)
    model = sys.modules["networks"].ConvNet(width=4)
    grids = quantised.on_grids(model, quantised.LEVELS[bits])
    steps = [grid.step.item() for grid in grids.values()]
    arena.fit(model, data, 1)
    assert all(grid.step.item() != step for grid, step in zip(grids.values(), steps, strict=True))
    expected = model(data.test.images).detach()
    files = quantised.stored(model, grids)
    assert len(model.features[2].weight.unique()) <= 1 + quantised.LEVELS[bits][1] - quantised.LEVELS[bits][0]
    for file in files:
        model.load_state_dict(dict(file.state))
        assert torch.allclose(model(data.test.images), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(files[0].state[name], x) for name, x in files[1].state.items())


def test_the_gradient_passes_a_grid_straight_through_inside_its_levels(contest):
    grid = importlib.import_module("contestants.quantised").Grid(torch.tensor([0.5, -0.5]), (-2, 1))
    grid.log_step.data.fill_(math.log(0.5))
    weight = torch.tensor([0.2, 0.3, 5.0, -0.6], requires_grad=True)
    values = grid(weight)
    values.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert values.tolist() == pytest.approx([0.0, 0.5, 0.5, -0.5])
    assert weight.grad.tolist() == [1.0, 2.0, 0.0, 4.0]  # nothing where a weight lies beyond the levels


@given(st.lists(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=9), min_size=1, max_size=4), st.floats(0, 1))
def test_global_masks_prune_the_smallest_of_all(contest, layers, share):
    weights = [torch.tensor(layer) for layer in layers]
    masks = importlib.import_module("contestants.sparse").global_masks(weights, share)
    kept = torch.cat([w[mask] for w, mask in zip(weights, masks, strict=True)]).abs()
    pruned = torch.cat([w[~mask] for w, mask in zip(weights, masks, strict=True)]).abs()
    assert len(pruned) >= round(share * (len(kept) + len(pruned)))
    assert not len(kept) or not len(pruned) or kept.min() > pruned.max()


def test_training_without_lightning_is_training_with_it(contest, data):
    arena = importlib.import_module("contestants.arena")
    torch.manual_seed(0)
    model = sys.modules["networks"].ConvNet(width=4)
    other = copy.deepcopy(model)
    L.seed_everything(1, verbose=False)
    arena.fit(model, data, 2)
    L.seed_everything(1, verbose=False)
    sys.modules["fitting"].train(other, data, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_an_interrupted_bench_goes_on(contest, tmp_path):
    path = tmp_path / "results.jsonl"
    keys = contest.jobs(["lossy/0.1", "qat"], ["demo"], [0, 1])
    assert len(keys) == 2 * 6
    rows = [dict(zip(contest.KEYS, key, strict=True)) | {"accuracy": 0.5} for key in keys]
    assert contest.kept(path) == {}
    contest.keep(path, rows[0] | {"failed": "no memory"})
    with path.open("a") as file:
        file.write('{"contestant": "qat", "sett')  # killed here
    contest.keep(path, rows[0])
    contest.keep(path, rows[1])
    assert contest.kept(path) == dict(zip(keys[:2], rows[:2], strict=True))


def test_an_unknown_contestant_is_refused(contest):
    with pytest.raises(SystemExit, match="there is no contestant 'nobody'; there are dense"):
        contest.jobs(["nobody"], ["demo"], [0])


def test_each_tool_that_is_installed_is_a_contestant(contest):
    environments = importlib.import_module("contestants.environments")
    assert set(environments.PACKAGES) < set(contest.CONTESTANTS)
    assert environments.ready("dense", Path("nowhere")) is None


def test_a_run_is_its_last_line_or_the_reason_why_it_failed(contest):
    key = ("lossy", "0.1", "demo", 0)
    row = dict(zip(contest.KEYS, key, strict=True))
    fails = contest.run(key, ("-c", "import sys; sys.exit('no memory is left')"))
    assert fails == {**row, "failed": "no memory is left"}
    works = contest.run(key, ("-c", "import sys; print('a tool says a word'); print('{\"n_bytes\": 3}')"))
    assert works == {**row, "n_bytes": 3}


def test_the_table_and_the_pictures_show_what_ran(contest, tmp_path):
    row = {"network": "demo", "n_bytes": 1000, "ratio": 10.0, "ms": 0.5, "speedup": 1.0, "how": "muws"}
    rows = [{**row, "contestant": "blocks", "setting": "10", "seed": s, "accuracy": 0.9 + s / 100} for s in (0, 1)]
    rows += [{"network": "demo", "contestant": "inc", "setting": "90", "seed": 0, "failed": "no compiler"}]
    table = contest.table_of(rows, "demo")
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["blocks", "inc"]
    assert cells[4] == ["90.50 +- 0.71 (90.00 91.00)", "did not run"]
    assert cells[-1] == ["muws", "no compiler"]
    pictures = importlib.import_module("contestants.pictures")
    for key in pictures.AXES:
        pictures.draw(rows, key, tmp_path / f"{key}.png")
        assert (tmp_path / f"{key}.png").read_bytes().startswith(b"\x89PNG")
