"""NaN in the retraining phase ends the run with the error it has in ADMM, and no file is written or replaced."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_muws import WeightUnificationCallback
from lightning_muws.errors import StateError
from tests.support.explicit import PHASES
from tests.support.modules import STRUCTURE, TwoLayers, fit

SAYS = r"layer\.\d\.weight holds \d+ values of \d+ that are NaN or Inf"


class Explode(Callback):
    """Fills a weight with a value that is not finite after one batch, or at another hook."""

    def __init__(self, hook: str = "on_train_batch_end", at: tuple[int, int] = (4, 3), value: float = torch.nan):
        self.hook, self.at, self.value, self.epochs = hook, at, value, 0
        setattr(self, hook, self.explode)

    def explode(self, trainer, pl_module, *batch):
        if not batch or (trainer.current_epoch, batch[2]) == self.at:
            with torch.no_grad():
                pl_module.layer[2].weight.fill_(self.value)

    def on_train_epoch_start(self, trainer, pl_module):
        self.epochs += 1


@pytest.mark.parametrize("old", [b"old", None])
@pytest.mark.parametrize(
    ("explode", "n_epochs"),
    [
        (Explode(), 5),  # in the middle of a retraining epoch: that epoch is the last
        (Explode(value=torch.inf), 5),
        (Explode(at=(5, 7)), 6),  # in the last batch of the run
        (Explode(at=(6, 0)), 7),
        (Explode("on_train_end"), 7),  # after all epochs
        (Explode("on_fit_end"), 7),
    ],
    ids=["middle", "inf", "an epoch's last batch", "last epoch", "train end", "fit end"],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_weight_that_is_not_finite_ends_the_run_without_a_file(tmp_path, explode, n_epochs, old, first):
    path, module = tmp_path / "m.muws", TwoLayers()
    if old is not None:
        path.write_bytes(old)
    if explode.hook == "on_fit_end" and not first:
        pytest.skip("a callback that comes after ours may still change weights when the file is written")
    explode.epochs = 0
    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES, save_to=path)
    callbacks = [explode, callback] if first else [callback, explode]
    with pytest.raises(StateError, match=SAYS):
        fit(module, *callbacks, max_epochs=7, limit_val_batches=0)
    assert explode.epochs == n_epochs
    assert callback.saved is None
    assert (path.read_bytes() if path.exists() else None) == old
    assert len(list(tmp_path.iterdir())) == (old is not None)


def test_a_loss_that_is_not_finite_ends_the_run_at_the_end_of_its_epoch(tmp_path):
    class Diverging(TwoLayers):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)["loss"]
            return loss * (torch.nan if (self.current_epoch, batch_idx) == (5, 1) else 1.0)

    module = Diverging()
    callback = WeightUnificationCallback(STRUCTURE, phases=PHASES, save_to=tmp_path / "m.muws")
    with pytest.raises(StateError, match=r"layer\.0\.weight holds \d+ values of 512 that are NaN or Inf"):
        fit(module, callback, max_epochs=9, limit_val_batches=0)
    assert module.trainer.current_epoch == 5
    assert not list(tmp_path.iterdir())
