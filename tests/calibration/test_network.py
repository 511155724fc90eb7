"""A network fitted layer after layer: the order of layers, batch norms, shared weights, and what cannot be fed."""

import threading

import pytest
import torch
from torch import nn

from lightning_muws.calibration.batches import feed, read_batches
from lightning_muws.calibration.lockstep import walk
from lightning_muws.calibration.norms import running_statistics
from lightning_muws.errors import SettingError, StateError
from tests.support.strategies import normal


def inputs(n: int = 3, *shape: int) -> list[torch.Tensor]:
    return [normal(i, *(shape or (4, 6)), dtype=torch.float32) for i in range(n)]


def test_all_batches_arrive_at_a_layer_before_one_goes_through_it():
    before = threading.enumerate()
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    seen = []

    def visit(name, arrived):
        seen.append((name, len(arrived)))
        nn.init.zeros_(net.get_submodule(name).weight)
        if name == "2":  # the inputs come through the layer that was changed
            assert all(torch.equal(x, net[0].bias.relu().expand(4, 6)) for x in arrived)

    calls = walk({"0": [net[0]], "2": [net[2]]}, [lambda x=x: net(x) for x in inputs()], visit)
    assert seen == [("0", 3), ("2", 3)]
    assert calls == {"0": 1, "2": 1}
    assert not [thread for thread in threading.enumerate() if thread not in before]


def test_batches_that_go_different_ways_all_arrive():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x, first):
            return self.b(self.a(x)) if first else self.a(self.b(x))

    net, seen = Gate(), []
    runs = [lambda first=first: net(torch.ones(1, 2), first) for first in (True, False, True)]
    walk({"a": [net.a], "b": [net.b]}, runs, lambda name, arrived: seen.append((name, len(arrived))))
    assert seen == [("a", 2), ("b", 3)]


def test_a_failing_batch_is_named_with_its_layer_and_no_thread_is_left():
    before = threading.enumerate()
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(6, 5))
    with pytest.raises(StateError, match="calibration batch 0 at layer 1 or behind it: RuntimeError"):
        walk({"0": [net[0]], "1": [net[1]]}, [lambda x=x: net(x) for x in inputs()], lambda *_: None)
    assert not [thread for thread in threading.enumerate() if thread not in before]
    assert not net[0]._forward_pre_hooks


def test_an_error_of_the_visit_ends_all_threads():
    before = threading.enumerate()
    net = nn.Sequential(nn.Linear(6, 6))

    def visit(name, arrived):
        raise StateError("no")

    with pytest.raises(StateError, match="no"):
        walk({"0": [net[0]]}, [lambda x=x: net(x) for x in inputs()], visit)
    assert not [thread for thread in threading.enumerate() if thread not in before]


@pytest.mark.parametrize("shape", [(8, 3), (4, 3, 5), (2, 3, 4, 4)])
def test_running_statistics_are_those_of_torch_over_the_same_batches(shape):
    batches = [normal(i, *shape, dtype=torch.float32) * (i + 1) for i in range(4)]
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    norm = kind(3, momentum=None).train()
    for x in batches:
        norm(x)
    mean, var = running_statistics(batches)
    torch.testing.assert_close(mean, norm.running_mean)
    torch.testing.assert_close(var, norm.running_var)


def test_a_batch_of_one_value_has_no_statistics():
    assert running_statistics([torch.ones(1, 3)]) is None


def test_batches_are_fed_as_their_type_says():
    class Two(nn.Module):
        def forward(self, x, scale=1.0):
            return x * scale

    x = torch.ones(2)
    assert torch.equal(feed(Two(), x), x)
    assert torch.equal(feed(Two(), (x, 3.0, "label")), 3 * x)
    assert torch.equal(feed(Two(), [x]), x)
    assert torch.equal(feed(Two(), {"x": x, "scale": 2.0}), 2 * x)


@pytest.mark.parametrize("given", [torch.ones(3), 5, "text", {"x": torch.ones(1)}])
def test_what_is_no_iterable_of_batches_is_refused(given):
    with pytest.raises(SettingError, match="give an iterable of batches"):
        read_batches(given, torch.device("cpu"))


def test_no_batches_are_refused():
    with pytest.raises(SettingError, match="calibration has no batches"):
        read_batches([], torch.device("cpu"))
