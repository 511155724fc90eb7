"""Each setting refuses a wrong type or value by one clear error when it is made."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from lightning_muws import CompressionRun, MicroStructure, Penalty, Phases, Retraining
from lightning_muws.errors import SettingError
from lightning_muws.structure.plan import make_plan
from lightning_muws.training.phases import Timeline

NO_NUMBERS = ["1e-3", None, True, False, math.nan, math.inf, -1, [1], (0.5,), {}, Fraction(1, 2), 1j, object]
NO_NUMBERS += [np.float32(0.5), np.float64(0.5), np.int64(1), np.array(0.5), torch.tensor(0.5)]
NO_WORDS = ["", "Epoch", "tide", 1, 0.5, None, True, ["epoch"], {}, b"epoch", object]
NUMBERS = {
    Penalty: ["rho", "rho_growth", "rho_max"],
    Phases: ["admm_start", "admm_end", "update_every"],
    Retraining: ["lr"],
}
WORDS = {Phases: ["interval", "method"], Penalty: ["balance"], Retraining: ["unified", "schedule"]}


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NUMBERS.items() for name in names])
def test_a_setting_that_is_a_number_refuses_all_else(kind, name, value):
    with pytest.raises(SettingError) as error:
        kind(**{name: value})
    assert str(error.value).startswith(f"{name}={value!r} is not allowed: ")


@pytest.mark.parametrize("value", NO_WORDS, ids=repr)
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in WORDS.items() for name in names])
def test_a_setting_that_is_a_word_refuses_all_else(kind, name, value):
    with pytest.raises(SettingError) as error:
        kind(**{name: value})
    assert str(error.value).startswith(f"{name}={value!r} is not allowed: give '")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"phases": 5}, r"phases=5 is not allowed: give a Phases, such as Phases\("),
        ({"phases": None}, "phases=None is not allowed"),
        ({"retraining": "tied"}, r"retraining='tied' is not allowed: give a Retraining, such as Retraining\(unified"),
        ({"retraining": Penalty()}, r"retraining=Penalty\(.*is not allowed: give a Retraining"),
        ({"penalty": 0.1}, r"penalty=0.1 is not allowed: give a Penalty, such as Penalty\(rho"),
        ({"penalty": {"rho": 0.1}}, "penalty={'rho': 0.1} is not allowed"),
    ],
)
def test_a_run_refuses_settings_of_another_type(given, says):
    layer = nn.Linear(8, 8)
    plan = make_plan(layer, MicroStructure(prune_ratio=0.5))
    with pytest.raises(SettingError, match=says):
        CompressionRun(plan.weights(layer), plan.covered, **given)


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("length", [10, None])
def test_updates_rarer_than_the_method_is_long_are_refused(interval, length):
    with pytest.raises(SettingError, match=f"update_every=99 is longer than the {interval}s from 4 to 6 .* no update"):
        Phases(interval, 4, 6, update_every=99).on(length)
    with pytest.raises(SettingError, match="update_every=3 is longer"):
        Phases(interval, 4, 6, update_every=3).on(length)
    assert Phases(interval, 4, 6, update_every=2, round_start=1.0).on(length) == Timeline(4, 6, 2)


def test_a_single_projection_needs_no_updates():
    assert Phases(admm_start=2, admm_end=2, update_every=99, round_start=10).on(10) == Timeline(2, 2, 99)


def test_a_fast_dev_run_needs_no_updates():
    never = {"round_start": 1.0}
    assert Phases(admm_start=4, admm_end=6, update_every=2, **never).on(1, clip=True) == Timeline(1, 1, 2)
    assert Phases(admm_start=0, admm_end=6, update_every=4, **never).on(1, clip=True) == Timeline(0, 1, 4)


def test_rounding_starts_at_its_share_and_chooses_four_times():
    timeline = Phases(round_start=0.6).on(40)
    assert (timeline.round_start, timeline.round_every) == (24.0, 4.0)
    times, last, due = [i / 3 for i in range(120)], -1.0, []
    for now in times:
        if timeline.rounds_due(now, last if due else -1):
            due.append(now)
            last = now
    assert due == [24, 28, 32, 36]
    assert not timeline.rounds_due(23.9, -1)
    assert timeline.rounds_due(39.0, -1)  # a run whose structure was frozen late


def test_rounding_in_a_run_without_end_needs_a_count():
    phases = Phases("step", 4, 6, update_every=1)
    assert phases.rounds(None) == (math.inf, math.inf)
    assert replace(phases, round_start=9).rounds(None) == (9.0, math.inf)
    assert replace(phases, round_start=9).rounds(9) == (math.inf, math.inf)
    for wrong in (1.5, -1, True, "7", float("nan")):
        with pytest.raises(SettingError, match=r"round_start=.* is not allowed"):
            Phases(round_start=wrong)
