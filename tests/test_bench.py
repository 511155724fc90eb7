"""`muws bench`: a file, a model named on the command line, and the report of its speed."""

import argparse
import json
import sys

import pytest
import torch
from torch import nn

from lightning_muws import MicroStructure
from lightning_muws.commands.bench import add_parser
from lightning_muws.errors import MuwsError, SettingError
from lightning_muws.runtime.measure.report import SpeedReport

save = pytest.importorskip("lightning_muws.artifact.save", reason="the artifact room is not here").save_compressed
NETWORK = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, width=64):
        super().__init__(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 8))

thing = 3
def broken(): raise TypeError("no such thing")
def refuses(): raise ValueError("not today")
"""


@pytest.fixture
def network(tmp_path, monkeypatch):
    (tmp_path / "a_network_of_mine.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).requires_grad_(False)
    model[0].weight.copy_(MicroStructure((4, 8), 0.75).project(model[0].weight))
    save(model, "net.muws")
    threads = torch.get_num_threads()
    yield "a_network_of_mine"
    torch.set_num_threads(threads)
    sys.modules.pop("a_network_of_mine", None)


def bench(*words):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    options = parser.parse_args(["bench", *words])
    return options.run(options)


def test_a_file_is_measured_and_the_report_stored(network, capsys):
    words = ("net.muws", "--model", f"{network}:Net", "--input", "4x32", "--save", "speed.json")
    assert bench(*words, "--json") == 0
    report = SpeedReport.from_dict(json.loads(capsys.readouterr().out))
    assert SpeedReport.load("speed.json") == report
    assert report.layers[0].block_shape == (4, 8)
    assert report.layers[0].sparsity == 0.75
    assert report.inputs == ((4, 32),)

    assert bench(*words, "--args", '{"width": 64}') == 0
    assert "Linear 64x32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"--input": "4x"}, "--input '4x' is not allowed"),
        ({"--input": "4x32:int3"}, "--input '4x32:int3' is not allowed"),
        ({"--threads": "0"}, "--threads 0 is not allowed"),
        ({"--model": "nowhere:Net"}, "--model 'nowhere:Net' cannot be built"),
        ({"--model": "a_network_of_mine:Nett"}, "cannot be built"),
        ({"--model": "a_network_of_mine:broken"}, "no such thing"),
        ({"--model": "a_network_of_mine:thing"}, "cannot be built"),
        ({"--model": "a_network_of_mine"}, "give package.module:Class"),
        ({"--args": "{"}, "is no JSON"),
        ({"--args": "[]"}, "is not allowed"),
        ({"--args": '{"height": 3}'}, "cannot be built"),
        ({"--input": "4x33"}, "the network fails on --input 4x33: RuntimeError: mat1 and mat2"),
        ({"--input": "4x32:int64"}, "the network fails on --input 4x32:int64: RuntimeError"),
        ({"--input": "99999999999x99999999999"}, "--input '99999999999x99999999999' cannot be made"),
        ({"--input": "1" * 5000}, "is not allowed"),
        ({"--threads": "99999999999"}, "--threads 99999999999 is not allowed: give a number from 1 to 1024"),
        ({"--model": "a_network_of_mine:refuses"}, "cannot be built: ValueError: not today"),
        ({"--model": ".a:Net"}, "cannot be built"),
        ({"--args": "[" * 100_000}, "is no JSON"),
        ({"--save": "nowhere/speed.json"}, "--save nowhere/speed.json cannot be written"),
        ({"--save": "."}, r"--save \. cannot be written"),
    ],
)
def test_a_wrong_option_is_one_clear_error(network, changes, match):
    words = {"--model": f"{network}:Net", "--input": "4x32", **changes}
    with pytest.raises(SettingError, match=match):
        bench("net.muws", *(word for pair in words.items() for word in pair))


def test_a_file_of_another_network_is_refused(network):
    with pytest.raises(MuwsError, match="shape"):
        bench("net.muws", "--model", f"{network}:Net", "--input", "4x32", "--args", '{"width": 65}')
