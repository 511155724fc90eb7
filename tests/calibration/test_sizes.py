"""export: several sizes of one model."""

import json
import math

import pytest
import torch
from torch import nn

from lightning_muws import compress, export, load_compressed
from lightning_muws.errors import SettingError
from tests.support.strategies import normal

X = normal(0, 64, 64, dtype=torch.float32)


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))


def test_each_file_has_its_size_and_the_score_of_what_is_loaded(tmp_path):
    net, scored = model(), []

    def evaluate(given):
        scored.append({name: x.clone() for name, x in given.state_dict().items()})
        with torch.no_grad():
            return float((given(X) - net(X)).square().mean())

    report = export(net, tmp_path, [4, 8], [X], evaluate)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["model_4x.muws", "model_8x.muws"]
    for file, state in zip(report.files, scored, strict=False):
        assert file.compression <= file.compression_ratio <= 1.05 * file.compression
        loaded = load_compressed(file.path)
        assert all(torch.equal(loaded[name], x) for name, x in state.items())
        expected = compress(net, file.compression, [X])[0].state_dict()
        assert all(torch.equal(loaded[name], x) for name, x in expected.items())
    assert report.dense_score == 0
    assert 0 < report.files[0].score < report.files[1].score
    assert 0 < report.files[0].error < report.files[1].error
    assert "model_8x.muws" in str(report)
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_generator_of_batches_serves_all_sizes(tmp_path):
    report = export(model(), tmp_path / "net-{compression}.muws", [4, 6], (x for x in [X]))
    assert not any(math.isnan(file.error) for file in report.files)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["net-4.muws", "net-6.muws"]


@pytest.mark.parametrize("sizes", [[4, 5000], [4, 1], [], [4, 4], 10], ids=str)
def test_a_size_that_is_wrong_leaves_no_file(tmp_path, sizes):
    with pytest.raises(SettingError):
        export(model(), tmp_path, sizes)
    assert not list(tmp_path.iterdir())


def test_a_failing_evaluation_leaves_no_file_and_keeps_the_old_one(tmp_path):
    (tmp_path / "model_4x.muws").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        export(model(), tmp_path, [4], evaluate=lambda _: 1 / 0)
    assert [x.read_bytes() for x in tmp_path.iterdir()] == [b"old"]


def test_a_pattern_without_its_folder_is_refused(tmp_path):
    with pytest.raises(SettingError, match="its folder does not exist"):
        export(model(), tmp_path / "none" / "{compression}.muws", [4])
