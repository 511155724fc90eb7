"""The `muws` command: tables, JSON, exit codes, and every way from one kind of file to another."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_muws import load_compressed, save_compressed
from lightning_muws.commands.files import main
from tests.support.forge import small_model
from tests.support.strategies import normal, same_bytes


@pytest.fixture
def path(tmp_path) -> Path:
    small_model(tmp_path / "model.muws")
    return tmp_path / "model.muws"


def run(capsys, *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    return code, *capsys.readouterr()


def test_inspect(capsys, path):
    code, out, _ = run(capsys, "inspect", path)
    assert code == 0
    for text in ("conv.weight", "8x6x3x3", "2x4", "same as conv.weight", "magnitudes.float32.3"):
        assert text in out
    code, out, _ = run(capsys, "inspect", path, "--json")
    info = json.loads(out)
    assert (code, info["n_bytes"], info["version"]) == (0, path.stat().st_size, "1.0")


def test_verify(capsys, path):
    assert run(capsys, "verify", path)[:2] == (0, f"{path}: whole, 7 tensors\n")
    assert json.loads(run(capsys, "verify", path, "--json")[1]) == {"file": str(path), "ok": True}
    path.write_bytes(path.read_bytes()[:-1])
    code, out, err = run(capsys, "verify", path)
    assert (code, out) == (1, "")
    assert err.startswith(f"muws: {path}: the header declares")
    code, out, _ = run(capsys, "verify", path, "--json")
    assert code == 1
    assert "the header declares" in json.loads(out)["error"]


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_unpack_and_pack_lead_back(capsys, path, suffix):
    target, again = path.with_suffix(suffix), path.with_name("again.muws")
    assert run(capsys, "unpack", path, target)[0] == 0
    found = load_file(target) if suffix == ".safetensors" else torch.load(target, weights_only=True)
    state = load_compressed(path)
    assert found.keys() == state.keys()
    assert all(same_bytes(found[name], x) for name, x in state.items())
    code, out, _ = run(capsys, "pack", target, again)
    assert code == 0
    assert "bit for bit" in out
    assert run(capsys, "diff", path, again)[:2] == (0, "7 tensors, all equal bit for bit\n")


def test_pack_takes_the_settings(capsys, tmp_path):
    torch.save({"w": normal(0, 32, 32, dtype=torch.float32)}, tmp_path / "m.pt")
    words = ("pack", tmp_path / "m.pt", tmp_path / "m.muws", "--max-error", "0.01", "--block", "2x4", "--json")
    code, out, _ = run(capsys, *words)
    report = json.loads(out)
    assert code == 0
    assert 0 < report["max_error"] <= 0.01 * float(torch.load(tmp_path / "m.pt", weights_only=True)["w"].abs().max())
    assert report["tensors"][0]["block_shape"] == [2, 4]


def test_pack_takes_the_weights_of_a_lightning_checkpoint(capsys, tmp_path):
    from tests.support.modules import TwoLayers, fit

    module = TwoLayers("adam")
    fit(module, max_epochs=1).save_checkpoint(tmp_path / "m.ckpt")
    assert run(capsys, "pack", tmp_path / "m.ckpt", tmp_path / "m.muws")[0] == 0
    fresh = TwoLayers("adam")
    fresh.load_state_dict(load_compressed(tmp_path / "m.muws"))
    assert all(same_bytes(x, fresh.state_dict()[name]) for name, x in module.state_dict().items())


def test_diff(capsys, path, tmp_path):
    state = dict(load_compressed(path))
    state["conv.bias"] = state["conv.bias"] + 0.5
    state["more"] = torch.ones(1)
    state["count"] = state["count"].float()
    state["conv.weight"] = state["conv.weight"].clone().index_fill_(0, torch.tensor([0]), float("nan"))
    del state["mask"]
    save_compressed(state, tmp_path / "other.muws")
    code, out, _ = run(capsys, "diff", path, tmp_path / "other.muws", "--json")
    found = {d["name"]: d for d in json.loads(out)["different"]}
    assert code == 1
    assert found["conv.bias"]["max_error"] == pytest.approx(0.5)
    assert found["conv.weight"]["difference"] == "values, not all finite"
    assert found["more"]["difference"] == "only in the other"
    assert found["mask"]["difference"] == "only in the first"
    assert found["count"]["difference"] == "torch.int64 () and torch.float32 ()"
    assert set(found) == {"conv.weight", "conv.bias", "count", "mask", "more"}
    code, out, _ = run(capsys, "diff", path, tmp_path / "other.muws")
    assert (code, "5 of 8 tensors differ" in out) == (1, True)


def test_trouble_has_an_exit_code_of_its_own_and_one_sentence(capsys, path, tmp_path):
    for words, says in (
        (("inspect", tmp_path / "none.muws"), "No such file"),
        (("inspect", __file__), "this is no .muws file"),
        (("unpack", path, tmp_path / "model.onnx"), "give a name that ends in .safetensors, .pt or .pth"),
        (("unpack", path, tmp_path / "model.pt", "--max-bytes", "10"), "at most max_bytes=10 are allowed"),
        (("pack", __file__, tmp_path / "x.muws"), "cannot be read as tensors"),
        (("diff", path, __file__), "cannot be read as tensors"),
    ):
        code, out, err = run(capsys, *words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert says in err
    assert {p.name for p in tmp_path.iterdir()} == {"model.muws"}
    with pytest.raises(SystemExit) as ended:
        main(["pack", "a", "b", "--block", "4"])
    assert ended.value.code == 2


def test_the_command_is_installed():
    assert 'muws = "lightning_muws.commands.files:main"' in (Path(__file__).parents[1] / "pyproject.toml").read_text()


def test_it_is_a_module_too_and_needs_no_lightning(path):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['muws', 'verify', {str(path)!r}]\n"
        "try: runpy.run_module('lightning_muws', run_name='__main__')\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        "assert not {'lightning', 'pytorch_lightning'} & set(sys.modules), 'Lightning was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout == f"{path}: whole, 7 tensors\n"
