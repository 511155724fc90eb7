"""Safetensors checkpoints, in one file or several: read as the library reads them, or refused in one sentence."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file

from lightning_muws import load_compressed, save_compressed
from lightning_muws.artifact.shards import DTYPES, list_tensors
from lightning_muws.errors import SettingError
from tests.support.strategies import normal, same_bytes


def write(folder: Path, **files: dict[str, torch.Tensor]) -> Path:
    """Write files and their index, and return the index."""
    folder.mkdir(exist_ok=True)
    for file, state in files.items():
        save_file(state, folder / f"{file}.safetensors", metadata={"format": "pt"})
    weight_map = {name: f"{file}.safetensors" for file, state in files.items() for name in state}
    return rewrite(folder / "model.safetensors.index.json", weight_map)


def rewrite(index: Path, weight_map: object) -> Path:
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return index


def state_of(seed: int) -> dict[str, torch.Tensor]:
    """Return a tensor of each dtype, an empty one and a scalar."""
    state = {
        f"{seed}.{name}": normal(seed, 6, 4, dtype=torch.float32).to(getattr(torch, name)) for name in DTYPES.values()
    }
    return state | {f"{seed}.empty": torch.empty(0, 3), f"{seed}.scalar": torch.tensor(float(seed))}


@pytest.fixture
def index(tmp_path) -> Path:
    return write(tmp_path / "model", a=state_of(1), b=state_of(2))


@pytest.mark.parametrize("given", ["index", "folder"])
def test_a_checkpoint_in_several_files_is_packed_as_one(given, index, tmp_path):
    save_compressed(index if given == "index" else index.parent, tmp_path / "m.muws")
    loaded, expected = load_compressed(tmp_path / "m.muws"), state_of(1) | state_of(2)
    assert loaded.keys() == expected.keys()
    assert all(same_bytes(loaded[name], x) for name, x in expected.items())


def test_one_file_and_a_folder_of_one_are_read_as_the_library_reads_them(tmp_path):
    (tmp_path / "one").mkdir()
    save_file(state_of(3), tmp_path / "one" / "model.safetensors")
    expected = load_file(tmp_path / "one" / "model.safetensors")
    for path in (tmp_path / "one" / "model.safetensors", tmp_path / "one"):
        found = {name: span.read() for name, span in list_tensors(path).items()}
        assert found.keys() == expected.keys()
        assert all(same_bytes(found[name], x) for name, x in expected.items())


def test_tensors_stay_on_the_disk_until_they_are_needed(index, monkeypatch):
    from lightning_muws.artifact import shards
    from lightning_muws.artifact.source import read_state

    monkeypatch.setattr(shards.Span, "read", None)
    assert len(read_state(index).tensors) == 2 * (len(DTYPES) + 2)


WRONG = {
    "a missing file": (lambda i: (i.parent / "b.safetensors").unlink(), "names b.safetensors, which is missing"),
    "a name in two files": (
        lambda i: save_file(state_of(1), i.parent / "b.safetensors"),
        "is in two files, a.safetensors and b.safetensors",
    ),
    "a tensor that the index does not list": (
        lambda i: save_file({**state_of(2), "more": torch.ones(1)}, i.parent / "b.safetensors"),
        "b.safetensors has 'more', which model.safetensors.index.json does not place there",
    ),
    "a tensor that no file has": (
        lambda i: save_file({"2.scalar": torch.ones(1)}, i.parent / "b.safetensors"),
        r"places '2\.\w+' in b.safetensors, which does not have it",
    ),
    "a file that is cut short": (
        lambda i: (i.parent / "b.safetensors").write_bytes((i.parent / "b.safetensors").read_bytes()[:-1]),
        "b.safetensors is no safetensors file, or a damaged one: its header declares",
    ),
    "a file in another folder": (lambda i: rewrite(i, {"w": "../b.safetensors"}), "only files in its own folder"),
    "an absolute path": (lambda i: rewrite(i, {"w": "/etc/passwd"}), "only files in its own folder"),
    "no map": (lambda i: i.write_text("{}"), "it needs a weight_map"),
    "a map of numbers": (lambda i: rewrite(i, {"w": 3}), "it needs a weight_map"),
    "no JSON": (lambda i: i.write_text("{"), "is no index of safetensors files"),
    "brackets": (lambda i: i.write_text("[" * 100_000), "is no index of safetensors files"),
    "a name twice": (
        lambda i: i.write_text('{"weight_map":{"w":"a.safetensors","w":"b.safetensors"}}'), "'w' occurs twice",
    ),
    "bytes that are no text": (lambda i: i.write_bytes(b"\xff{}"), "is no index of safetensors files"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_index_or_shard_is_one_sentence(name, index, tmp_path):
    spoil, says = WRONG[name]
    spoil(index)
    with pytest.raises(SettingError, match=says):
        save_compressed(index, tmp_path / "m.muws")
    assert not (tmp_path / "m.muws").exists()


def test_a_folder_of_no_checkpoint_or_of_two_is_refused(tmp_path):
    with pytest.raises(SettingError, match="is a folder without a safetensors file or an index of several"):
        list_tensors(tmp_path)
    for name in "ab":
        save_file({"w": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(SettingError, match=r"has 2 checkpoints \(a.safetensors, b.safetensors\): give the path of one"):
        list_tensors(tmp_path)


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(index):
    spans = list_tensors(index)
    (index.parent / "a.safetensors").write_bytes(b"")
    with pytest.raises(SettingError, match="became shorter while it was read"):
        spans["1.float32"].read()


def damaged(data: bytes, seed: int) -> bytes:
    """Return a file with some bytes of its header changed, or cut."""
    r, found = random.Random(seed), bytearray(data)  # noqa: S311  no secret
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(r.choice((1, 1, 2))):
        place = r.randrange(*r.choice(((0, 8), (8, header), (8, header), (header, len(data)))))
        found[place] = r.choice((found[place] ^ 1 << r.randrange(8), r.choice(b'0123456789[]{}",:')))
    return bytes(found[: r.randrange(len(found))] if r.random() < 0.1 else found)


def test_a_damaged_file_is_read_as_the_library_reads_it_or_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a": normal(0, 3, 4, dtype=torch.float32), "b": torch.arange(5), "c": torch.empty(0, 2)}, path)
    good, counts = path.read_bytes(), {"read": 0, "refused": 0}
    for seed in range(600):
        path.write_bytes(bad := damaged(good, seed))
        try:
            found = {name: span.read() for name, span in list_tensors(path).items()}
        except SettingError:
            counts["refused"] += 1
            with pytest.raises((SafetensorError, KeyError, ValueError)):  # the library has no dtype for some names
                load(bad)
        else:
            counts["read"] += 1
            expected = load(bad)
            assert found.keys() == expected.keys(), seed
            assert all(same_bytes(found[name], x) for name, x in expected.items()), seed
    assert min(counts.values()) > 20, counts
