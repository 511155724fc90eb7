"""method="auto": straight-through training where retraining rounds, ADMM everywhere else, and the same when resumed."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging

from lightning_muws import Penalty, Phases, Retraining, WeightUnificationCallback
from lightning_muws.errors import SettingError, StateError
from tests.support.modules import STRUCTURE, fit
from tests.support.strategies import same_bytes
from tests.trainer.test_again import Journal
from tests.trainer.test_compression import PROVIDED
from tests.trainer.test_rounding import NoNorm

TIMES = {"admm_start": 1, "admm_end": 4, "update_every": 1}


class Averaged(NoNorm):
    def configure_optimizers(self):
        return torch.optim.ASGD(self.parameters(), 0.01)


def methods(callback: WeightUnificationCallback, module: NoNorm, *others: L.Callback, **options) -> set[str]:
    """Fit, and return the names that the callback gave its phases."""
    journal = Journal(callback)
    fit(module, callback, journal, *others, max_epochs=6, **options)
    callback.verify()
    return set(journal.phases) - {"dense", "retraining"}


def test_a_compression_trains_straight_through():
    assert methods(WeightUnificationCallback(compression=12, phases=Phases(**TIMES)), NoNorm()) == {"straight_through"}


@pytest.mark.parametrize(
    "given",
    [
        {"structure": STRUCTURE},
        {"max_relative_error": 0.5},
        {"compression": 12, "penalty": Penalty(rho=2.0)},
        {"compression": 12, "retraining": Retraining(unified="frozen")},
        {"compression": 12, "phases": Phases(**TIMES, round_start=1.0)},
        {"compression": 12, "phases": Phases(**TIMES, method="admm")},
    ],
    ids=str,
)
def test_all_else_is_admm(given):
    assert methods(WeightUnificationCallback(**{"phases": Phases(**TIMES), **given}), NoNorm()) == {"admm"}


def test_where_averages_of_weights_are_kept_it_is_admm():
    ours = [WeightUnificationCallback(compression=12, phases=Phases(**TIMES)) for _ in range(2)]
    assert methods(ours[0], Averaged()) == {"admm"}
    assert methods(ours[1], NoNorm(), WeightAveraging()) == {"admm"}


@pytest.mark.filterwarnings(PROVIDED)
@pytest.mark.parametrize("saved", ["auto", "admm", "straight_through"])
def test_a_resumed_run_goes_on_with_the_method_that_was_chosen(saved, tmp_path):
    module, saver = NoNorm(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole = WeightUnificationCallback(compression=12, phases=Phases(**TIMES, method=saved))
    expected = methods(whole, module, saver, enable_checkpointing=True)
    for epoch in (1, 2, 4):
        again, resumed = NoNorm(), WeightUnificationCallback(compression=12, phases=Phases(**TIMES))
        found = methods(resumed, again, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert found == (expected if epoch < 3 else set())
        assert resumed.history == whole.history
        assert all(same_bytes(x, again.state_dict()[name]) for name, x in module.state_dict().items())


@pytest.mark.filterwarnings(PROVIDED)
def test_what_was_chosen_is_compared_with_a_method_that_is_named(tmp_path):
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    methods(
        WeightUnificationCallback(compression=12, phases=Phases(**TIMES)), NoNorm(), saver, enable_checkpointing=True
    )
    other = WeightUnificationCallback(compression=12, phases=Phases(**TIMES, method="admm"))
    with pytest.raises(StateError, match=r"phases\.method is 'straight_through' in the checkpoint and 'admm' in"):
        fit(NoNorm(), other, max_epochs=6, ckpt_path=tmp_path / "epoch=2.ckpt")


def test_a_penalty_with_a_method_that_is_named_is_still_refused():
    with pytest.raises(SettingError, match="has no effect with method='straight_through'"):
        WeightUnificationCallback(compression=12, phases=Phases(method="straight_through"), penalty=Penalty(rho=2.0))
