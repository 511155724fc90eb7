"""The pages of HTML: what they show, that nothing in a file is taken for markup, and how Chromium shows them."""

import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from torch import nn

from lightning_muws import MicroStructure, inspect_compressed, save_compressed
from lightning_muws.artifact.maps import map_compressed
from lightning_muws.file_page import file_page
from lightning_muws.page import Page
from lightning_muws.pictures import BOTTOM, HEIGHT, Line, Span, line_chart, png
from lightning_muws.report import make_report
from lightning_muws.runtime.measure.report import LayerSpeed, Machine, SpeedReport
from lightning_muws.structure.block_map import COLOURS
from lightning_muws.structure.plan import make_plan
from lightning_muws.training.run import Update
from tests.support.browser import browser
from tests.support.forge import small_model
from tests.support.strategies import normal

HISTORY = [Update(2, 0.003, 0.5, 0.4), Update(2.5, 0.00345, 0.3, 0.2), Update(3, 0.00397, 0.1, 0.0)]
HOSTILE = [
    "<script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "</style></title><svg onload=document.title='owned'>",
    "'-alert(1)-'&lt;b&gt;",
    "\u202egnp.exe\x1b[2J\x00\u2028",
    "https://example.invalid/",
    "x" * 100_000,
]


class Tags(HTMLParser):
    """Collects the tags and texts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def report_of(names=("first", "second")):
    module = nn.Sequential()
    for name in names:
        module.add_module(name, nn.Linear(16, 12))
    plan = make_plan(module, MicroStructure(prune_ratio=0.5, unify_ratio=0.25))
    supports = {}
    for name, entry in plan.covered.items():
        weight = module.get_parameter(name)
        supports[name], _ = entry.structure.nearest(weight.detach(), entry.grid, name)
        weight.data = entry.structure.project(weight.detach(), entry.grid, name)
    return make_report(module, plan, supports, dict.fromkeys(supports, 0.25), HISTORY), supports


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 600), st.integers(0, 99))
def test_a_png_is_read_back_by_another_program(height, width, n_colours, seed):
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (n_colours, 3), np.uint8)[random.integers(0, n_colours, (height, width))]
    found = imread(io.BytesIO(png(pixels)), format="png")[:, :, :3]
    assert np.array_equal(np.rint(found * 255), pixels)


def test_a_chart_has_its_lines_phases_and_labels():
    svg = line_chart([Line("one <b>", "red", [(1, 0.5), (2, 0.25)])], [Span("phase", 1, 2, "blue")], "epoch", "error")
    found = Tags(svg)
    assert {"one <b>", "phase", "epoch", "error"} <= set(found.texts)
    places = [(float(a["cx"]), float(a["cy"])) for tag, a in found.tags if tag == "circle"]
    (x1, y1), (x2, y2) = places
    assert x1 < x2
    assert y1 < y2, "larger values stand higher"
    bottom = HEIGHT - BOTTOM
    assert (bottom - y1) / (bottom - y2) == pytest.approx(2, abs=0.02), "the axis begins at 0"


def test_a_page_of_a_file_shows_its_tensors_streams_history_and_scores(tmp_path):
    path = tmp_path / "model.muws"
    save_compressed(small_model(path), path, extra={"made": "by hand"})
    page = file_page(path, history=HISTORY, scores={"accuracy": 0.925}, speed=report_of()[0])
    found = Tags(page)
    text = " ".join(found.texts)
    for part in ("model.muws", "conv.weight", "8x6x3x3", "magnitudes.float32.3", "0.925", "Residuals", "retraining",
                 "made: \"by hand\"", "unified: one magnitude", "Speed", "same as conv.weight"):  # fmt: skip
        assert part in text, part
    assert sum(tag == "img" for tag, _ in found.tags) == 3
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in found.tags}
    assert page == file_page(path, history=HISTORY, scores={"accuracy": 0.925}, speed=report_of()[0])


def test_a_page_of_a_report_has_a_map_for_each_layer():
    report, supports = report_of()
    found = Tags(report.to_html(scores={"accuracy": 0.9}))
    text = " ".join(found.texts)
    for part in ("first.weight", "second.weight", "12x16 in blocks of 4x4", "Residuals", "0.9"):
        assert part in text
    images = [attrs["src"] for tag, attrs in found.tags if tag == "img"]
    assert len(images) == len(supports) == 2
    assert "maps" not in report.to_dict()
    json.dumps(report.to_dict())


def test_a_notebook_shows_plan_report_file_and_map(tmp_path):
    report, supports = report_of(("<script>first</script>", "second"))
    html = report._repr_html_()
    tags = [tag for tag, _ in Tags(html).tags]
    assert tags.count("img") == len(supports)
    assert "script" not in tags
    assert all(attrs["src"].startswith("data:") for tag, attrs in Tags(html).tags if tag == "img")
    assert "unified: one magnitude" in Tags(html).texts
    for kind, other in ((kind, Tags(kind._repr_html_())) for kind in notebook_values(tmp_path)):
        assert "table" in {tag for tag, _ in other.tags}, kind
        assert not {"script", "b"} & {tag for tag, _ in other.tags}, kind
    found = next(iter(report.maps.values()))
    picture = np.rint(imread(io.BytesIO(found._repr_png_()), format="png")[:, :, :3] * 255)
    scale = len(picture) // len(found.pixels())
    assert scale > 1
    assert np.array_equal(picture[::scale, ::scale], found.pixels())
    assert np.array_equal(picture[scale - 1 :: scale, scale - 1 :: scale], found.pixels())


def notebook_values(folder):
    """Return a plan, a file's content, a saved file's report and a speed report, each with markup in its names."""
    layer = nn.Sequential()
    layer.add_module("<b>", nn.Linear(16, 12))
    yield make_plan(layer, MicroStructure(prune_ratio=0.5))
    yield save_compressed(layer, folder / "m.muws")
    yield inspect_compressed(folder / "m.muws")
    machine = Machine("<b>", "", "", "cpu", 1, "", "none")
    yield SpeedReport(machine, ((1, 16),), 1.0, "", (LayerSpeed("<b>", "Linear", reason="<script>"),), {"dense": 1.0})


def test_a_history_of_nan_is_left_out():
    page = Page("t")
    assert "<svg" not in make_page(page, [Update(1, 0.1, float("nan"), 0.1)])


def make_page(page, history):
    from lightning_muws.report import add_residuals

    add_residuals(page, history)
    return page.html()


def test_nothing_in_a_file_is_markup(tmp_path):
    path = tmp_path / "hostile.muws"
    w = MicroStructure(prune_ratio=0.5).project(normal(0, 16, 16, dtype=torch.float32))
    save_compressed({name: w + i for i, name in enumerate(HOSTILE)}, path, blocks=(4, 4), extra={HOSTILE[0]: HOSTILE})
    page = file_page(path, name=HOSTILE[1])
    assert len(page) < 400_000
    tags = Tags(page).tags
    assert {tag for tag, _ in tags} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "b", "br", "span", "figure", "img",
        "figcaption", "table", "thead", "tbody", "tr", "td", "th", "strong",
    }  # fmt: skip
    assert not [attrs for _, attrs in tags if any(key.startswith("on") or key == "href" for key in attrs)]
    assert all(attrs["src"].startswith("data:image/png;base64,") for tag, attrs in tags if tag == "img")
    assert not re.search("[\u202e\x1b\x00\u2028]", page)


def test_a_file_of_very_many_tensors_makes_a_page_of_limited_size(tmp_path):
    path = tmp_path / "many.muws"
    w = MicroStructure(prune_ratio=0.5).project(normal(0, 8, 8, dtype=torch.float32))
    save_compressed({f"layer.{i}": w * (i + 1) for i in range(1100)}, path, blocks=(4, 4))
    page = file_page(path)
    assert "Not shown: 100 smaller tensors" in page
    assert page.count("<img") == 1000
    assert len(page) < 2_000_000


@pytest.mark.slow
def test_chromium_shows_the_map_and_asks_no_network(tmp_path):
    path = tmp_path / "hostile.muws"
    w = MicroStructure(prune_ratio=0.4, unify_ratio=0.3).project(normal(0, 64, 96, dtype=torch.float32))
    save_compressed({name: w * (i + 1) for i, name in enumerate(HOSTILE)}, path, blocks=(4, 4))
    (tmp_path / "page.html").write_text(file_page(path, history=HISTORY), encoding="utf-8")
    _, maps = map_compressed(path)
    read = """(() => {
        const image = document.images[0], canvas = document.createElement('canvas');
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        const context = canvas.getContext('2d');
        context.drawImage(image, 0, 0);
        return [canvas.width, canvas.height, ...context.getImageData(0, 0, canvas.width, canvas.height).data];
    })()"""
    with browser() as page:
        page.open((tmp_path / "page.html").as_uri())
        width, height, *data = page.evaluate(read)
        shown = np.array(data, np.uint8).reshape(height, width, 4)[:, :, :3]
        assert np.array_equal(shown, next(iter(maps.values())).pixels())
        assert page.evaluate("document.title") == "hostile.muws"
        assert page.evaluate("document.images.length") == len(HOSTILE)
        assert page.evaluate("document.scripts.length + document.links.length") == 0
        assert page.evaluate("getComputedStyle(document.images[0]).imageRendering") == "pixelated"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off at the side"
        lines = """[...document.querySelectorAll('td:nth-child(n+2)')].filter((cell) => cell.innerText).map((cell) => {
            const range = document.createRange();
            range.selectNodeContents(cell);
            return new Set([...range.getClientRects()].map((line) => Math.round(line.top))).size;
        })"""
        assert set(page.evaluate(lines)) == {1}, "a long name does not break the numbers beside it"
        assert {url.partition(":")[0] for url in page.requests} == {"file", "data"}
        assert not page.errors
        page.screenshot(tmp_path / "page.png")
    picture = np.rint(imread(tmp_path / "page.png")[:, :, :3] * 255)
    for colour in COLOURS.values():
        assert (picture == colour).all(axis=2).sum() > 1000, f"the screenshot has little of {colour}"
