"""Single tensors and rows of a file: equal to those of the whole, from few bytes, and refused as the whole is."""

import functools
import http.server
import io
import re
import threading
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_muws import MicroStructure, inspect_compressed, load_compressed, open_compressed, save_compressed
from lightning_muws.artifact import save, writer
from lightning_muws.artifact.codecs import decode
from lightning_muws.artifact.opening import opened_bytes
from lightning_muws.errors import FormatError, SettingError, StateError
from lightning_muws.structure.grid import BlockGrid
from tests.artifact.test_attacks import HOSTILE, MORE
from tests.support.forge import put_together, small_model, take_apart
from tests.support.peak_memory import run
from tests.support.strategies import normal


class Counted(io.BytesIO):
    """A file in memory that counts the bytes that are read."""

    n_read = 0

    def read(self, size=-1):
        data = super().read(size)
        self.n_read += len(data)
        return data


@pytest.fixture
def small_chunks(monkeypatch):
    for module in (writer, save):
        monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 16)


def many_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Write a file of many chunks: large and small tensors, in blocks, flat, shared, empty, of other dtypes."""
    structure = MicroStructure((2, 4), 0.5, 0.3)
    f32 = functools.partial(normal, dtype=torch.float32)
    state = {
        "a.weight": structure.project(f32(0, 300, 130)),
        "a.bias": f32(1, 300),
        "a.steps": torch.arange(-600.0, 600.0).view(30, 40) * 0.125,
        "b.weight": f32(2, 70, 33, 3, 3),
        "b.bias": f32(3, 70),
        "none": torch.empty(0, 5),
        "count": torch.tensor(7),
        "mask": f32(4, 500, 3) > 0,
        "up.weight": structure.project(f32(5, 40, 20, 4, 4)),
        "half": f32(6, 512, 100).half(),
        "long": torch.arange(30_000).view(300, 100),
    }
    state["tied"] = state["a.weight"]
    state["copy"] = state["half"].clone()
    save_compressed(state, path, blocks={"up.weight": BlockGrid((2, 4), out_axis=1)})
    return state


@pytest.fixture
def path(tmp_path, small_chunks) -> Path:
    many_tensors(tmp_path / "model.muws")
    return tmp_path / "model.muws"


def test_each_tensor_is_that_of_the_whole_file(path):
    state = load_compressed(path)
    with open_compressed(path) as file:
        assert file.keys() == list(state)
        assert len(file) == len(state)
        assert "a.weight" in file
        assert "no" not in file
        assert file.n_bytes == path.stat().st_size
        for name, x in state.items():
            assert file.shape(name) == tuple(x.shape)
            assert file.dtype(name) == x.dtype
            found = file.get_tensor(name)
            assert found.dtype == x.dtype
            assert torch.equal(found, x)
            assert found.is_contiguous()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(data=st.data())
def test_rows_are_the_slice_of_the_tensor(path, data):
    state = load_compressed(path)
    name = data.draw(st.sampled_from([name for name, x in state.items() if x.ndim]))
    stop = data.draw(st.integers(0, len(state[name])))
    start = data.draw(st.integers(0, stop))
    with open_compressed(path) as file:
        found = file.get_rows(name, start, stop)
    assert found.dtype == state[name].dtype
    assert found.shape == state[name][start:stop].shape
    assert torch.equal(found, state[name][start:stop])


def test_a_large_tensor_reads_at_most_a_fifth_more_than_a_file_of_it_alone(tmp_path, small_chunks):
    state = {}
    for i in range(6):  # a few chunks each, with small ones between them as in a network
        state[f"{i}.weight"] = MicroStructure((2, 4), 0.4, 0.3).project(
            normal(i, 200 + 40 * i, 256, dtype=torch.float32)
        )
        state[f"{i}.bias"] = normal(i, 200 + 40 * i, dtype=torch.float32)
        state[f"{i}.small"] = normal(i, 60, 32, dtype=torch.float32)
    save_compressed(state, tmp_path / "all.muws")
    file = Counted((tmp_path / "all.muws").read_bytes())
    with open_compressed(file) as opened:
        at_opening, n_bytes = file.n_read, opened.n_bytes
        for name in (f"{i}.weight" for i in range(6)):
            alone = save_compressed({name: state[name]}, tmp_path / "one.muws").n_bytes
            file.n_read = 0
            assert torch.equal(opened.get_tensor(name), state[name])
            assert file.n_read <= 1.2 * alone < n_bytes / 3, name
    assert at_opening < n_bytes / 10


def test_rows_read_the_chunks_that_hold_them(path):
    file = Counted(path.read_bytes())
    with open_compressed(file) as opened:
        file.n_read = 0
        opened.get_tensor("a.weight")  # of 156 kB, over three chunks
        whole, file.n_read = file.n_read, 0
        opened.get_rows("a.weight", 20, 25)
        assert 0 < file.n_read < 0.55 * whole
        file.n_read = 0
        assert opened.get_rows("a.weight", 7, 7).shape == (0, 130)
        assert file.n_read == 0


@pytest.mark.slow
def test_a_tensor_of_a_large_file_takes_the_memory_of_one_chunk(tmp_path):
    assert run("partial", 160, 4, tmp_path) < 40  # beyond the tensor itself, of a file of 160 MB in chunks of 4


# ---- loading some tensors, and into modules


def test_names_and_patterns_load_these_tensors_only(path):
    state = load_compressed(path)
    file = Counted(path.read_bytes())
    found = load_compressed(file, names=["b.*", "count"])
    assert list(found) == ["b.weight", "b.bias", "count"]
    assert all(torch.equal(x, state[name]) for name, x in found.items())
    assert file.n_read < len(file.getvalue()) / 2
    shared = load_compressed(path, names=["tied", "a.weight", "copy", "half"])
    assert shared["tied"] is shared["a.weight"]
    assert shared["copy"] is not shared["half"]
    assert torch.equal(load_compressed(path, names=["tied"])["tied"], state["a.weight"])


def test_names_load_these_tensors_of_a_module(tmp_path):
    torch.manual_seed(0)
    one, other = (nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(2))
    save_compressed(one, tmp_path / "m.muws")
    before = other[1].weight.clone()
    load_compressed(tmp_path / "m.muws", other, names=["0.*"])
    assert torch.equal(other[0].weight, one[0].weight)
    assert torch.equal(other[1].weight, before)
    with pytest.raises(StateError, match=r"does not fit Linear at 1 tensors, the first one '1\.weight'"):
        load_compressed(tmp_path / "m.muws", one[0], names=["1.weight"])


class Tied(nn.Module):
    """Two names of one parameter, two parameters that are equal, and buffers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(6)
        self.frozen = nn.Parameter(torch.ones(300), requires_grad=False)
        self.register_buffer("positions", torch.arange(4), persistent=False)


def test_a_module_on_the_meta_device_gets_the_tensors_themselves(tmp_path):
    torch.manual_seed(0)
    module = Tied()
    save_compressed(module, tmp_path / "m.muws")
    with torch.device("meta"):
        empty = Tied()
    state = load_compressed(tmp_path / "m.muws", empty)
    assert all(torch.equal(x, empty.state_dict()[name]) for name, x in module.state_dict().items())
    assert empty.head.weight is empty.embed.weight
    assert empty.embed.weight.data_ptr() == state["embed.weight"].data_ptr()  # not a second copy
    assert isinstance(empty.embed.weight, nn.Parameter)
    assert empty.embed.weight.requires_grad
    assert not empty.frozen.requires_grad
    assert empty.positions.is_meta  # which no state_dict holds


def test_a_module_on_the_meta_device_keeps_its_ties_and_dtypes(tmp_path):
    save_compressed({"0.weight": torch.ones(3, 3), "1.weight": 2 * torch.ones(3, 3)}, tmp_path / "two.muws")
    w = torch.ones(3, 3)
    save_compressed({"0.weight": w, "1.weight": w}, tmp_path / "one.muws")
    for tied in (True, False):
        for file in ("one", "two"):
            modules = []
            for device in ("cpu", "meta"):
                with torch.device(device):
                    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).to(torch.bfloat16)
                if tied:
                    module[1].weight = module[0].weight
                load_compressed(tmp_path / f"{file}.muws", module)
                modules.append(module)
            copied, assigned = modules
            assert (assigned[0].weight is assigned[1].weight) == tied
            assert (assigned[0].weight.data_ptr() == assigned[1].weight.data_ptr()) == tied
            for name, x in copied.state_dict().items():
                assert torch.equal(assigned.state_dict()[name], x)
                assert assigned.state_dict()[name].dtype == torch.bfloat16


# ---- file objects and URLs


def test_open_files_are_read_where_they_are_and_stay_open(path):
    state = load_compressed(path)
    data = b"" + path.read_bytes()
    for file in (io.BytesIO(data), path.open("rb"), path.open("rb", buffering=0)):
        file.seek(5)
        with open_compressed(file) as opened:
            assert torch.equal(opened.get_tensor("b.weight"), state["b.weight"])
        assert not file.closed
        assert torch.equal(load_compressed(file)["half"], state["half"])
        assert inspect_compressed(file).n_bytes == len(data)
        file.close()


def test_what_is_no_source_is_refused(path, tmp_path):
    with path.open("r", encoding="latin-1") as file, pytest.raises(SettingError, match="opened with mode 'rb'"):
        load_compressed(file)
    with pytest.raises(SettingError, match=r"3 is no source of a \.muws file: give a path"):
        load_compressed(3)
    with pytest.raises(FileNotFoundError):
        open_compressed(tmp_path / "none.muws")
    with pytest.raises(SettingError, match=r"nowhere://x cannot be opened: .*nowhere"):
        load_compressed("nowhere://x")


def test_a_url_of_fsspec_is_read_in_parts(path):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.pipe("/muws-test/model.muws", path.read_bytes())
    state = load_compressed(path)
    try:
        with open_compressed("memory://muws-test/model.muws") as file:
            assert torch.equal(file.get_tensor("up.weight"), state["up.weight"])
        assert torch.equal(load_compressed("memory://muws-test/model.muws", names=["mask"])["mask"], state["mask"])
        assert inspect_compressed("memory://muws-test/model.muws").n_bytes == path.stat().st_size
        with pytest.raises(FileNotFoundError):
            open_compressed("memory://muws-test/other.muws")
    finally:
        memory.rm("/muws-test", recursive=True)


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, with ranges unless told otherwise, and counts the bytes of bodies."""

    ranges = True
    sent = 0

    def do_GET(self):
        data = Path(self.translate_path(self.path)).read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if self.ranges else None
        body = data[int(found[1]) : int(found[2]) + 1] if found else data
        self.send_response(206 if found else 200)
        if found:
            self.send_header("Content-Range", f"bytes {found[1]}-{int(found[1]) + len(body) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        type(self).sent += len(body)

    def end_headers(self):
        self.send_header("Accept-Ranges", "bytes" if self.ranges else "none")
        super().end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(path):
    class Here(Server):
        pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Here, directory=str(path.parent))
    ) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield Here, f"http://127.0.0.1:{running.server_port}/model.muws"
        running.shutdown()
        thread.join()


def test_a_server_is_asked_for_the_bytes_of_a_tensor_only(path, server):
    pytest.importorskip("aiohttp")
    handler, url = server
    n_bytes = path.stat().st_size
    with open_compressed(url) as file:
        handler.sent = 0
        assert torch.equal(file.get_tensor("b.bias"), load_compressed(path)["b.bias"])
        assert 0 < handler.sent < n_bytes / 2


def test_a_server_that_sends_whole_files_is_refused(path, server):
    pytest.importorskip("aiohttp")
    handler, url = server
    handler.ranges = False
    with pytest.raises(SettingError, match="the server does not send parts of a file: download the file"):
        open_compressed(url)


# ---- refusals


def read_all(path):
    with open_compressed(path) as file:
        for name in file.keys():  # noqa: SIM118  it is no dict
            file.get_tensor(name)
            if file.shape(name):
                file.get_rows(name, 0, file.shape(name)[0])


@pytest.mark.parametrize("name", [*HOSTILE, *MORE])
def test_hostile_files_are_refused_with_the_reason(name, tmp_path):
    attack, says = {**HOSTILE, **MORE}[name]
    path = tmp_path / "model.muws"
    small_model(path)
    path.write_bytes(attack(path.read_bytes()))
    with pytest.raises(FormatError, match=says) as caught:
        read_all(path)
    assert str(caught.value).startswith(f"{path}: ")
    with pytest.raises(FormatError, match=says):
        read_all(io.BytesIO(path.read_bytes()))


def test_damage_in_another_chunk_is_not_read_and_in_its_own_refused(path):
    state = load_compressed(path)
    manifest, streams = take_apart(path.read_bytes())
    first = streams["c0.kinds"]
    streams["c0.kinds"] = bytes([first[0] ^ 1]) + first[1:]
    path.write_bytes(put_together(manifest, streams))
    with open_compressed(path) as file:
        assert torch.equal(file.get_tensor("half"), state["half"])
        with pytest.raises(FormatError, match=r"stream 'c0\.kinds' has checksum"):
            file.get_tensor("a.weight")
        with pytest.raises(FormatError, match=r"stream 'c0\.kinds' has checksum"):
            file.get_rows("a.weight", 0, 1)


def test_blocks_of_other_kinds_than_declared_are_refused_where_they_are_read(path):
    manifest, streams = take_apart(path.read_bytes())
    (rows, cols), (at, unit) = manifest["tensors"][0]["block"], manifest["chunks"][0]["until"]
    assert at == 0
    n_bytes = -(-(unit // rows) * (130 // cols) // 3)
    coder, _ = manifest["chunks"][0]["streams"]["kinds"]
    last = decode(coder, streams["c0.kinds"], n_bytes)[-1]
    dense = bytes([0] * (n_bytes - 1) + [last])
    streams["c0.kinds"] = dense
    manifest["chunks"][0]["streams"]["kinds"] = ["raw", zlib.crc32(dense)]
    path.write_bytes(put_together(manifest, streams))
    with open_compressed(path) as file, pytest.raises(FormatError, match=r"a\.weight has blocks .* declares"):
        file.get_rows("a.weight", 0, 1)


def test_the_limit_is_on_what_is_read(path):
    with open_compressed(path, max_bytes=1200) as file:
        assert file.get_tensor("a.bias").shape == (300,)
        assert file.get_rows("a.weight", 0, 2).shape == (2, 130)
        with pytest.raises(FormatError, match=r"its tensors take 156,000 bytes, at most max_bytes=1,200 are allowed"):
            file.get_tensor("a.weight")
        with pytest.raises(FormatError, match=r"its tensors take 1,560 bytes"):
            file.get_rows("a.weight", 0, 3)
    assert list(load_compressed(path, names=["a.bias"], max_bytes=1200)) == ["a.bias"]


def test_wrong_calls_are_refused(path):
    with open_compressed(path) as file:
        with pytest.raises(SettingError, match=r"no tensor 'a\.wait'; it has 13, such as a\.weight"):
            file.get_tensor("a.wait")
        with pytest.raises(SettingError, match=r"'a\.\*' is a pattern: give the name of one tensor"):
            file.shape("a.*")
        for start, stop in ((-1, 3), (3, 2), (0, 301), (0.0, 1), (True, 1)):
            with pytest.raises(SettingError, match=r"no rows of a\.weight of shape \(300, 130\): give whole numbers"):
                file.get_rows("a.weight", start, stop)
        with pytest.raises(SettingError, match="give get_tensor for a scalar"):
            file.get_rows("count", 0, 1)
    with pytest.raises(StateError, match="is closed: read inside the with statement"):
        file.get_tensor("a.weight")
    with pytest.raises(SettingError, match=r"the file has no tensor 'x\*'; it has 13"):
        load_compressed(path, names=["a.bias", "x*"])
    with pytest.raises(SettingError, match=r"names='a\.bias' is one string: give a list"):
        load_compressed(path, names="a.bias")
    with pytest.raises(SettingError, match="max_bytes=-1 is not allowed"):
        open_compressed(path, max_bytes=-1)


def test_files_that_were_opened_are_closed_after_a_refusal(tmp_path):
    (tmp_path / "m.muws").write_bytes(b"no file")
    with opened_bytes(tmp_path / "m.muws") as file:
        assert file.read() == b"no file"
    assert file.closed
    with pytest.raises(FormatError, match=r"no \.muws file"):
        open_compressed(tmp_path / "m.muws")  # an unclosed file would be a ResourceWarning, which is an error
