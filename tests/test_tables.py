"""Tables fit the terminal, keep their numbers, and are shown by print, by notebooks and by rich."""

import importlib.metadata
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from torch import nn

from lightning_muws import MicroStructure, inspect_compressed, save_compressed
from lightning_muws.report import make_report
from lightning_muws.structure.plan import make_plan
from lightning_muws.tables import Column, Table, shorten, visible
from lightning_muws.training.run import Update

HISTORY = [Update(2, 0.003, 0.5, 0.4), Update(2.5, 0.00345, 0.3, 0.2), Update(3, 0.00397, 0.1, 0.0)]
# the names of a transformer's weights, the longest of networks in common use
ROLES = ("self.query", "self.key", "self.value", "output.dense")
BERT = [f"bert.encoder.layer.{i}.attention.{role}.weight" for i in range(12) for role in ROLES]
BERT += [f"bert.encoder.layer.{i}.{part}.dense.weight" for i in range(12) for part in ("intermediate", "output")]


def report_on(names, n=4096):
    """A report as of a real network of ten million weights, with these names."""
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    plan = make_plan(module, MicroStructure(prune_ratio=0.5, unify_ratio=0.25))
    supports = {}
    for name, entry in plan.covered.items():
        weight = module.get_parameter(name)
        support, _ = entry.structure.nearest(weight.detach(), entry.grid, name)
        weight.data = entry.structure.project(weight.detach(), entry.grid, name)
        supports[name] = support
    report = make_report(module, plan, supports, dict.fromkeys(supports, 0.25), HISTORY)
    layer = vars(report.layers[0])
    counts = dict.fromkeys(("n_dense", "n_unified", "n_pruned", "n_edge"), 147_456)
    layers = [
        type(report.layers[0])(**{**layer, **counts, "name": name, "n_nonzero": 1_179_648, "n_weights": 7_077_888})
        for name in names
    ]
    return type(report)(tuple(layers), 1000, 32_000, report.history)


@pytest.fixture
def saved(tmp_path):
    state = {name: torch.eye(768, 64) for name in BERT[:4]} | {"a.very.long.name.of.a.shared.weight": torch.ones(3)}
    state["other"] = state[BERT[0]]
    report = save_compressed(state, tmp_path / "model.muws")
    return report, inspect_compressed(tmp_path / "model.muws")


def test_a_table_is_laid_out_as_by_hand():
    table = Table("Numbers", [Column("name", room=4), Column("n")], [("one", "1"), ("three", "33")], ("all", "34"))
    lines = ["Numbers", "name    n", "-----  --", "one     1", "three  33", "-----  --", "all    34"]
    assert table.text() == "\n".join(lines)


def test_columns_are_left_out_in_their_order_and_named():
    columns = [Column("a", room=4), Column("second", drop=1), Column("third", drop=2), Column("fourth")]
    table = Table("", columns, [("name", "2", "3", "4"), ("more", "a cell that reaches to the end")])
    assert table.text(27).splitlines()[0].split() == ["a", "second", "third", "fourth"]
    assert table.text(26).splitlines()[0].split() == ["a", "second", "fourth"]
    assert table.text(18).splitlines()[0].split() == ["a", "fourth"]
    assert "Not shown at this width: second, third." in " ".join(table.text(18).split())


@given(
    st.lists(st.tuples(st.text(max_size=40), st.integers(0, 10**9), st.integers(0, 10**9)), max_size=5),
    st.integers(40, 200),
)
def test_every_line_fits_and_every_required_number_is_shown(rows, width):
    columns = [Column("name", room=8), Column("optional", drop=1), Column("number")]
    table = Table("A table", columns, [(name, f"{a:,}", f"{b:,}") for name, a, b in rows])
    text = table.text(width)
    assert all(len(line) <= width for line in text.splitlines())
    assert all(f"{b:,}" in text for _, _, b in rows)


@given(st.text(max_size=60), st.integers(1, 60))
def test_a_short_name_is_no_longer_than_asked_and_a_fitting_name_is_itself(name, width):
    assert len(shorten(name, width)) <= width
    if len(name) <= width:
        assert shorten(name, width) == name


@pytest.mark.parametrize("width", [40, 30, 24, 16, 14])
def test_shortened_names_of_a_transformer_stay_apart(width):
    short = [shorten(name, width) for name in BERT]
    assert max(map(len, short)) <= width
    assert len(set(short)) == len(BERT)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_a_compression_report_of_a_large_network_fits(width):
    report = report_on(BERT)
    lines = report.tables()[0].text(width).splitlines()
    assert max(map(len, lines)) <= width
    header, rows = lines[1].split(), lines[3 : 3 + len(BERT)]
    assert {"layer", "dense", "unified", "pruned", "nonzero", "residual", "bits"} <= set(header)
    assert len({row.split()[0] for row in rows}) == len(BERT)
    assert all("1,179,648" in row and row.count("147,456") >= 3 and "0.250" in row for row in rows)
    assert ("shape" in header) == (width == 160)


@pytest.mark.parametrize("width", [80, 160])
def test_the_other_reports_fit(saved, width):
    plan = make_plan(nn.TransformerEncoderLayer(64, 4, 128), MicroStructure(prune_ratio=0.5))
    for table in (*saved[0].tables(), *saved[1].tables(), *plan.tables(), *report_on(BERT).tables()):
        _, *lines = table.text(width).splitlines()
        assert max(map(len, lines)) <= width, table.title
        assert len(table.columns) > 1


def test_a_plan_is_shown_with_its_reasons():
    plan = make_plan(nn.Sequential(nn.Linear(8, 10), nn.LayerNorm(10)), MicroStructure(prune_ratio=0.5))
    text = plan.text()
    assert "1 of 4 parameters get a structure" in text
    (row,) = [line.split() for line in text.splitlines() if line.startswith("0.weight")]
    assert row == ["0.weight", "10x8", "Linear", "4x4", "2", "0", "4", "16"]
    (left_out,) = [line.split() for line in text.splitlines() if line.startswith("1.weight")]
    assert left_out == ["1.weight", "10", "LayerNorm", "left", "out:", "fewer", "than", "2", "axes"]


@pytest.mark.parametrize(("columns", "is_full"), [("80", False), ("200", True), ("", True), ("wide", True)])
def test_print_fits_the_terminal_and_a_pipe_gets_everything(capsys, monkeypatch, columns, is_full):
    monkeypatch.setenv("COLUMNS", columns)
    report = report_on(BERT[:1])
    report.print()
    out = capsys.readouterr().out
    assert out == f"{report}\n"
    assert (BERT[0] in out) == ("mults" in out.splitlines()[1]) == is_full


def test_print_asks_the_terminal_for_its_width(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    report = report_on(BERT[:1])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: __import__("os").terminal_size((80, 24)))
    report.print()
    assert "Not shown at this width" in capsys.readouterr().out


class Cells(HTMLParser):
    """Collects the texts of cells, and checks that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cells = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def test_notebooks_show_every_cell(saved):
    plan = make_plan(nn.Sequential(nn.Linear(8, 10), nn.LayerNorm(10)), MicroStructure(prune_ratio=0.5))
    for thing in (report_on(BERT), plan, *saved):
        expected = []
        for table in thing.tables():
            expected += [column.header for column in table.columns]
            expected += [cell for row in table.rows for cell in row] + list(table.total)
        assert Cells(thing._repr_html_()).cells == expected


def test_names_of_a_hostile_file_are_no_html_and_no_commands_to_the_terminal():
    table = Table("<b>", [Column("name", room=4)], [("<script>", ), ("\x1b[31m\u202e\n", )])  # fmt: skip
    assert "<script>" not in table.html()
    assert Cells(table.html()).cells == ["name", "<script>", r"\x1b[31m\u202e\n"]
    assert table.text().splitlines()[-1] == r"\x1b[31m\u202e\n"
    assert visible("größe.weight") == "größe.weight"


def test_rich_shows_the_same_tables_at_its_own_width():
    rich = pytest.importorskip("rich.console")
    report = report_on(BERT[:2])
    for width in (80, 160):
        console = rich.Console(width=width, file=io.StringIO())
        console.print(report)
        lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
        assert lines == "\n\n".join(table.text(width) for table in report.tables()).splitlines()


def test_everything_is_shown_without_rich_matplotlib_and_jsonargparse(tmp_path):
    code = (
        "import sys\n"
        "for name in ('rich', 'matplotlib', 'jsonargparse', 'torchmetrics'): sys.modules[name] = None\n"
        "import torch, lightning_muws as m\n"
        "from lightning_muws.commands.main import main\n"
        "import lightning_muws.plots, lightning_muws.report\n"
        f"path = {str(tmp_path / 'm.muws')!r}\n"
        "print(m.save_compressed(torch.nn.Linear(8, 8), path), m.inspect_compressed(path))\n"
        "assert main(['inspect', path]) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("weight") == 2
    assert done.stdout.count("header, manifest") == 1


def needs(package: str) -> set[str]:
    """Return the packages that a plain installation of a package brings along, itself included."""
    found, new = set(), {package}
    while new:
        name = new.pop()
        found.add(name)
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            if not requirement.marker or requirement.marker.evaluate({"extra": ""}):
                new |= {requirement.name.lower().replace("_", "-")} - found
    return found


def test_an_installation_brings_no_rich_as_lightning_would_change_the_user_s_progress_bar():
    """Lightning shows its bars, its model summary and its metrics with rich wherever rich is installed."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    ours = re.search(r"\ndependencies = \[(.*?)\n\]", text, re.DOTALL).group(1)
    names = re.findall(r'"([\w-]+)', ours)
    assert "lightning" in names
    assert not {"rich", "jsonargparse", "torchmetrics"} & set(names)
    assert "rich" not in set().union(*map(needs, names))
