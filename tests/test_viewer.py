"""The viewer's reader in JavaScript against the Python reader, in node and in a real Chromium."""

import json
import shutil
import struct
import subprocess
import threading
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lightning_muws import MicroStructure, load_compressed, save_compressed
from lightning_muws.artifact.manifest import DTYPES
from lightning_muws.artifact.maps import map_compressed
from lightning_muws.commands.view import FOLDER, TYPES, Server
from lightning_muws.errors import FormatError
from tests.artifact.test_attacks import HOSTILE, MORE, many_keys, reframed
from tests.support.browser import browser
from tests.support.forge import corrupt, newer_model, put_together, small_model, take_apart
from tests.support.strategies import normal

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.muws"))
READER = Path(__file__).parent / "support" / "read_muws.mjs"


def read_in_node(folder: Path, files: list[Path]) -> list[dict]:
    """Return what the reader in JavaScript makes of each file; its tensors are in ``<n>.safetensors`` in the folder."""
    node = shutil.which("node") or pytest.skip("node is not installed, such as the package nodejs of Debian")
    command = [node, str(READER), str(folder), *map(str, files)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603  our own code
    return [json.loads(line) for line in found.stdout.splitlines()]


def assert_same(found: Path, path: Path) -> None:
    """Compare all tensors bit for bit with those of the Python reader."""
    ours, theirs = load_compressed(path), load_file(found)
    assert set(ours) == set(theirs)
    for name, x in ours.items():
        y = theirs[name]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        assert x.contiguous().view(-1).view(torch.uint8).equal(y.view(-1).view(torch.uint8)), name


def is_accepted(path: Path, found: dict, saved: Path) -> bool:
    """Return whether both readers accept a file; fail if one of them refuses it alone, or reads other bytes."""
    try:
        load_compressed(path)
    except FormatError:
        assert (found["ok"], found.get("kind")) == (False, "FormatError"), (path, found)
        return False
    assert found["ok"], (path, found)
    assert_same(saved, path)
    return True


def n_accepted(folder: Path, files: list[Path]) -> int:
    """Return how many of the files both readers accept."""
    found = enumerate(read_in_node(folder, files))
    return sum(is_accepted(files[i], result, folder / f"{i}.safetensors") for i, result in found)


def states() -> dict[str, tuple[dict[str, torch.Tensor], dict]]:
    """Return state_dicts of all kinds that a file may hold, each with the settings to save it."""
    structure = MicroStructure((2, 4), 0.4, 0.3)
    float8 = [name for name in DTYPES if name.startswith("float8_")]
    floats = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
    structured = {name: structure.project(normal(2, 20, 30)).to(dtype) for name, dtype in floats.items()}
    turned = structure.project(normal(9, 16, 12, dtype=torch.float32)).view(4, 4, 4, 3)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-42, 3e38, 5e-324])
    whole = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    integers = {name: normal(1, 9, 7).mul(40).abs().long().to(DTYPES[name]) for name in whole}
    others = {"bool": normal(3, 9, 9) > 0, "empty": torch.ones(0, 3), "scalar": torch.tensor(2.5)}
    others["complex64"] = torch.complex(normal(1, 6).float(), normal(2, 6).float())
    others |= {name: torch.arange(256).to(torch.uint8).view(DTYPES[name]) for name in float8}
    large = {"large": MicroStructure((4, 4), 0.5, 0.3).project(normal(4, 700, 704)), "free": normal(5, 300, 301)}
    wide = {name: normal(6, 40, 40).to(dtype) for name, dtype in floats.items()}
    tiny = {"subnormal": (normal(8, 64, 64) * 1e-6).float(), "f64": normal(7, 64, 64)}
    return {
        "structured": (structured, {"blocks": (2, 4)}),
        "turned": ({"conv.weight": turned, "bias": odd.float(), "odd": odd.double(), "half": odd.half()}, {}),
        "integers": (integers | others, {}),
        "large": (large, {}),
        "lossy": (wide, {"max_error": 0.003, "lossy": "all"}),
        "to float16": (wide | tiny, {"value_dtype": "float16", "lossy": "all"}),
        "to bfloat16": (wide | tiny, {"value_dtype": "bfloat16", "lossy": "all"}),
        "small": ({name: x.float() for name, x in large.items()}, {"compression": 6}),
        "extra": ({"a": torch.ones(3)}, {"extra": {"text": "\u00e9\U0001f600\n", "list": [1, 2.5, None, True]}}),
    }


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_files_are_read_to_the_same_bytes(path, tmp_path):
    (found,) = read_in_node(tmp_path, [path])
    assert found["ok"], found
    assert_same(tmp_path / "0.safetensors", path)
    info, maps = map_compressed(path)
    assert {name: map_["counts"] for name, map_ in found["maps"].items()} == {
        name: map_.counts.reshape(-1).tolist() for name, map_ in maps.items()
    }
    streams = {one["name"]: (one["bytes"], one["coders"]) for one in found["streams"]}
    assert streams == {name: (n, info.coders[name]) for name, n in info.streams.items()}


def test_files_of_every_dtype_form_and_shape_are_read_to_the_same_bytes(tmp_path):
    files = []
    for i, (state, settings) in enumerate(states().values()):
        files.append(tmp_path / f"{i}.muws")
        save_compressed(state, files[-1], **settings)
    conv = torch.nn.ConvTranspose2d(8, 6, 3, groups=2)
    torch.nn.init.constant_(conv.weight, 0.5)
    save_compressed(conv, tmp_path / "conv.muws", blocks=(2, 3))
    files.append(tmp_path / "conv.muws")
    for i, found in enumerate(read_in_node(tmp_path, files)):
        assert found["ok"], (list(states())[i:][:1], found)
        assert_same(tmp_path / f"{i}.safetensors", files[i])


def test_a_large_map_is_the_same(tmp_path):
    weight = MicroStructure((1, 1), 0.5).project(normal(0, 500, 211))
    save_compressed({"w": weight}, tmp_path / "m.muws", blocks=(1, 1))
    (found,) = read_in_node(tmp_path, [tmp_path / "m.muws"])
    ours = map_compressed(tmp_path / "m.muws")[1]["w"]
    assert found["maps"]["w"]["cell"] == list(ours.cell) == [3, 2]
    assert found["maps"]["w"]["counts"] == ours.counts.reshape(-1).tolist()


def hostile(good: bytes) -> dict[str, bytes]:
    """Return hostile files by what is wrong with them."""
    found = {name: attack(good) for name, (attack, _) in {**HOSTILE, **MORE}.items()}
    found["a manifest of keys"] = reframed(raw=many_keys())(good)
    found["a header that nests"] = struct.pack("<Q", 60_000) + b'{"a":' + b"[" * 29_997 + b"]" * 29_997 + b"}"
    return found


def test_hostile_files_are_refused_as_in_python_within_two_seconds(tmp_path):
    small_model(tmp_path / "good.muws")
    attacks = hostile((tmp_path / "good.muws").read_bytes())
    files = []
    for i, data in enumerate(attacks.values()):
        files.append(tmp_path / f"{i}.bad")
        files[-1].write_bytes(data)
    best = [1e9] * len(files)
    for _ in range(3):  # a busy machine may be slow once
        results = read_in_node(tmp_path, files)
        best = [min(a, found["ms"]) for a, found in zip(best, results, strict=True)]
        if max(best) < 2000:
            break
    for name, path, found, ms in zip(attacks, files, results, best, strict=True):
        assert (found["ok"], found.get("kind")) == (False, "FormatError"), (name, found)
        assert ms < 2000, (name, ms)
        with pytest.raises(FormatError):
            load_compressed(path)


def test_damaged_files_are_refused_as_in_python(tmp_path):
    small_model(tmp_path / "a.muws")
    newer_model(tmp_path / "b.muws")
    good = [(tmp_path / name).read_bytes() for name in ("a.muws", "b.muws")]
    files = []
    for seed in range(300):
        files.append(tmp_path / f"{seed}.muws")
        files[-1].write_bytes(corrupt(good[seed % 2], good[1 - seed % 2], seed))
    assert n_accepted(tmp_path, files) == 0


def test_streams_with_right_checksums_are_accepted_and_refused_as_in_python(tmp_path):
    random, files = np.random.default_rng(0), []
    for seed, make in enumerate((small_model, newer_model) * 30):
        path = tmp_path / f"{seed}.muws"
        if seed < 2:
            make(path)
            (tmp_path / f"good{seed}").write_bytes(path.read_bytes())
        manifest, streams = take_apart((tmp_path / f"good{seed % 2}").read_bytes())
        name = random.choice(list(streams))
        data = bytearray(streams[name])
        for _ in range(random.integers(1, 4)):
            data[random.integers(len(data))] = random.integers(256)
        streams[name] = bytes(data[: len(data) - random.integers(0, 2)])
        chunk, _, stream = name.partition(".")
        manifest["chunks"][int(chunk[1:])]["streams"][stream][1] = zlib.crc32(streams[name])
        path.write_bytes(put_together(manifest, streams))
        files.append(path)
    assert 6 < n_accepted(tmp_path, files) < 54, "the changes are of both kinds"


# ---- the server of `muws view`


def get(url: str, **headers: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:  # noqa: S310
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.fixture
def server(tmp_path):
    small_model(tmp_path / "model.muws")
    with Server(tmp_path / "model.muws") as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def test_the_server_has_the_viewer_and_one_file_for_this_machine_alone(server, tmp_path):
    assert server.server_address[0] == "127.0.0.1"
    assert get(server.url) == (200, (FOLDER / "index.html").read_bytes())
    for name in TYPES:
        assert get(server.url + name) == (200, (FOLDER / name).read_bytes())
    assert get(server.url + "file") == (200, (tmp_path / "model.muws").read_bytes())
    for path in ("other", "../file", "%2e%2e/pyproject.toml", "/etc/passwd", "muws.js/"):
        assert get(server.url + path)[0] == 404
    root = server.url.removesuffix(f"{server.secret}/")
    for path in ("", "file", "x/file", "index.html"):
        assert get(root + path) == (404, b"")
    assert get(server.url, Host="example.invalid") == (403, b"")
    assert {path.name for path in FOLDER.iterdir()} == set(TYPES)


# ---- the page

STATUS = "document.getElementById('status').textContent"
WATCH = """
window.gap = 0;
window.tick = performance.now();
setInterval(() => {
    const now = performance.now();
    window.gap = Math.max(window.gap, now - window.tick);
    window.tick = now;
}, 10);
"""


def open_viewer(page, server) -> None:
    page.open(server.url)
    page.wait("document.scripts.length === 1")


@pytest.mark.slow
def test_chromium_shows_golden_files_and_saves_their_tensors(server, tmp_path):
    downloads = tmp_path / "downloads"
    with browser() as page:
        open_viewer(page, server)
        page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
        for path in GOLDEN:
            page.drop(path)
            page.wait(f"{STATUS}.startsWith('Intact')")
            info, maps = map_compressed(path)
            assert page.evaluate("document.getElementById('name').textContent") == path.name
            assert page.evaluate(
                "[...document.querySelectorAll('#rows tr')].map((row) => row.cells[0].textContent)"
            ) == [tensor.name for tensor in info.tensors]
            shown = page.evaluate(
                "[...document.querySelectorAll('canvas')].map((c) => [c.height, c.width, "
                "...c.getContext('2d').getImageData(0, 0, c.width, c.height).data])"
            )
            assert len(shown) == len(maps)
            for (height, width, *data), ours in zip(shown, maps.values(), strict=True):
                assert np.array_equal(np.array(data, np.uint8).reshape(height, width, 4)[:, :, :3], ours.pixels())
            page.screenshot(tmp_path / f"{path.stem}.png")
            page.evaluate("document.getElementById('save').click()")
            page.wait(f"{STATUS}.startsWith('Saved')")
            saved = downloads / f"{path.stem}.safetensors"
            size = int(page.evaluate(STATUS).split()[1].replace(",", ""))
            page.wait("true")
            for _ in range(200):
                if saved.exists() and saved.stat().st_size == size:
                    break
                page.evaluate("new Promise((resolve) => setTimeout(resolve, 50))")
            assert_same(saved, path)
        own = server.url.removesuffix("/")
        assert {url for url in page.requests if not url.startswith((own, "blob:", "data:"))} == set()
        assert not page.errors


@pytest.mark.slow
def test_chromium_refuses_hostile_files_within_two_seconds_and_does_not_freeze(server, tmp_path):
    good = (tmp_path / "model.muws").read_bytes()
    attacks = {
        name: data for name, data in hostile(good).items() if name in HOSTILE or name.startswith("a manifest of keys")
    }
    w = normal(0, 64, 64, dtype=torch.float32)
    name = "<img src=x onerror=document.title='owned'>\u202e" + "x" * 100_000
    save_compressed({name: w}, tmp_path / "named.muws", extra={name: name})
    with browser() as page:
        open_viewer(page, server)
        page.evaluate(WATCH)
        for i, (what, data) in enumerate(attacks.items()):
            path = tmp_path / f"{i}.muws"
            path.write_bytes(data)
            tries = []
            for _ in range(4):  # a busy machine may be slow once
                page.evaluate(f"window.gap = 0, {STATUS} = ''")
                begun = page.evaluate("performance.now()")
                page.choose("#file", path)
                page.wait(f"{STATUS}.startsWith('Refused')")
                tries.append((page.evaluate("performance.now()") - begun, page.evaluate("window.gap")))
                assert page.evaluate("document.getElementById('shown').hidden")
                if min(seconds for seconds, _ in tries) < 2000 and min(gap for _, gap in tries) < 500:
                    break
            assert min(seconds for seconds, _ in tries) < 2000, (what, tries)
            assert min(gap for _, gap in tries) < 500, (what, tries)
        manifest, streams = take_apart(good)
        streams["c0.signs"] = bytes(len(streams["c0.signs"]))
        (tmp_path / "damaged.muws").write_bytes(put_together(manifest, streams))
        page.choose("#file", tmp_path / "damaged.muws")
        page.wait(f"{STATUS}.startsWith('Refused') && {STATUS}.includes('damaged')")
        page.screenshot(tmp_path / "refused.png")
        page.choose("#file", tmp_path / "named.muws")  # good, with a name that is no good
        page.wait(f"{STATUS}.startsWith('Intact')")
        assert page.evaluate("document.title") == ".muws viewer"
        assert page.evaluate("document.images.length") == 0
        assert page.evaluate("document.body.innerText.length") < 30_000
        assert "\u202e" not in page.evaluate("document.body.innerText")
        assert not page.errors


@pytest.mark.slow
def test_chromium_shows_the_file_that_muws_view_serves_and_more_tensors_on_demand(tmp_path):
    path = tmp_path / "many & more.muws"
    w = MicroStructure(prune_ratio=0.5).project(normal(0, 8, 8, dtype=torch.float32))
    save_compressed({f"layer.{i}": w * (i + 1) for i in range(250)}, path, blocks=(4, 4))
    with Server(path) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        with browser() as page:
            page.open(server.url + "#many%20%26%20more.muws")
            page.wait(f"{STATUS}.startsWith('Intact')")
            assert page.evaluate("document.getElementById('name').textContent") == path.name
            for n in (100, 200, 250):
                page.wait(f"document.querySelectorAll('canvas').length === {n}")
                page.evaluate("document.getElementById('more').click()")
            assert page.evaluate("document.getElementById('more').hidden")
        server.shutdown()
        thread.join()


def test_the_reader_is_one_module_that_loads_nothing():
    text = (FOLDER / "muws.js").read_text(encoding="utf-8")
    for word in ("import ", "require(", "fetch(", "XMLHttpRequest", "eval(", "Function("):
        assert word not in text, word
