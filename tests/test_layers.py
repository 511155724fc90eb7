"""Imports go one way. The order of these lists is the architecture."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_muws"
# A room imports only rooms of earlier lines: rooms of one line do not import each other.
ORDER = [
    ["errors", "tables", "generators"],
    ["pictures"],
    ["page"],
    ["structure"],
    ["training", "artifact", "runtime", "calibration"],
    ["trainer", "ops"],
    ["report", "compression", "hub"],
    ["plots", "sizes", "file_page", "estimate", "fine_tuning"],
    ["callback", "pytorch_lightning", "transformers", "commands"],
    ["cli", "__main__"],
]
STRANGERS = {
    ("trainer", "artifact"),
    ("trainer", "runtime"),
    ("report", "trainer"),
    ("compression", "trainer"),
    ("compression", "training"),
}  # allowed by the order alone
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
MAY_IMPORT_LIGHTNING = {"callback.py", "pytorch_lightning.py", "cli.py"}
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def room_of(file: str) -> str:
    return file.removesuffix(".py").split("/")[0]


def imports(file: str) -> list[str]:
    names = []
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


@pytest.mark.parametrize("file", [f for f in FILES if f != "__init__.py"])
def test_a_room_imports_only_rooms_before_it(file):
    room = room_of(file)
    for name in imports(file):
        if name.startswith("lightning_muws."):
            other = name.split(".")[1]
            assert other == room or LEVEL[other] < LEVEL[room], f"{file} must not import {name}"
            assert (room, other) not in STRANGERS, f"{file} must not import {name}"


@pytest.mark.parametrize("file", FILES)
def test_only_the_callback_imports_lightning(file):
    found = {name.split(".")[0] for name in imports(file)} & {"lightning", "pytorch_lightning", "lightning_fabric"}
    typing_only = file == "__init__.py"
    assert not found or file in MAY_IMPORT_LIGHTNING or typing_only


def test_a_network_is_accelerated_without_lightning_and_without_rich():
    code = (
        "import sys, torch, lightning_muws as m\n"
        "m.accelerate(torch.nn.Linear(8, 8).eval(), torch.ones(1, 8))\n"
        "assert not {'lightning', 'pytorch_lightning', 'rich'} & set(sys.modules), 'more was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603  our own code


def test_structures_and_runs_work_without_lightning():
    code = (
        "import sys, torch, lightning_muws as m\n"
        "from lightning_muws.training.run import CompressionRun\n"
        "m.MicroStructure(prune_ratio=0.5).project(torch.ones(8, 8)); m.Phases(); m.LayerRule()\n"
        "assert not {'lightning', 'pytorch_lightning'} & set(sys.modules), 'Lightning was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603  our own code


def test_files_are_written_and_read_without_lightning(tmp_path):
    code = (
        "import sys, torch, lightning_muws as m\n"
        f"m.save_compressed(torch.nn.Linear(8, 8), {str(tmp_path / 'm.muws')!r})\n"
        f"m.load_compressed({str(tmp_path / 'm.muws')!r}, into=torch.nn.Linear(8, 8))\n"
        "assert not {'lightning', 'pytorch_lightning'} & set(sys.modules), 'Lightning was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603  our own code


def test_the_coder_knows_no_torch():
    assert not [name for name in imports("artifact/rans.py") if name.startswith("torch")]
