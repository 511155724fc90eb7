"""The `.muws` file: every bit comes back, equal input is equal bytes, and the format page is enough to read it."""

import io
import json
import os
import stat
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors import safe_open
from torch import nn
from torch.nn.utils import prune

import lightning_muws.artifact.save
import lightning_muws.artifact.writer
from lightning_muws import MicroStructure, inspect_compressed, load_compressed, save_compressed, verify_compressed
from lightning_muws.artifact.chunk import ChunkReader, ChunkWriter
from lightning_muws.errors import FormatError, SettingError, StateError
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.plan import make_plan
from tests.support import format_reader
from tests.support.forge import small_model
from tests.support.strategies import grids, normal, raw_bytes, same_bytes, state_dicts, structures, weights

GOLDEN = Path(__file__).parents[1] / "golden"
FRESH = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model.muws"


def set_chunk_bytes(monkeypatch, n_bytes: int) -> None:
    for module in (lightning_muws.artifact.save, lightning_muws.artifact.writer):
        monkeypatch.setattr(module, "CHUNK_BYTES", n_bytes)


def assert_same(loaded, state) -> None:
    assert list(loaded) == list(state)
    for name in state:
        assert same_bytes(loaded[name], state[name]), name


# ---- every bit comes back


def test_a_module_comes_back(path):
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))
    report = save_compressed(module, path)
    loaded = load_compressed(path)
    assert_same(loaded, module.state_dict())
    assert loaded._metadata == {"1": {"version": 2}}  # of BatchNorm; the others say 1, as ever
    assert report.n_bytes == path.stat().st_size
    fresh = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))
    fresh.load_state_dict(loaded)
    assert_same(fresh.state_dict(), module.state_dict())


@FRESH
@given(state=state_dicts(), chunk_bytes=st.sampled_from([100, 1000, 64 << 20]))
def test_any_state_dict_comes_back(state, chunk_bytes, path, monkeypatch):
    set_chunk_bytes(monkeypatch, chunk_bytes)
    report = save_compressed(state, path)
    assert_same(load_compressed(path), state)
    assert report.n_bytes == path.stat().st_size
    assert report.max_error == 0
    assert sum(t.n_bytes for t in report.tensors) + report.header_bytes == pytest.approx(report.n_bytes)


@FRESH
@given(state=state_dicts(), chunk_bytes=st.sampled_from([1000, 64 << 20]))
def test_the_format_page_is_enough_to_read_it(state, chunk_bytes, path, monkeypatch):
    set_chunk_bytes(monkeypatch, chunk_bytes)
    save_compressed(state, path)
    found = format_reader.read(path)
    assert list(found) == list(state)
    for name, (dtype, shape, data) in found.items():
        x = state[name]
        assert (f"torch.{dtype}", shape) == (str(x.dtype), tuple(x.shape))
        assert data == raw_bytes(x), name


@FRESH
@given(w=weights(), structure=structures(), data=st.data())
def test_blocks_of_any_grid_come_back(w, structure, data, path, monkeypatch):
    grid = data.draw(grids(w, structure.block_shape))
    set_chunk_bytes(monkeypatch, data.draw(st.sampled_from([300, 64 << 20])))
    state = {"w": structure.project(w, grid)}
    save_compressed(state, path, blocks={"w": grid})
    assert_same(load_compressed(path), state)
    assert format_reader.read(path)["w"][2] == raw_bytes(state["w"])


def test_nothing_special_is_lost(path):
    nan = torch.tensor([0x7FC00001, 0x7F800001, -1, 0x7F800000, -(1 << 31), 1], dtype=torch.int32).view(torch.float32)
    state = {
        "payloads": nan,
        "minus zero": torch.full((8, 8), -0.0),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "bool": torch.tensor([True, False]),
        "half": torch.tensor([[65504.0, 6e-8]]).half(),
        "brain": torch.tensor([[1e38, -1e-38]]).bfloat16(),
        "int": torch.tensor([-(1 << 63), (1 << 63) - 1]),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "float8": torch.tensor([1.0, -0.0]).to(torch.float8_e4m3fn),
        "transposed": torch.arange(12.0).view(3, 4).T,
    }
    save_compressed(state, path)
    assert_same(load_compressed(path), {k: x.resolve_conj() for k, x in state.items()})


def test_shared_tensors_are_stored_once_and_overlapping_ones_come_back(path):
    w = normal(0, 64, 64, dtype=torch.float32)
    state = {"embedding": w, "head": w, "rows": w[10:20], "view": w.T}
    report = save_compressed(state, path)
    loaded = load_compressed(path)
    assert_same(loaded, state)
    assert loaded["head"] is loaded["embedding"]
    assert report.tensors[1].stored == "same as embedding"
    assert report.tensors[1].n_bytes == 0
    assert report.dense_bytes == 4 * (64 * 64 * 2 + 640)


def test_equal_states_are_equal_bytes(path, tmp_path):
    state = small_model(path)
    other = tmp_path / "other.muws"
    save_compressed({k: x.clone() if k != "tied" else x for k, x in state.items()} | {"tied": state["tied"]}, other)
    save_compressed(load_compressed(path), other)
    assert other.read_bytes() == path.read_bytes()


def test_it_is_a_safetensors_file(path):
    small_model(path)
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "muws"
        assert "c0.kinds" in file.keys()  # noqa: SIM118  safe_open has no __contains__
        assert file.get_tensor("c0.kinds").dtype == torch.uint8


@pytest.mark.parametrize("name", ["1.0-exact", "1.0-lossy", "1.1-exact", "1.1-masks"])
def test_golden_files_load_for_ever(name):
    expected = torch.load(GOLDEN / f"{name}.pt", weights_only=True)
    assert_same(load_compressed(GOLDEN / f"{name}.muws"), expected)
    for key, (_, _, data) in format_reader.read(GOLDEN / f"{name}.muws").items():
        assert data == raw_bytes(expected[key])


def test_golden_bytes_are_written_as_ever(path):
    """If this fails, files have changed: readers are not harmed if the golden files still load, but say so."""
    save_compressed(load_compressed(GOLDEN / "1.0-exact.muws"), path)
    assert path.read_bytes() == (GOLDEN / "1.0-exact.muws").read_bytes()


def test_the_golden_file_of_1_1_has_all_that_1_1_adds():
    info = inspect_compressed(GOLDEN / "1.1-exact.muws")
    assert info.version == "1.1"
    assert [tensor.stored for tensor in info.tensors] == ["palette", "copy of few", "int8", "uint8", "bytes"]
    assert info.coders["other"].startswith("delta-")


def test_the_golden_file_of_masks_has_parts_with_each_filter():
    info = inspect_compressed(GOLDEN / "1.1-masks.muws")
    assert (info.version, info.coders) == ("1.1", {"other": "parts"})
    data = (GOLDEN / "1.1-masks.muws").read_bytes()
    assert all(name in data for name in (b"xor-bits-zlib", b"repeat-bits-raw", b"delta-zlib2", b"raw"))


# ---- small


def test_structure_makes_it_small(path):
    w = MicroStructure(prune_ratio=0.5, unify_ratio=0.3).project(normal(0, 1024, 1024, dtype=torch.float32))
    report = save_compressed({"w": w}, path)
    assert report.compression_ratio > 5
    assert path.stat().st_size < 1.01 * sum(stream.entropy_bytes for stream in report.streams)


def test_the_shape_that_is_found_makes_the_smallest_file(path):
    w = MicroStructure((2, 4), 0.6, 0.2).project(normal(0, 128, 128, dtype=torch.float32))
    found = save_compressed({"w": w}, path)
    sizes = {shape: save_compressed({"w": w}, path, blocks=shape).n_bytes for shape in [(1, 1), (2, 2), (2, 4), (4, 4)]}
    assert found.tensors[0].block_shape == (2, 4)
    assert found.n_bytes == min(sizes.values())


def test_the_manifest_of_a_tiny_model_does_not_outgrow_it(path):
    report = save_compressed({"w": torch.ones(1)}, path)
    assert report.n_bytes < 700


def test_a_lossy_file_stays_small_when_it_is_packed_again(path):
    w = MicroStructure(prune_ratio=0.5, unify_ratio=0.3).project(normal(0, 256, 256, dtype=torch.float32))
    lossy = save_compressed({"w": w}, path, max_error=2**-8)
    again = save_compressed(load_compressed(path), path)
    assert again.max_error == 0
    assert again.n_bytes <= lossy.n_bytes


# ---- lossy


@FRESH
@given(
    seed=st.integers(0, 10**6),
    max_error=st.sampled_from([0.2, 0.01, 1e-4]),
    relative_to=st.sampled_from(["tensor_max", "model_max", "absolute"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_the_error_stays_within_its_bound_and_is_the_one_reported(seed, max_error, relative_to, dtype, path):
    structure = MicroStructure((4, 4), 0.4, 0.4)
    state = {
        "a": structure.project(normal(seed, 20, 24, dtype=dtype)),
        "b": structure.project(normal(seed + 1, 16, 4, 3, 3, dtype=dtype) * 30),
        "bias": normal(seed, 50, dtype=dtype),
    }
    report = save_compressed(state, path, max_error=max_error, relative_to=relative_to)
    loaded = load_compressed(path)
    tops = {name: float(x.abs().max()) for name, x in state.items()}
    model_max = max(tops["a"], tops["b"])
    for tensor in report.tensors:
        bound = max_error * {"tensor_max": tops[tensor.name], "model_max": model_max, "absolute": 1.0}[relative_to]
        error = float((loaded[tensor.name].double() - state[tensor.name].double()).abs().max())
        assert error == tensor.max_error <= bound
    assert same_bytes(loaded["bias"], state["bias"])
    assert inspect_compressed(path).tensors[0].max_error == report.tensors[0].max_error
    assert_same({k: support_of(loaded["a"]) for k in "k"}, {k: support_of(state["a"]) for k in "k"})


def support_of(w: torch.Tensor) -> torch.Tensor:
    """Return which blocks are all zero or of one magnitude; free ones may become so, hence only the structured."""
    blocks = BlockGrid((4, 4)).split(w).abs()
    one = (blocks == blocks[:, :1]).all(1)
    return one & (blocks[:, 0] != 0)


def test_norms_biases_and_buffers_are_exact_unless_asked(path):
    module = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32))
    module.register_buffer("table", torch.randn(32, 32))
    nn.init.normal_(module[1].weight)
    changed = {t.name for t in save_compressed(module, path, max_error=0.01).tensors if t.max_error}
    assert changed == {"0.weight"}
    changed = {t.name for t in save_compressed(module, path, max_error=0.01, lossy="all").tensors if t.max_error}
    assert changed == {"0.weight", "0.bias", "1.weight", "table"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_values_are_rounded_to_a_dtype(path, dtype):
    state = {"w": normal(0, 32, 32, dtype=torch.float32), "bias": normal(0, 7, dtype=torch.float32)}
    report = save_compressed(state, path, value_dtype=dtype)
    loaded = load_compressed(path)
    assert torch.equal(loaded["w"], state["w"].to(getattr(torch, dtype)).float())
    assert torch.equal(loaded["bias"], state["bias"])
    assert report.max_error == float((loaded["w"].double() - state["w"].double()).abs().max()) > 0
    found = format_reader.read(path)["w"][2]
    assert found == loaded["w"].numpy().tobytes()


def test_every_written_lossy_file_is_decoded_before_it_takes_its_place(path, monkeypatch):
    state = small_model(path)
    before = path.read_bytes()
    monkeypatch.setattr(ChunkReader, "fill", spoilt(ChunkReader.fill))
    with pytest.raises(StateError, match=r"conv\.weight decodes to other values"):
        save_compressed(state, path, max_error=0.01)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def spoilt(fill):
    def spoil(self, piece, units):
        counts = fill(self, piece, units)
        if units.is_floating_point():
            units.view(-1)[0] += 1
        return counts

    return spoil


# ---- what may be saved


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"a": 3}, "'a' is a int"),
        ({1: torch.ones(1)}, "the key 1, only strings"),
        (Extra(2, 2), r"'_extra_state' is a dict \(of get_extra_state\?\)"),
        ({"a": torch.ones(2, device="meta")}, "'a' is on the meta device"),
        ({"a": torch.eye(3).to_sparse()}, r"'a' is of dtype float32 and layout torch\.sparse_coo"),
        ({"a": torch.ones(1), "_orig_mod.a": torch.ones(1)}, "two tensors are named 'a'"),
    ],
)
def test_what_is_no_dense_tensor_is_refused(model, says, path):
    with pytest.raises(SettingError, match=says):
        save_compressed(model, path)
    assert not path.exists()


def test_wrong_settings_are_refused_before_anything_is_written(path, tmp_path):
    state = {"w": torch.ones(4, 4), "b": torch.ones(4)}
    with pytest.raises(SettingError, match="blocks names x, which is no tensor"):
        save_compressed(state, path, blocks={"x": BlockGrid()})
    with pytest.raises(SettingError, match="blocks names b"):
        save_compressed(state, path, blocks={"b": BlockGrid()})
    with pytest.raises(SettingError, match="block_shape="):
        save_compressed(state, path, blocks=(0, 4))
    with pytest.raises(SettingError, match="cannot be written as JSON"):
        save_compressed(state, path, extra={"a": torch.ones(1)})
    with pytest.raises(SettingError, match="is a folder, or is in none"):
        save_compressed(state, tmp_path)
    with pytest.raises(SettingError, match="is a folder, or is in none"):
        save_compressed(state, tmp_path / "none" / "model.muws")
    assert not list(tmp_path.iterdir())


def test_pruned_by_torch_is_stored_with_a_word_on_what_to_do(path):
    module = prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5)
    with pytest.warns(
        UserWarning, match=r"weight_orig and its mask are of torch\.nn\.utils\.prune.*call prune\.remove"
    ):
        save_compressed(module, path)
    assert_same(load_compressed(path), module.state_dict())


def test_a_bound_beyond_all_weights_leaves_the_unified_blocks(path):
    w = MicroStructure((4, 4), 0.25, 0.25).project(normal(0, 16, 16, dtype=torch.float32))
    report = save_compressed({"w": w}, path, max_error=100.0, blocks=(4, 4))
    loaded = load_compressed(path)["w"]
    assert torch.isfinite(loaded).all()
    assert report.tensors[0].counts == (0, 4, 12)


@pytest.mark.filterwarnings("ignore:.*script_method.* is deprecated")
def test_compiled_modules_have_clean_names(path):
    module = nn.Sequential(nn.Linear(4, 4))
    save_compressed(torch.compile(module), path)
    assert list(load_compressed(path)) == list(module.state_dict())
    load_compressed(path, into=torch.compile(module))


def test_the_shapes_of_a_plan_are_taken(path):
    module = nn.Sequential(nn.ConvTranspose2d(8, 6, 3, groups=2), nn.Linear(16, 16))
    plan = make_plan(module, MicroStructure((2, 3), 0.5, 0.3))
    for name, w in plan.weights(module).items():
        entry = plan.covered[name]
        w.data = entry.structure.project(w.data, entry.grid)
    report = save_compressed(module, path, blocks={name: entry.grid for name, entry in plan.covered.items()})
    assert {t.block_shape for t in report.tensors if t.block_shape} == {(2, 3)}
    for tensor in report.tensors:
        if tensor.name in plan.covered:
            n_pruned, n_unified = plan.covered[tensor.name].structure.quotas(plan.covered[tensor.name].n_blocks)
            assert tensor.counts[1:] == (n_unified, n_pruned)
    assert_same(load_compressed(path), module.state_dict())


def test_files_of_torch_and_safetensors_are_packed(path, tmp_path):
    from safetensors.torch import save_file

    state = {"w": normal(0, 8, 8, dtype=torch.float32)}
    torch.save(state, tmp_path / "m.pt")
    save_file(state, tmp_path / "m.safetensors")
    for name in ("m.pt", "m.safetensors"):
        save_compressed(tmp_path / name, path)
        assert_same(load_compressed(path), state)


class Payload:
    def __reduce__(self):
        return (os.mkdir, (str(Path(sys.argv[0]).parent / "owned"),))


@pytest.mark.parametrize("thing", [{"state_dict": Payload()}, [torch.ones(1)], Payload()], ids=["code", "list", "bare"])
def test_files_of_anything_else_are_refused_and_no_code_runs(thing, path, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "x")])
    torch.save(thing, tmp_path / "m.pt")
    with pytest.raises(SettingError, match=r"m\.pt (cannot be read as tensors|holds a list)"):
        save_compressed(tmp_path / "m.pt", path)
    assert not (tmp_path / "owned").exists()
    (tmp_path / "m.safetensors").write_bytes(b"no")
    with pytest.raises(SettingError, match="no safetensors file"):
        save_compressed(tmp_path / "m.safetensors", path)


def test_more_tensors_than_a_reader_would_accept_are_refused_before_any_work(path, monkeypatch):
    small_model(path)
    before = path.read_bytes()
    monkeypatch.setattr(ChunkWriter, "add", None)
    with pytest.raises(FormatError, match=r"the manifest would have .* save the model in several files"):
        save_compressed({f"a.long.name.{'x' * 1500}.{i}": torch.ones(1) for i in range(12_000)}, path)
    with pytest.raises(FormatError, match=r"the manifest would have .* save the model in several files"):
        save_compressed({"w": torch.ones(1)}, path, extra={"a": "x" * (16 << 20)})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "names",
    [
        [f"model.encoder.layers.{i}.weight" for i in range(7000)],
        [f"{'model.transformer.encoder.' * 9}layers.{i // 8}.experts.{i % 8}.default.weight" for i in range(3000)],
    ],
    ids=["short", "long"],
)
def test_a_model_of_thousands_of_small_tensors_comes_back(names, path):
    """The names take megabytes and the values almost nothing, so that the file is small."""
    state = {name: torch.zeros(1) for name in names} | {"w": torch.ones(2, 2)}
    report = save_compressed(state, path)
    assert report.n_bytes < 64 << 10
    assert_same(load_compressed(path), state)


# ---- loading


def test_loading_into_a_module(path):
    module, other = nn.Linear(8, 4), nn.Linear(8, 4)
    save_compressed(module, path)
    loaded = load_compressed(path, into=other)
    assert_same(other.state_dict(), module.state_dict())
    assert_same(loaded, module.state_dict())


@pytest.mark.parametrize(
    ("into", "says"),
    [
        (nn.Linear(8, 5), r"Linear at 2 tensors, the first one 'weight': of shape \(4, 8\) in the file and \(5, 8\)"),
        (nn.Linear(8, 4, bias=False), r"at 1 tensors, the first one 'bias': of shape \(4,\) in the file and none"),
    ],
)
def test_a_module_that_does_not_fit_is_refused_and_unchanged(path, into, says, monkeypatch):
    save_compressed(nn.Linear(8, 4), path)
    before = {k: x.clone() for k, x in into.state_dict().items()}
    monkeypatch.setattr(ChunkReader, "__init__", None)  # nothing may be decoded
    with pytest.raises(StateError, match=says):
        load_compressed(path, into=into)
    assert_same(into.state_dict(), before)


def test_more_bytes_than_allowed_are_refused(path):
    save_compressed({"w": torch.zeros(1000, 1000)}, path)
    with pytest.raises(FormatError, match=r"take 4,000,000 bytes, at most max_bytes=3,999,999 are allowed"):
        load_compressed(path, max_bytes=3_999_999)
    with pytest.raises(FormatError, match="max_bytes"):
        verify_compressed(path, max_bytes=3_999_999)
    assert load_compressed(path, max_bytes=4_000_000)["w"].shape == (1000, 1000)


def test_loading_onto_a_device(path):
    save_compressed({"w": torch.ones(2)}, path)
    assert load_compressed(path, device="meta")["w"].device.type == "meta"


def test_inspect_reads_the_manifest_only(path):
    state = small_model(path)
    data = bytearray(path.read_bytes())
    n = 8 + int.from_bytes(data[:8], "little")
    data[n : n + 20] = bytes(20)  # of the first stream
    path.write_bytes(data)
    info = inspect_compressed(path)
    assert [t.name for t in info.tensors] == list(state)
    assert info.version == "1.0"
    assert sum(info.streams.values()) < info.n_bytes == path.stat().st_size
    json.dumps(info.to_dict())
    with pytest.raises(FormatError, match=r"stream 'c0\.kinds' has checksum"):
        verify_compressed(path)


def test_extra_comes_back_with_the_manifest(path):
    save_compressed({"w": torch.ones(1)}, path, extra={"accuracy": 0.9, "labels": ["a"]})
    assert inspect_compressed(path).extra == {"accuracy": 0.9, "labels": ["a"]}


def test_progress_ends_with_all_bytes(path):
    state, seen = small_model(path), []
    save_compressed(state, path, progress=lambda *now: seen.append(now))
    dense = inspect_compressed(path).dense_bytes
    assert seen[-1] == (dense, dense)
    seen.clear()
    load_compressed(path, progress=lambda *now: seen.append(now))
    assert seen[-1] == (dense, dense)


def test_the_report_says_where_the_bytes_are(path):
    state = small_model(path)
    report = save_compressed(state, path)
    assert sum(s.n_bytes for s in report.streams) + report.header_bytes == report.n_bytes
    assert all(s.n_bytes <= s.raw_bytes for s in report.streams)
    json.dumps(report.to_dict())
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report, inspect_compressed(path))
    assert "magnitudes.float32.3" in console.export_text()


def test_reports_display_multiples_of_a_step_as_steps(path):
    report = save_compressed({"w": torch.arange(-64.0, 64.0).view(8, 16)}, path)
    info = inspect_compressed(path)
    assert report.tensors[0].stored == info.tensors[0].stored == "steps"
    assert {s.name for s in report.streams} == set(info.streams) == set(info.coders)
    assert "magnitudes.steps.0" in info.streams
    assert b"c0.magnitudes.grid.0" in path.read_bytes()


# ---- on the disk


@pytest.mark.skipif(os.name != "posix", reason="modes are of POSIX")
def test_the_file_has_the_mode_that_any_new_file_gets_or_the_one_it_had(path):
    save_compressed({"w": torch.ones(1)}, path)
    (path.parent / "plain").write_bytes(b"")
    assert path.stat().st_mode == (path.parent / "plain").stat().st_mode
    path.chmod(0o640)
    save_compressed({"w": torch.ones(1)}, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.skipif(os.name != "posix", reason="RLIMIT_FSIZE is of POSIX")
def test_a_full_disk_leaves_the_old_file(path):
    import resource

    state = small_model(path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_compressed({**state, "more": normal(0, 5000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_any_failure_while_writing_leaves_the_old_file(path, monkeypatch):
    state = small_model(path)
    before = path.read_bytes()

    def fail(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(ChunkWriter, "streams", fail)
    with pytest.raises(KeyboardInterrupt):
        save_compressed(state, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
