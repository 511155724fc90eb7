"""save_to: the callback writes the file at the end of fit, which the user's own class loads."""

import os
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_muws import MicroStructure, WeightUnificationCallback, inspect_compressed, load_compressed
from lightning_muws.errors import SettingError
from tests.support.modules import STRUCTURE, TwoLayers, fit
from tests.support.strategies import same_bytes


def assert_loads(path, module) -> None:
    fresh = TwoLayers()
    fresh.load_state_dict(load_compressed(path))
    for name, x in module.state_dict().items():
        assert same_bytes(fresh.state_dict()[name], x), name


def test_the_file_is_written_with_the_blocks_of_the_plan(tmp_path):
    path, module = tmp_path / "new" / "model.muws", TwoLayers()
    callback = WeightUnificationCallback(STRUCTURE, save_to=path)
    fit(module, callback, max_epochs=5)
    assert_loads(path, module)
    assert callback.saved.n_bytes == path.stat().st_size
    tensors = {t.name: t for t in inspect_compressed(path).tensors}
    for layer in callback.report.layers:
        assert tensors[layer.name].block_shape == layer.block_shape == (2, 4)
        assert tensors[layer.name].counts == (layer.n_dense, layer.n_unified, layer.n_pruned)


def test_shared_weights_stay_shared(tmp_path):
    class Tied(TwoLayers):
        def __init__(self):
            super().__init__()
            self.also = self.layer[0]

    fit(Tied(), WeightUnificationCallback(STRUCTURE, save_to=tmp_path / "m.muws"), max_epochs=5)
    loaded = load_compressed(tmp_path / "m.muws")
    assert loaded["also.weight"] is loaded["layer.0.weight"]


def test_it_replaces_the_old_file_and_works_for_the_other_namespace(tmp_path):
    import pytorch_lightning as pl
    from pytorch_lightning.demos.boring_classes import BoringModel

    from lightning_muws.pytorch_lightning import WeightUnificationCallback as Other

    path, module = tmp_path / "model.muws", BoringModel()
    path.write_bytes(b"old")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    callback = Other(STRUCTURE, save_to=str(path))
    pl.Trainer(max_epochs=5, limit_train_batches=4, limit_val_batches=1, callbacks=[callback], **quiet).fit(module)
    loaded = load_compressed(path, into=BoringModel())
    assert all(same_bytes(loaded[name], x) for name, x in module.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*script_method.* is deprecated")
def test_a_compiled_layer_has_clean_names(tmp_path):
    class Compiled(TwoLayers):
        def __init__(self):
            super().__init__()
            self.layer = torch.compile(self.layer, backend="aot_eager")

    module = Compiled()
    fit(module, WeightUnificationCallback(STRUCTURE, save_to=tmp_path / "m.muws"), max_epochs=5)
    assert list(load_compressed(tmp_path / "m.muws")) == list(TwoLayers().state_dict())


@pytest.mark.filterwarnings("ignore:training ended in the")
def test_a_trial_run_writes_nothing(tmp_path):
    fit(TwoLayers(), WeightUnificationCallback(STRUCTURE, save_to=tmp_path / "m.muws"), fast_dev_run=True)
    assert not list(tmp_path.iterdir())


class WithExtraState(TwoLayers):
    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass


def test_what_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.muws").mkdir()
    for module, path, says in (
        (TwoLayers(), tmp_path / "folder.muws", "is a folder"),
        (TwoLayers(), tmp_path / "file" / "m.muws", "cannot be written"),
        (WithExtraState(), tmp_path / "m.muws", "cannot hold _extra_state, which get_extra_state makes"),
    ):
        callback = WeightUnificationCallback(STRUCTURE, save_to=path)
        with pytest.raises(SettingError, match=says):
            fit(module, callback, max_epochs=5)
        assert callback.phase == "dense"


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return all files and folders below a folder, with their bytes and times of change."""
    return {
        str(path): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns if path.is_file() else 0)
        for path in folder.rglob("*")
    }


class NoBatch(L.Callback):
    """Fails the test where training begins."""

    def on_train_start(self, trainer, pl_module):
        pytest.fail("training began")


def assert_refused_at_the_start(path: Path, says: str) -> None:
    callback = WeightUnificationCallback(STRUCTURE, save_to=path)
    with pytest.raises(SettingError, match=says):
        fit(TwoLayers(), NoBatch(), callback, max_epochs=5)


@pytest.mark.skipif(sys.platform != "linux", reason="needs the file system of Linux's kernel")
def test_a_folder_that_takes_no_files_is_refused_before_training():
    assert_refused_at_the_start(Path("/proc/model.muws"), r"save_to='/proc/model\.muws' cannot be written: ")


@pytest.mark.parametrize("sub", ["", "new/newer"])
def test_a_folder_without_permission_is_refused_before_training(tmp_path, monkeypatch, sub):
    path = tmp_path / sub / "model.muws"
    (tmp_path / "model.muws").write_bytes(b"old")
    before, write = tree(tmp_path), Path.open

    def refusing(self, mode="r", *args, **kwargs):  # the superuser may write everywhere, so a mode proves nothing
        if self.parent == path.parent and mode != "r":
            raise PermissionError(13, "Permission denied", str(self))
        return write(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refusing)
    assert_refused_at_the_start(path, "cannot be written: .*Permission denied")
    monkeypatch.undo()
    assert tree(tmp_path) == before


@pytest.mark.skipif(not hasattr(os, "pathconf"), reason="needs the length of the longest name")
def test_a_name_is_refused_before_training_or_can_be_written(tmp_path):
    longest = os.pathconf(tmp_path, "PC_NAME_MAX")
    written = 0
    for n in (longest + 1, longest, longest - 20, longest - 21, longest - 22, longest - 23, longest - 30):
        path = tmp_path / ("m" * (n - len(".muws")) + ".muws")
        try:
            fit(TwoLayers(), WeightUnificationCallback(STRUCTURE, save_to=path), max_epochs=3)
        except SettingError as error:
            assert "cannot be written" in str(error)  # noqa: PT017  either is right
            assert not path.exists() if n <= longest else n == longest + 1
        else:
            written += path.exists()
    assert written


def test_the_trial_at_the_start_touches_nothing(tmp_path):
    seen = []

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(tree(tmp_path))

    (tmp_path / "model.muws").write_bytes(b"old")
    before = tree(tmp_path)
    for path in (tmp_path / "model.muws", tmp_path / "new" / "newer" / "model.muws"):
        callback = WeightUnificationCallback(STRUCTURE, save_to=path)
        with pytest.warns(UserWarning, match="training ended in the"):
            fit(TwoLayers(), Look(), callback, fast_dev_run=True)
        assert tree(tmp_path) == before
    assert seen == [before, before]


def test_a_checkpoint_of_the_compressed_module_packs_to_the_same_size(tmp_path):
    from lightning_muws import save_compressed

    class Ready(L.Callback):
        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "m.ckpt")

    structure = MicroStructure((2, 4), 0.5, 0.25)
    callback = WeightUnificationCallback(structure, save_to=tmp_path / "m.muws")
    fit(TwoLayers(n_hidden=64), callback, Ready(), max_epochs=5)
    report = save_compressed(tmp_path / "m.ckpt", tmp_path / "again.muws")
    assert report.n_bytes <= 1.01 * callback.saved.n_bytes
