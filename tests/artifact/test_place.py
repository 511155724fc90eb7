"""Where a file is put: names of any length, links, files that nobody may write, and what killed writers leave."""

import os
import time
from pathlib import Path

import pytest
import torch

from lightning_muws import load_compressed, save_compressed
from lightning_muws.artifact.container import STALE_SECONDS, replacing
from lightning_muws.errors import SettingError

STATE = {"w": torch.ones(3)}


@pytest.mark.parametrize("name", ["x" * 240 + ".muws", "x" * 250 + ".muws", "\u00e9" * 125 + ".muws"])
def test_a_name_as_long_as_the_file_system_allows_is_written(name, tmp_path):
    save_compressed(STATE, tmp_path / name)
    assert torch.equal(load_compressed(tmp_path / name)["w"], STATE["w"])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_name_that_is_too_long_is_the_error_of_the_system_and_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="File name too long"):
        save_compressed(STATE, tmp_path / ("x" * 300 + ".muws"))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="links need a right on Windows")
def test_a_link_stays_and_the_file_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    file, link, dangling = tmp_path / "folder" / "m.muws", tmp_path / "link.muws", tmp_path / "dangling.muws"
    file.write_bytes(b"before")
    link.symlink_to(file)
    dangling.symlink_to(tmp_path / "folder" / "new.muws")
    for path in (link, dangling):
        save_compressed(STATE, path)
        assert path.is_symlink()
        assert load_compressed(path)["w"].tolist() == [1, 1, 1]
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["m.muws", "new.muws"]


@pytest.mark.skipif(os.name != "posix", reason="links need a right on Windows")
def test_a_link_to_itself_is_refused_and_stays(tmp_path):
    one, other = tmp_path / "one.muws", tmp_path / "other.muws"
    one.symlink_to(other)
    other.symlink_to(one)
    with pytest.raises(SettingError, match="it is a link to itself: give another name"):
        save_compressed(STATE, one)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_symlink()) == ["one.muws", "other.muws"]


@pytest.mark.skipif(os.name != "posix", reason="modes are of POSIX")
def test_a_file_that_nobody_may_write_is_not_replaced(tmp_path):
    path = tmp_path / "m.muws"
    path.write_bytes(b"before")
    path.chmod(0o444)
    with pytest.raises(PermissionError, match="Permission denied"):
        save_compressed(STATE, path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name are of POSIX")
def test_a_device_or_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe.muws")
    (tmp_path / "null.muws").symlink_to(os.devnull)
    for path in (tmp_path / "pipe.muws", tmp_path / "null.muws"):
        with pytest.raises(SettingError, match="it is a device or a pipe: give the name of a file"):
            save_compressed(STATE, path)
    assert Path(os.devnull).is_char_device()


def left_by_a_killed_writer(path: Path, *, seconds_ago: float) -> Path:
    """Return the temporary file of a writer that ended without a chance to remove it."""
    before = set(path.parent.iterdir())
    with replacing(path):
        (found,) = set(path.parent.iterdir()) - before
        left = found.with_name(found.name.replace(".tmp", "0.tmp"))
        left.touch()
    os.utime(left, (time.time() - seconds_ago,) * 2)
    return left


@pytest.mark.skipif(os.name != "posix", reason="locks of files are of POSIX")
def test_what_a_killed_writer_left_is_removed_by_the_next_one_and_nothing_else(tmp_path):
    path, other = tmp_path / "m.muws", tmp_path / "other.muws"
    stale = left_by_a_killed_writer(path, seconds_ago=2 * STALE_SECONDS)
    of_other = left_by_a_killed_writer(other, seconds_ago=2 * STALE_SECONDS)
    young = left_by_a_killed_writer(path, seconds_ago=STALE_SECONDS / 2)
    mine = tmp_path / ".muws-mine.tmp"
    mine.touch()
    save_compressed(STATE, path)
    assert not stale.exists()
    assert {p.name for p in tmp_path.iterdir()} == {path.name, other.name, of_other.name, young.name, mine.name}


@pytest.mark.skipif(os.name != "posix", reason="locks of files are of POSIX")
def test_a_writer_that_still_works_keeps_its_temporary_file(tmp_path):
    path = tmp_path / "m.muws"
    with replacing(path) as file:
        (found,) = tmp_path.iterdir()
        os.utime(found, (0, 0))
        save_compressed(STATE, path)
        assert found.exists()
        file.write(b"last")
    assert path.read_bytes() == b"last"
