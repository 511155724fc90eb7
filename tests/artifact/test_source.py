"""What save_compressed takes, and how it refuses the rest."""

import lightning as L
import pytest
import torch

from lightning_muws import MicroStructure, WeightUnificationCallback, save_compressed
from lightning_muws.errors import SettingError


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (WeightUnificationCallback(MicroStructure(prune_ratio=0.5)), "WeightUnificationCallback"),
        (None, "NoneType"),
        ([torch.ones(2)], "list"),
        (torch.ones(2), "Tensor"),
        (torch.nn.Linear, "type"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_no_model_is_refused_by_its_type_before_a_file_is_made(tmp_path, thing, name):
    with pytest.raises(SettingError, match=f"^a {name} is no model: give a module, a state_dict, "):
        save_compressed(thing, tmp_path / "m.muws")
    assert not list(tmp_path.iterdir())


def test_a_trainer_is_refused_with_the_module_to_give_instead(tmp_path):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with pytest.raises(SettingError, match=r"^a Trainer is no model: give a module, a state_dict, "):
        save_compressed(L.Trainer(accelerator="cpu", **quiet), tmp_path / "m.muws")
