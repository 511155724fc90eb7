"""Writing takes the memory of a chunk and of one tensor of a checkpoint; measured in real processes."""

import os

import pytest

from tests.support.peak_memory import run, write_sharded

pytestmark = pytest.mark.skipif(os.name != "posix", reason="peak memory is asked of POSIX")
SOURCE_MB, CHUNK_MB = 160, 4


@pytest.mark.slow
def test_a_sharded_checkpoint_is_never_in_memory_as_a_whole(tmp_path):
    write_sharded(tmp_path, SOURCE_MB)
    assert run("compress", SOURCE_MB, CHUNK_MB, tmp_path) < 0.75 * SOURCE_MB


@pytest.mark.slow
def test_a_large_tensor_is_saved_and_checked_in_chunks(tmp_path):
    assert run("lossy", SOURCE_MB, CHUNK_MB, tmp_path) < SOURCE_MB / 2
