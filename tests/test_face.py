"""The public names and their docstrings, the code of the README, and what the docs claim."""

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
LIBRARIES = {"lightning_muws.runtime.native.kernels", "lightning_muws.artifact.coder"}  # look like modules to Python
MODULES = [m.name for m in pkgutil.walk_packages(lightning_muws.__path__, "lightning_muws.") if m.name not in LIBRARIES]


def public_things():
    for name in MODULES:
        module = importlib.import_module(name)
        for key, thing in vars(module).items():
            if not key.startswith("_") and getattr(thing, "__module__", None) == name and callable(thing):
                yield f"{name}.{key}", thing


def test_the_public_names():
    assert lightning_muws.__all__ == [
        "Budget", "CompressionRun", "FineTuning", "FormatError", "LayerRule", "MicroStructure", "MuwsError",
        "NMStructure", "Penalty", "Phases", "Retraining", "WeightUnificationCallback", "accelerate", "choose_steps",
        "compress", "dry_run", "export", "export_onnx", "inspect_compressed", "layer_times", "load_compressed",
        "onnx_library", "open_compressed", "save_compressed", "sensitivity", "verify_compressed",
    ]  # fmt: skip
    for name in lightning_muws.__all__:
        assert getattr(lightning_muws, name).__name__ == name
        assert name in dir(lightning_muws)


def test_a_wrong_name_lists_the_right_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'accelerat'; it has Budget, CompressionRun, FineTuning"):
        _ = lightning_muws.accelerat


@pytest.mark.parametrize(("name", "thing"), list(public_things()), ids=lambda x: x if isinstance(x, str) else "")
def test_every_public_object_has_a_docstring(name, thing):
    assert thing.__doc__, name
    assert re.match(r"[A-Z`].*[.:]$", thing.__doc__.splitlines()[0]), f"{name}: {thing.__doc__.splitlines()[0]}"
    if inspect.isclass(thing):
        for key, method in inspect.getmembers(thing, inspect.isfunction):
            if not key.startswith("_") and method.__qualname__.startswith(thing.__name__) and not overrides(thing, key):
                assert method.__doc__, f"{name}.{key}"


def overrides(kind: type, name: str) -> bool:
    return any(hasattr(base, name) for base in (*kind.__mro__[1:], Callback))


@pytest.mark.parametrize("name", ["LayerRule", "MicroStructure", "NMStructure", "Penalty", "Phases", "Retraining"])
def test_settings_are_frozen_dataclasses_with_working_defaults_and_docstrings(name):
    kind = getattr(lightning_muws, name)
    assert kind.__dataclass_params__.frozen
    kind()
    for field in dataclasses.fields(kind):
        assert f"\n        {field.name}: " in kind.__doc__ or f"\n    {field.name}: " in inspect.getdoc(kind), (
            field.name
        )
        assert "None" not in str(field.type), f"{field.name} is optional"


def test_every_error_is_a_muws_error():
    from lightning_muws import errors

    kinds = [k for k in vars(errors).values() if inspect.isclass(k)]
    assert len(kinds) == 6
    assert all(issubclass(kind, MuwsError) for kind in kinds)


def readme_code() -> str:
    return re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)


def test_the_code_of_the_readme_runs(capsys, tmp_path, monkeypatch):
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


def rows_of_modes() -> list[list[str]]:
    text = (ROOT / "docs" / "modes.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if row[0] != "you use" and not row[0].startswith("---")]


def test_the_page_of_modes_has_sixty_rows():
    assert len(rows_of_modes()) >= 60


@pytest.mark.parametrize("row", rows_of_modes(), ids=lambda row: row[0])
def test_each_row_of_the_page_of_modes_is_backed_by_a_test(row):
    _, says, test = row
    assert says
    file, name = re.fullmatch(r"`((?:\w+/)?test_\w+\.py)::(test_\w+)`", test).groups()
    tree = ast.parse((ROOT / "tests" / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_page_of_modes_repeats_each_refusal():
    rows = {row[0]: row[1] for row in rows_of_modes()}
    names = {"DeepSpeedStrategy": "DeepSpeed", "FSDPStrategy": "FSDP1 (`FSDPStrategy`)", "LBFGS": "LBFGS"}
    for kind, why in REFUSED.items():
        assert rows[names.get(kind, f"`{kind}`")].startswith("refused: " + why.split(";")[0].split(",")[0])


def project() -> str:
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def repository() -> str:
    return re.search(r'^Repository = "(.*)"$', project(), re.MULTILINE).group(1)


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_are_absolute_and_their_files_exist(file):
    links = re.findall(r"\]\((.*?)\)", (ROOT / file).read_text(encoding="utf-8"))
    assert links
    raw = repository().replace("github.com", "raw.githubusercontent.com")
    for link in links:
        assert link.startswith("https://"), f"{link} does not work on a package page"
        for start in (f"{repository()}/blob/main/", f"{raw}/main/"):
            path, _, anchor = link.removeprefix(start).partition("#")
            if path != link.partition("#")[0]:
                assert (ROOT / path).is_file(), link
                headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(encoding="utf-8"), re.M) if anchor else []
                assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}, link


def test_the_version_is_the_same_everywhere():
    assert re.search(r'^version = "(.*)"$', project(), re.MULTILINE).group(1) == lightning_muws.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {lightning_muws.__version__}\n" in citation
    assert f"repository-code: {repository()}\n" in citation


def tree_of_the_docs() -> set[str]:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = re.search(r"^```\nlightning_muws/\n(.*?)^```", text, re.DOTALL | re.MULTILINE).group(1)
    folders, files = {0: ""}, set()
    for indent, name in re.findall(r"^( +)(\S+)", block, re.MULTILINE):
        path = folders[len(indent) - 2] + name
        if name.endswith("/"):
            folders[len(indent)] = path
        else:
            files.add(path)
    return files


def test_the_page_of_the_architecture_shows_each_file_of_the_package():
    package = Path(lightning_muws.__file__).parent
    files = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    empty = {name for name in files if name.endswith("/__init__.py")} - {"runtime/kernels/__init__.py"}
    assert tree_of_the_docs() == files - empty


def test_the_index_of_the_api_has_each_public_name():
    text = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\[`(\w+)`\]", text)) == set(lightning_muws.__all__)


def test_every_page_of_the_docs_is_in_the_menu_of_the_site():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages == set(re.findall(r"(\S+\.md)$", menu, re.MULTILINE))


SETTINGS = re.findall(
    r"^\| `(\w+)\((.*?)\)` \|", (ROOT / "docs" / "getting-started.md").read_text("utf-8"), re.MULTILINE
)


def test_the_table_of_settings_has_each_frozen_dataclass():
    public = {name for name in lightning_muws.__all__ if dataclasses.is_dataclass(getattr(lightning_muws, name))}
    assert {name for name, _ in SETTINGS} == public


@pytest.mark.parametrize(("name", "shown"), SETTINGS)
def test_the_table_of_settings_shows_each_field_with_its_default(name, shown):
    fields = dataclasses.fields(getattr(lightning_muws, name))
    assert re.findall(r"(\w+)=", shown) == [field.name for field in fields]
    given = eval(f"dict({shown})", {name: getattr(lightning_muws, name) for name in lightning_muws.__all__})  # noqa: S307
    assert given == {field.name: default(field) for field in fields}


def default(field: dataclasses.Field) -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def test_the_readme_names_the_patents():
    assert "US 11,935,271" in (ROOT / "README.md").read_text()
