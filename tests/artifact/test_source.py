"""What save_compressed takes, and how it refuses the rest."""

import zipfile
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from lightning_muws import (
    MicroStructure,
    WeightUnificationCallback,
    inspect_compressed,
    load_compressed,
    save_compressed,
    verify_compressed,
)
from lightning_muws.artifact.chunk import ChunkReader
from lightning_muws.errors import FormatError, SettingError
from lightning_muws.structure.plan import make_plan
from tests.support.fuzz_sources import KINDS, fuzz


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_packed_or_refused_and_nothing_else(kind, tmp_path):
    found = fuzz(kind, range(70), tmp_path)
    assert found["other"] == 0, found
    assert found["refused"] > 30


def bomb(path: Path, n_bytes: int) -> int:
    """Write what torch.save writes of zeros, but compressed; return the bytes of the file."""
    torch.save({"w": torch.zeros(n_bytes, dtype=torch.uint8)}, path)
    with zipfile.ZipFile(path) as archive:
        records = [(record.filename, archive.read(record)) for record in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records:
            archive.writestr(name, data)
    return path.stat().st_size


def test_a_compressed_archive_takes_no_more_memory_than_allowed(tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    assert bomb(path, 64 << 20) < 70_000
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(SettingError, match=r"m.pt expands to 67,\d+,\d+ bytes, at most 1,048,576 are allowed: raise"):
        save_compressed(path, tmp_path / "m.muws", max_bytes=1 << 20)


def test_a_small_tensor_that_repeats_itself_takes_no_more_memory_than_allowed(tmp_path):
    torch.save({"w": torch.zeros(1).expand(1 << 20, 1 << 10)}, tmp_path / "m.pt")
    with pytest.raises(SettingError, match=r"repeat their values and take 4,294,967,296 bytes, at most 1,048,576 are"):
        save_compressed(tmp_path / "m.pt", tmp_path / "m.muws", max_bytes=1 << 20)


def test_a_large_honest_file_is_read_whatever_the_limit(tmp_path):
    torch.save({"w": torch.randn(100, 100)}, tmp_path / "m.pt")
    save_compressed(tmp_path / "m.pt", tmp_path / "m.muws", max_bytes=10)
    with pytest.raises(FormatError, match="at most max_bytes=10 are allowed"):
        save_compressed(tmp_path / "m.muws", tmp_path / "n.muws", max_bytes=10)


@pytest.mark.parametrize("wrong", [-1, 1.5, "8GB", None, True])
def test_a_limit_that_is_no_number_of_bytes_is_refused(wrong, tmp_path):
    save_compressed({"w": torch.ones(1)}, tmp_path / "m.muws")
    for call in (
        lambda: load_compressed(tmp_path / "m.muws", max_bytes=wrong),
        lambda: verify_compressed(tmp_path / "m.muws", max_bytes=wrong),
        lambda: save_compressed(tmp_path / "m.muws", tmp_path / "n.muws", max_bytes=wrong),
    ):
        with pytest.raises(SettingError, match=r"max_bytes=.* is not allowed: give a whole number >= 0"):
            call()


def test_a_checkpoint_needs_no_version_of_lightning(tmp_path):
    state = {"w": torch.ones(2, 2)}
    for given in ({"state_dict": state}, {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}}):
        save_compressed(given, tmp_path / "m.muws")
        assert list(load_compressed(tmp_path / "m.muws")) == ["w"]
        torch.save(given, tmp_path / "m.pt")
        save_compressed(tmp_path / "m.pt", tmp_path / "m.muws")
        assert list(load_compressed(tmp_path / "m.muws")) == ["w"]


def test_a_muws_source_keeps_its_extra_and_the_cuts_of_its_plan(tmp_path):
    module = nn.ConvTranspose2d(64, 96, 3, groups=2, bias=False)
    entry = make_plan(module, MicroStructure((4, 4), 0.6, 0.3)).covered["weight"]
    module.weight.data = entry.structure.project(module.weight.data, entry.grid)
    a, b = tmp_path / "a.muws", tmp_path / "b.muws"
    save_compressed(module, a, blocks={"weight": entry.grid}, extra={"accuracy": 0.9})
    save_compressed(a, b)
    assert b.read_bytes() == a.read_bytes()
    save_compressed(a, b, extra={})
    assert inspect_compressed(b).extra == {}
    save_compressed(a, b, blocks=(2, 2), extra={"more": 1})
    info = inspect_compressed(b)
    assert (info.extra, info.tensors[0].block_shape) == ({"more": 1}, (2, 2))


class StopError(ValueError):
    """What a caller raises."""


@pytest.mark.parametrize("error", [StopError, KeyError, RuntimeError, MemoryError, KeyboardInterrupt])
def test_what_the_callers_progress_raises_passes_as_it_is(error, tmp_path):
    path = tmp_path / "m.muws"
    save_compressed({"w": torch.randn(100, 100)}, path)

    def stop(done: int, total: int) -> None:
        raise error("enough")

    for call in (load_compressed, verify_compressed, lambda p, progress: save_compressed(p, p, progress=progress)):
        with pytest.raises(error, match="enough") as caught:
            call(path, progress=stop)
        assert type(caught.value) is error
    verify_compressed(path)


@pytest.mark.parametrize("error", [MemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_lack_of_memory_is_not_blamed_on_the_file(error, tmp_path, monkeypatch):
    path = tmp_path / "m.muws"
    save_compressed({"w": torch.randn(100, 100)}, path)

    def fail(*args):
        raise error

    monkeypatch.setattr(ChunkReader, "fill", fail)
    with pytest.raises(type(error)) as caught:
        load_compressed(path)
    assert caught.value is error


def test_a_device_that_is_not_here_is_refused_before_the_file_is_read(tmp_path):
    wrong = ["nowhere", *([] if torch.cuda.is_available() else ["cuda"])]
    for device in wrong:
        with pytest.raises(SettingError, match=rf"device='{device}' cannot be used here: .*; give 'cpu'"):
            load_compressed(tmp_path / "none.muws", device=device)
