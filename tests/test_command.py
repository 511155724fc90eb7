"""The `muws` command: tables, JSON, exit codes, and every way from one kind of file to another."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
import webbrowser
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lightning_muws
from lightning_muws import inspect_compressed, load_compressed, save_compressed
from lightning_muws.artifact.manifest import DTYPES
from lightning_muws.commands.main import main
from lightning_muws.commands.options import size
from lightning_muws.commands.output import progress
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
    assert run(capsys, "verify", path)[:2] == (0, f"{path}: ok, 7 tensors\n")
    assert json.loads(run(capsys, "verify", path, "--json")[1]) == {"file": str(path), "ok": True}
    path.write_bytes(path.read_bytes()[:-1])
    code, out, err = run(capsys, "verify", path)
    assert (code, out) == (1, "")
    assert err.startswith(f"muws: {path}: the header declares")
    code, out, err = run(capsys, "verify", path, "--json")
    assert (code, out) == (1, "")
    assert "the header declares" in json.loads(err)["error"]


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


def test_pack_makes_a_file_that_is_as_much_smaller_as_requested(capsys, tmp_path):
    state = {"weight": normal(0, 64, 64, dtype=torch.float32), "bias": normal(1, 64, dtype=torch.float32)}
    torch.save(state, tmp_path / "m.pt")
    words = ("pack", tmp_path / "m.pt", tmp_path / "m.muws", "--compression", "5", "--json")
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert json.loads(out)["compression_ratio"] >= 5
    assert 5 * (tmp_path / "m.muws").stat().st_size <= sum(x.nbytes for x in state.values())
    for wrong, reason in (("1", "give a finite number above 1"), ("5000", "this model allows")):
        code, _, err = run(capsys, "pack", tmp_path / "m.pt", tmp_path / "m.muws", "--compression", wrong, "--force")
        assert code == 2
        assert reason in err
    assert "different ways" in run(capsys, *words[:-1], "--force", "--max-error", "0.1")[2]


def test_compress_writes_a_checkpoint_in_the_size_asked_for(capsys, tmp_path):
    state = {"weight": normal(0, 64, 64, dtype=torch.float32), "bias": normal(1, 64, dtype=torch.float32)}
    save_file(state, tmp_path / "m.safetensors")
    words = ("compress", tmp_path / "m.safetensors", tmp_path / "m.muws", "--compression", "5", "--force")
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "")
    assert "mean over the weights" in out
    assert 5 <= sum(x.nbytes for x in state.values()) / (tmp_path / "m.muws").stat().st_size <= 5.25
    code, out, _ = run(capsys, *words, "--json", "--block", "2x4", "--extra", '{"accuracy": 0.9}')
    report = json.loads(out)
    assert code == 0
    assert 0 < report["relative_error"] < 0.01
    assert inspect_compressed(tmp_path / "m.muws").extra == {"accuracy": 0.9}
    for wrong, reason in (("1", "give a finite number above 1"), ("5000", "this model allows")):
        code, _, err = run(capsys, *words[:-2], wrong, "--force")
        assert code == 2
        assert reason in err


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


def test_a_failure_has_its_own_exit_code_and_one_sentence(capsys, path, tmp_path):
    (tmp_path / "folder").mkdir()
    nowhere = tmp_path / "nowhere"
    for words, says in (
        (("inspect", tmp_path / "none.muws"), "No such file"),
        (("inspect", tmp_path / "folder"), f"{tmp_path / 'folder'}: Is a directory"),
        (("verify", tmp_path / "none.muws"), f"{tmp_path / 'none.muws'}: No such file"),
        (("inspect", __file__), "this is no .muws file"),
        (("unpack", path, tmp_path / "model.onnx"), "give a name that ends in .safetensors, .pt or .pth"),
        (("unpack", path, nowhere / "model.pt"), f"{nowhere / 'model.pt'} cannot be written"),
        (("unpack", path, tmp_path / "model.pt", "--max-bytes", "10"), "at most max_bytes=10 are allowed"),
        (("pack", __file__, tmp_path / "x.muws"), "cannot be read as tensors"),
        (("pack", tmp_path / "none.pt", tmp_path / "x.muws"), f"{tmp_path / 'none.pt'}: No such file"),
        (
            ("pack", tmp_path / "folder", tmp_path / "x.muws"),
            f"{tmp_path / 'folder'} is a folder without a safetensors",
        ),
        (("pack", path, tmp_path / "folder"), "cannot be written"),
        (("pack", path, nowhere / "x.muws"), "cannot be written"),
        (("pack", path, tmp_path / "x.muws", "--max-error", "nan"), "max_error=nan is not allowed"),
        (("diff", path, __file__), "cannot be read as tensors"),
        (("diff", path, tmp_path / "folder"), f"{tmp_path / 'folder'} is a folder without a safetensors"),
    ):
        code, out, err = run(capsys, *words)
        assert (code, out, err.count("\n")) == (2, "", 1), words
        assert err.startswith("muws: "), words
        assert "Errno" not in err, words
        assert says in err
        code, out, err = run(capsys, *words, "--json")
        assert (code, out) == (2, "")
        assert says in json.loads(err)["error"]
    assert {p.name for p in tmp_path.iterdir()} == {"model.muws", "folder"}
    with pytest.raises(SystemExit) as ended:
        main(["pack", "a", "b", "--block", "4"])
    assert ended.value.code == 2


@pytest.mark.parametrize("text", ["4", "4x", "x4", "4x4x4", "0x4", "4x0", "-4x4", "a", "4,4", "1" * 5000 + "x4"])
def test_a_wrong_block_shape_is_one_sentence_on_what_to_give(capsys, text):
    with pytest.raises(SystemExit) as ended:
        main(["pack", "a", "b", f"--block={text}"])
    assert ended.value.code == 2
    assert f"{text!r} is not allowed: give rows and columns, such as 4x4\n" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"muws {lightning_muws.__version__}\n"


COMMANDS = st.sampled_from(["inspect", "verify", "pack", "compress", "unpack", "diff", "bench", "sensitivity"])
FILES = ["model.muws", "model.pt", "none.muws", "none.pt", ".", "", "\udc80", "x" * 300]
OPTIONS = ["--json", "--block=4", "--max-error=nan", "--max-error=-1", "--max-bytes=-1", "--relative-to", "--lossy=no"]
OPTIONS += [
    "--model=os:getcwd",
    "--model=x",
    "--input=4",
    "--input=",
    "-i",
    "--args=[]",
    "--threads=0",
    "4x4",
    "--save=.",
]


@given(COMMANDS, st.lists(st.sampled_from(FILES), max_size=2), st.lists(st.sampled_from(OPTIONS), max_size=3))
def test_no_words_end_in_a_traceback(tmp_path_factory, command, files, options):
    folder, home = tmp_path_factory.mktemp("words"), Path.cwd()
    small_model(folder / "model.muws")
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = main([command, *files, *options])
    except SystemExit as ended:
        code = ended.code
    finally:
        os.chdir(home)
    assert code in (0, 1, 2)


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_every_dtype_unpacks_or_is_refused_in_one_sentence(capsys, tmp_path):
    for name in DTYPES:
        save_compressed({"x": torch.zeros(2, dtype=DTYPES[name])}, tmp_path / "m.muws")
        for suffix in (".pt", ".safetensors"):
            code, _, err = run(capsys, "unpack", tmp_path / "m.muws", tmp_path / f"{name}{suffix}")
            assert code == 0 or (suffix == ".safetensors" and err.count("\n") == 1), (name, err)


def test_a_reader_that_stops_early_is_no_error(path):
    command = f"{sys.executable} -m lightning_muws inspect {path} --json | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)  # noqa: S603, S607
    assert done.stdout in ("{\n141\n", "{\n0\n")  # 0 where all fitted into the pipe
    assert done.stderr == ""


def test_text_that_the_terminal_cannot_encode_is_escaped(path):
    strange = path.with_name("модель.muws")
    path.rename(strange)
    command = [sys.executable, "-m", "lightning_muws", "verify", str(strange)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, check=True, env=environment)  # noqa: S603
    assert done.stdout.endswith(b"\\u043c\\u043e\\u0434\\u0435\\u043b\\u044c.muws: ok, 7 tensors\n")


def test_progress_is_shown_on_a_terminal_and_wiped(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("reading", is_quiet=False) as update:
        update(0, 0)
        for done in range(0, 1001, 100):
            update(done, 1000)
    err = capsys.readouterr().err
    assert "\rreading  10 %\rreading  20 %" in err
    assert err.endswith("\rreading 100 %\r             \r")
    with progress("reading", is_quiet=True) as update:
        update(1, 2)
    assert capsys.readouterr().err == ""


CODE = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, width=32):
        torch.manual_seed(0)
        super().__init__(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 4))

def batches(n=2):
    torch.manual_seed(1)
    return [(torch.randn(8, 16), torch.arange(8) % 4) for _ in range(n)]

def other_batches(): return [torch.randn(8, 15)]
def no_batches(): return []
def broken(): raise OSError("no disk")
def loss(model, batch): return nn.functional.cross_entropy(model(batch[0]), batch[1])
thing = 3
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    (tmp_path / "code_of_mine.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    yield "code_of_mine"
    sys.modules.pop("code_of_mine", None)


def test_sensitivity_is_measured_and_drawn(capsys, code):
    words = ["sensitivity", f"{code}:Net", "--batches", f"{code}:batches", "--ratios", "2", "4"]
    status, out, _ = run(capsys, *words, "--loss", "cross_entropy")
    assert status == 0
    assert "0.weight" in out
    assert "Growth of the loss" in out
    status, out, _ = run(capsys, *words, "--loss", f"{code}:loss", "--json", "--plot", "losses.png")
    found = json.loads(out)
    assert status == 0
    assert found["ratios"] == [2, 4]
    assert [layer["name"] for layer in found["layers"]] == ["0.weight", "2.weight"]
    assert Path("losses.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("suffix", [".muws", ".pt", ".safetensors"])
def test_sensitivity_loads_weights(capsys, code, suffix):
    net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    torch.nn.init.zeros_(net[2].weight)
    save_compressed(net, "net.muws")
    if suffix != ".muws":
        assert run(capsys, "unpack", "net.muws", f"net{suffix}")[0] == 0
    words = ["sensitivity", f"{code}:Net", "--batches", f"{code}:batches", "--loss", "cross_entropy", "--json"]
    status, out, _ = run(capsys, *words, "--weights", f"net{suffix}")
    assert status == 0
    assert [layer["energy"] for layer in json.loads(out)["layers"]][1] == 0
    status, _, err = run(capsys, *words[:-1], "--weights", f"net{suffix}", "--args", '{"width": 33}')
    assert status == 2
    assert "shape" in err or "does not fit" in err


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"--batches": "code_of_mine:broken"}, "--batches 'code_of_mine:broken' fails: OSError: no disk"),
        ({"--batches": "code_of_mine:thing"}, "--batches 'code_of_mine:thing' is a int: name a function"),
        ({"--batches": "code_of_mine:nothing"}, "--batches 'code_of_mine:nothing' cannot be found: AttributeError"),
        ({"--batches": "code_of_mine"}, "--batches 'code_of_mine' is not allowed: give package.module:function"),
        ({"--batches": "code_of_mine:no_batches"}, "batches is empty"),
        ({"--batches": "code_of_mine:other_batches"}, "--loss 'cross_entropy' fails: "),
        ({"--loss": "mse"}, "--loss 'mse' is not allowed: give package.module:function"),
        ({"--loss": "code_of_mine:thing"}, "--loss 'code_of_mine:thing' is a int"),
        ({"--loss": "mse_loss"}, "--loss 'mse_loss' fails: "),
        ({"--ratios": "1"}, "ratios=[1.0] is not allowed"),
        ({"--plot": "losses.txt"}, "--plot losses.txt cannot be written: give a .png"),
        ({"--plot": "nowhere/losses.png"}, "cannot be written"),
        ({"--weights": "nowhere.pt"}, "nowhere.pt"),
        ({"--args": "{"}, "is no JSON"),
    ],
)
def test_sensitivity_explains_a_wrong_option(capsys, code, changes, match):
    words = {"--batches": f"{code}:batches", "--loss": "cross_entropy", **changes}
    status, out, err = run(capsys, "sensitivity", f"{code}:Net", *(word for pair in words.items() for word in pair))
    assert (status, out) == (2, "")
    assert match in err
    assert err.count("\n") == 1


def test_the_command_is_installed():
    assert 'muws = "lightning_muws.commands.main:main"' in (Path(__file__).parents[1] / "pyproject.toml").read_text()


def test_it_is_a_module_too_and_needs_no_lightning(path):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['muws', 'verify', {str(path)!r}]\n"
        "try: runpy.run_module('lightning_muws', run_name='__main__')\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        "assert not {'lightning', 'pytorch_lightning'} & set(sys.modules), 'Lightning was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout == f"{path}: ok, 7 tensors\n"


# ---- standard input, several files, sizes, and files that exist


def piped(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_a_dash_is_standard_input(capsys, monkeypatch, path, tmp_path):
    state = load_compressed(path)
    for words in (("inspect", "-"), ("inspect", "-", "--json"), ("verify", "-"), ("verify", "-", "--json")):
        piped(monkeypatch, path.read_bytes())
        code, out, err = run(capsys, *words)
        assert (code, err) == (0, "")
        assert "standard input" in out
    piped(monkeypatch, path.read_bytes())
    assert run(capsys, "diff", "-", path)[:2] == (0, "7 tensors, all equal bit for bit\n")
    for suffix in (".pt", ".safetensors"):
        piped(monkeypatch, path.read_bytes())
        assert run(capsys, "unpack", "-", tmp_path / f"m{suffix}")[0] == 0
    for source in (path, tmp_path / "m.pt", tmp_path / "m.safetensors"):
        piped(monkeypatch, source.read_bytes())
        assert run(capsys, "pack", "-", tmp_path / "again.muws", "--force")[0] == 0
        assert all(same_bytes(x, state[name]) for name, x in load_compressed(tmp_path / "again.muws").items())


def test_standard_input_is_refused_by_that_name_and_no_copy_is_left(capsys, monkeypatch, path, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    for words, data, says in (
        (("verify", "-"), path.read_bytes()[:-1], "muws: standard input: the header declares"),
        (("inspect", "-"), b"", "muws: standard input: this is no .muws file"),
        (("pack", "-", tmp_path / "n.muws"), b"no", "muws: standard input cannot be read as tensors"),
        (("verify", "-", "--max-bytes", "1KB"), path.read_bytes(), "muws: standard input has more than 1,000 bytes"),
    ):
        piped(monkeypatch, data)
        code, out, err = run(capsys, *words)
        assert code in (1, 2)
        assert (out, err[: len(says)]) == ("", says)
    monkeypatch.setattr(sys, "stdin", None)
    assert run(capsys, "inspect", "-")[2] == "muws: standard input is closed: give a file\n"
    assert not list((tmp_path / "tmp").iterdir())


def test_several_files_are_verified_and_the_worst_decides(capsys, path, tmp_path):
    bad, none = tmp_path / "bad.muws", tmp_path / "none.muws"
    bad.write_bytes(path.read_bytes()[:-1])
    code, out, err = run(capsys, "verify", path, bad, path)
    assert (code, out) == (1, f"{path}: ok, 7 tensors\n" * 2)
    assert err.startswith(f"muws: {bad}: the header declares")
    code, out, err = run(capsys, "verify", bad, none, path, "--json")
    found = json.loads(out)
    assert (code, err) == (2, "")
    assert [about["ok"] for about in found] == [False, False, True]
    assert "No such file" in found[1]["error"]
    assert run(capsys, "verify", path, path)[0] == 0


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("1000", 1000),
        ("8GB", 8 * 10**9),
        ("8GiB", 8 << 30),
        ("1.5k", 1500),
        ("2 MiB", 2 << 20),
        ("0b", 0),
        ("1T", 10**12),
    ],
)
def test_sizes_have_units(text, n_bytes):
    assert size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "-1", "8XB", "GB", "1e9", "nan", "8 G B", "0x10", "1" * 30])
def test_a_size_that_is_none_is_one_sentence(capsys, text):
    with pytest.raises(SystemExit) as ended:
        main(["verify", "a", f"--max-bytes={text}"])
    assert ended.value.code == 2
    assert f"{text!r} is not allowed: give a number of bytes, such as 500MB or 16GiB\n" in capsys.readouterr().err


def test_a_file_beyond_the_limit_is_not_called_damaged(capsys, path):
    for words in ((path,), (path, path)):
        code, _, err = run(capsys, "verify", *words, "--max-bytes", "10B")
        assert (code, "at most max_bytes=10 are allowed" in err) == (2, True)


def test_pack_has_the_limit_of_the_others(capsys, path, tmp_path):
    code, _, err = run(capsys, "pack", path, tmp_path / "n.muws", "--max-bytes", "10B")
    assert (code, "at most max_bytes=10 are allowed" in err) == (2, True)


def test_a_file_that_exists_is_replaced_only_with_force(capsys, path, tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "m.pt")
    for words in (("pack", tmp_path / "m.pt", path), ("unpack", path, tmp_path / "m.pt"),
                  ("compress", tmp_path / "m.pt", path, "--compression", "2")):  # fmt: skip
        before = Path(words[2]).read_bytes()
        code, out, err = run(capsys, *words)
        assert (code, out) == (2, "")
        assert err == f"muws: {words[2]} exists: give another name, or --force to replace it\n"
        assert Path(words[2]).read_bytes() == before
    assert run(capsys, "pack", tmp_path / "m.pt", path, "-f")[0] == 0
    assert list(load_compressed(path)) == ["w"]


def test_what_is_written_is_a_muws_file_and_never_the_file_that_is_read(capsys, path, tmp_path):
    before = path.read_bytes()
    (tmp_path / "link.muws").symlink_to(path)
    for target in (path, tmp_path / "link.muws", tmp_path / "." / path.name):
        code, out, err = run(capsys, "pack", path, target, "--force", "--max-error", "0.1")
        assert (code, out, "is the file that is read: give another name" in err) == (2, "", True)
    for target in (tmp_path / "out.safetensors", tmp_path / "out.pt", tmp_path / "out"):
        code, out, err = run(capsys, "pack", path, target)
        assert (code, out) == (2, "")
        assert err == f"muws: {target} is not allowed: give a name that ends in .muws\n"
        assert not target.exists()
    assert path.read_bytes() == before


def test_pack_keeps_extra_and_takes_another(capsys, tmp_path):
    a, b = tmp_path / "a.muws", tmp_path / "b.muws"
    save_compressed({"w": torch.ones(4, 4)}, a, extra={"accuracy": 0.9})
    assert run(capsys, "pack", a, b)[0] == 0
    assert b.read_bytes() == a.read_bytes()
    assert run(capsys, "pack", a, b, "--force", "--extra", '{"labels": ["x"]}')[0] == 0
    assert inspect_compressed(b).extra == {"labels": ["x"]}
    for wrong in ("[1]", "{", "[" * 100_000):
        with pytest.raises(SystemExit):
            main(["pack", str(a), str(b), "--extra", wrong])
        assert "give an object" in capsys.readouterr().err
    assert "nan, only finite numbers" in run(capsys, "pack", a, b, "-f", "--extra", '{"a": NaN}')[2]


# ---- names of a stranger, and output that cannot be written


def test_names_reach_the_terminal_as_escapes(capsys, tmp_path):
    state = {"[/red]x": torch.ones(1), "[bold]y": torch.ones(1), "\x1b[31mz": torch.ones(1), "\ud800": torch.ones(1)}
    a, b = tmp_path / "a.muws", tmp_path / "b\x1b[2J.muws"
    save_compressed(state, a)
    save_compressed({"other\x07": torch.ones(1)}, b)
    save_compressed({"w\x1b[0m": torch.ones(2)}, tmp_path / "same.pt.muws")
    for words in (("inspect", a), ("inspect", b), ("diff", a, b), ("verify", b), ("verify", tmp_path / "\x1b.muws"),
                  ("pack", b, tmp_path / "c\x1b.muws"), ("unpack", b, tmp_path / "d\x1b.pt")):  # fmt: skip
        _, out, err = run(capsys, *words)
        assert out + err
        assert all(c.isprintable() for c in (out + err).replace("\n", "")), words
    out = run(capsys, "inspect", a)[1]
    assert all(name in out for name in ("[/red]x", "[bold]y", r"\x1b[31mz", r"\ud800"))


def test_a_name_that_safetensors_cannot_hold_is_one_sentence(capsys, tmp_path):
    for name in ("__metadata__", "\ud800"):
        save_compressed({name: torch.ones(1)}, tmp_path / "m.muws")
        code, out, err = run(capsys, "unpack", tmp_path / "m.muws", tmp_path / "m.safetensors")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "give a name that ends in .pt" in err
        assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.skipif(os.name != "posix", reason="RLIMIT_FSIZE is of POSIX")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(capsys, suffix, tmp_path):
    import resource

    save_compressed({"w": torch.zeros(100_000)}, tmp_path / "m.muws")
    target = tmp_path / f"m{suffix}"
    target.write_bytes(b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        code, out, err = run(capsys, "unpack", tmp_path / "m.muws", target, "--force")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "File too large" in err
    assert target.read_bytes() == b"before"
    assert {p.name for p in tmp_path.iterdir()} == {"m.muws", target.name}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the full device is of Linux")
def test_output_that_cannot_be_written_is_one_sentence(path):
    command = f"{sys.executable} -m lightning_muws inspect {path} > /dev/full; echo $?; " \
              f"{sys.executable} -m lightning_muws verify {path} >&- 2>&-; echo $?"  # fmt: skip
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)  # noqa: S603, S607
    assert (done.stdout, done.stderr) == ("2\n0\n", "muws: No space left on device\n")


@pytest.mark.skipif(os.name != "posix", reason="the shell is of POSIX")
def test_no_command_needs_an_open_standard_output(path, tmp_path):
    other = tmp_path / "other.muws"
    save_compressed({"w": torch.ones(2)}, other)
    for words in (f"inspect {path}", f"diff {path} {other}", f"report {path} -o {tmp_path / 'page.html'}"):
        command = f"{sys.executable} -m lightning_muws {words} >&-"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)  # noqa: S603, S607
        assert (done.returncode, done.stderr) == (int(words.startswith("diff")), ""), words


def test_view_serves_the_file_until_it_is_interrupted(path):
    # where tests run in the background, processes inherit that they ignore interrupts
    heeds = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = f"{heeds}; runpy.run_module('lightning_muws', run_name='__main__')"
    words = [sys.executable, "-c", command, "view", str(path), "--no-browser"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})  # noqa: S603
    try:
        url = process.stdout.readline().strip()
        assert url.endswith("/#model.muws")
        with urllib.request.urlopen(url.partition("#")[0] + "file", timeout=20) as answer:  # noqa: S310  this machine
            assert answer.read() == path.read_bytes()
        with urllib.request.urlopen(url.partition("#")[0], timeout=20) as answer:  # noqa: S310
            assert b"muws viewer" in answer.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_view_opens_the_browser_unless_told_not_to_and_refuses_damage_and_bad_ports(capsys, path, monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", interrupted)
    code, out, _ = run(capsys, "view", path)
    assert (code, opened) == (0, [out.splitlines()[0]])
    code, out, _ = run(capsys, "view", path, "--no-browser", "--json")
    assert (code, len(opened)) == (0, 1)
    assert json.loads(out)["url"].startswith("http://127.0.0.1:")
    assert "port 99999 cannot be used" in run(capsys, "view", path, "--port", "99999")[2]
    path.write_bytes(path.read_bytes()[:-1])
    assert run(capsys, "view", path)[0] == 2


def interrupted(server):
    raise KeyboardInterrupt


def test_report_writes_a_page_and_replaces_none(capsys, path, tmp_path):
    page, history, speed = (tmp_path / name for name in ("page.html", "history.json", "speed.json"))
    history.write_text(json.dumps({"history": [{"when": 1, "rho": 0.1, "primal": 0.5, "dual": 0.25}], "layers": []}))
    words = ("report", path, "-o", page, "--history", history, "--score", "accuracy=0.92")
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "")
    assert out == f"{page}: written, {page.stat().st_size:,} bytes\n"
    text = page.read_text(encoding="utf-8")
    for part in ("conv.weight", "0.92", "accuracy", "<svg", "model.muws"):
        assert part in text
    code, _, err = run(capsys, *words)
    assert (code, page.read_text(encoding="utf-8")) == (2, text)
    assert "--force" in err
    assert json.loads(run(capsys, *words, "--force", "--json")[1]) == {"file": str(page), "n_bytes": len(text.encode())}
    for wrong in ("[{}]", "3", "{", '{"history": 3}', "[" * 100_000):
        history.write_text(wrong)
        code, _, err = run(capsys, *words, "--force")
        assert (code, "holds no history" in err) == (2, True), wrong
    speed.write_text("{}")
    assert "no speed report" in run(capsys, "report", path, "-o", page, "-f", "--speed", speed)[2]
    assert "ends in .html" in run(capsys, "report", path, "-o", tmp_path / "page.txt")[2]
    with pytest.raises(SystemExit):
        run(capsys, "report", path, "-o", page, "--score", "accuracy=high")
    assert "give a name and a number" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:-1])
    assert "the header declares" in run(capsys, "report", path, "-o", page, "-f")[2]
    assert page.read_text(encoding="utf-8") == text
