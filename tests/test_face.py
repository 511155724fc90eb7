"""The public face: its names, their texts, and the README's code."""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
from lightning.pytorch import Callback

import lightning_muws
from lightning_muws.errors import MuwsError
from lightning_muws.trainer.trainers import REFUSED

ROOT = Path(__file__).parents[1]
LIBRARY = "lightning_muws.runtime.native.kernels"  # looks like a module to Python, and is a plain library
MODULES = [m.name for m in pkgutil.walk_packages(lightning_muws.__path__, "lightning_muws.") if m.name != LIBRARY]


def public_things():
    for name in MODULES:
        module = importlib.import_module(name)
        for key, thing in vars(module).items():
            if not key.startswith("_") and getattr(thing, "__module__", None) == name and callable(thing):
                yield f"{name}.{key}", thing


def test_the_public_names():
    assert lightning_muws.__all__ == [
        "CompressionRun", "FormatError", "LayerRule", "MicroStructure", "MuwsError", "NMStructure", "Penalty", "Phases",
        "Retraining", "WeightUnificationCallback", "accelerate", "inspect_compressed", "load_compressed",
        "save_compressed", "verify_compressed",
    ]  # fmt: skip
    for name in lightning_muws.__all__:
        assert getattr(lightning_muws, name).__name__ == name
        assert name in dir(lightning_muws)


def test_a_wrong_name_says_what_there_is():
    with pytest.raises(AttributeError, match=r"no attribute 'accelerat'; it has CompressionRun, FormatError"):
        _ = lightning_muws.accelerat


@pytest.mark.parametrize(("name", "thing"), list(public_things()), ids=lambda x: x if isinstance(x, str) else "")
def test_every_public_thing_says_what_it_does(name, thing):
    assert thing.__doc__, name
    assert re.match(r"[A-Z`].*[.:]$", thing.__doc__.splitlines()[0]), f"{name}: {thing.__doc__.splitlines()[0]}"
    if inspect.isclass(thing):
        for key, method in inspect.getmembers(thing, inspect.isfunction):
            if not key.startswith("_") and method.__qualname__.startswith(thing.__name__) and not overrides(thing, key):
                assert method.__doc__, f"{name}.{key}"


def overrides(kind: type, name: str) -> bool:
    return any(hasattr(base, name) for base in (*kind.__mro__[1:], Callback))


@pytest.mark.parametrize("name", ["LayerRule", "MicroStructure", "NMStructure", "Penalty", "Phases", "Retraining"])
def test_settings_are_frozen_dataclasses_with_working_defaults_and_texts(name):
    kind = getattr(lightning_muws, name)
    assert kind.__dataclass_params__.frozen
    kind()
    for field in dataclasses.fields(kind):
        assert f"\n        {field.name}: " in kind.__doc__ or f"\n    {field.name}: " in inspect.getdoc(kind), (
            field.name
        )
        assert "None" not in str(field.type), f"{field.name} is optional"


def test_every_error_is_of_the_family():
    from lightning_muws import errors

    kinds = [k for k in vars(errors).values() if inspect.isclass(k)]
    assert len(kinds) == 5
    assert all(issubclass(kind, MuwsError) for kind in kinds)


def readme_code() -> str:
    return re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)


def test_the_readme_begins_with_code_that_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = readme_code()
    assert len([line for line in code.splitlines() if line]) <= 20
    scope: dict = {}
    exec(code, scope)  # noqa: S102  the README's own code is what is tested
    callback = scope["callback"]
    assert callback.phase == "retraining"
    callback.verify()
    scope["Net"]().load_state_dict(lightning_muws.load_compressed("model.muws"))
    assert "Micro-structured weights" in capsys.readouterr().out


def readme_rows() -> list[list[str]]:
    section = (ROOT / "README.md").read_text().split("## Works with, or refused\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("row", readme_rows(), ids=lambda row: row[0])
def test_each_row_of_the_readme_is_backed_by_a_test(row):
    _, says, test = row
    assert says
    file, name = re.fullmatch(r"`((?:\w+/)?test_\w+\.py)::(test_\w+)`", test).groups()
    tree = ast.parse((ROOT / "tests" / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_readme_says_what_each_refusal_says():
    rows = {row[0]: row[1] for row in readme_rows()}
    names = {"DeepSpeedStrategy": "DeepSpeed", "FSDPStrategy": "FSDP1 (`FSDPStrategy`)", "LBFGS": "LBFGS"}
    for kind, why in REFUSED.items():
        assert rows[names.get(kind, f"`{kind}`")].startswith("refused: " + why.split(";")[0].split(",")[0])


def test_the_readme_names_the_patents():
    assert "US 11,935,271" in (ROOT / "README.md").read_text()
