"""Equal tensors that share no memory are written once, and come back in separate memory."""

import pytest
import torch
from torch import nn

from lightning_muws import MicroStructure, inspect_compressed, load_compressed, save_compressed, verify_compressed
from lightning_muws.artifact.compress import compress_file
from lightning_muws.errors import FormatError
from tests.support import format_reader
from tests.support.forge import put_together, take_apart
from tests.support.strategies import normal, raw_bytes, same_bytes


def layers(n: int = 4) -> dict[str, torch.Tensor]:
    x = MicroStructure((4, 4), 0.4, 0.3).project(normal(0, 64, 64, dtype=torch.float32))
    return {f"layers.{i}.weight": x.clone() for i in range(n)} | {f"{i}.mask": torch.ones(64, 64).tril() for i in "ab"}


@pytest.mark.parametrize("settings", [{}, {"max_error": 0.01}, {"compression": 30}])
def test_equal_tensors_take_the_room_of_one_and_come_back_apart(settings, tmp_path):
    state, one = layers(), {name: x for name, x in layers().items() if name in ("layers.0.weight", "a.mask")}
    report = save_compressed(state, tmp_path / "m.muws", **settings)
    if not settings.get("compression"):
        alone = save_compressed(one, tmp_path / "one.muws", **settings)
        assert report.n_bytes < alone.n_bytes + 200
    assert report.dense_bytes == sum(x.nbytes for x in state.values())
    loaded = verify_compressed(tmp_path / "m.muws") and load_compressed(tmp_path / "m.muws")
    assert list(loaded) == list(state)
    assert len({x.data_ptr() for x in loaded.values()}) == len(state)
    for name, x in loaded.items():
        assert same_bytes(x, loaded["layers.0.weight" if "layers" in name else "a.mask"])
        assert settings or same_bytes(x, state[name])
    info = inspect_compressed(tmp_path / "m.muws")
    assert info.version == "1.1"
    assert [t.stored for t in info.tensors][1:4] == ["copy of layers.0.weight"] * 3
    for name, (_, _, data) in format_reader.read(tmp_path / "m.muws").items():
        assert data == raw_bytes(loaded[name])


def test_a_loaded_copy_can_change_alone_and_a_shared_tensor_stays_shared(tmp_path):
    state = layers()
    state["tied"] = state["layers.1.weight"]
    save_compressed(state, tmp_path / "m.muws")
    loaded = load_compressed(tmp_path / "m.muws")
    loaded["layers.1.weight"].zero_()
    assert loaded["layers.0.weight"].any()
    assert not loaded["tied"].any()


def test_tensors_that_only_begin_equally_or_have_other_zeros_are_no_copies(tmp_path):
    a = normal(0, 200, 200, dtype=torch.float32)
    b, c = a.clone(), torch.zeros(40, 40)
    b[-1, -1] += 1
    state = {"a": a, "b": b, "zero": c, "minus": -c, "as int": c.int(), "flat": c.view(-1)}
    save_compressed(state, tmp_path / "m.muws")
    assert not any("copy" in t.stored for t in inspect_compressed(tmp_path / "m.muws").tensors)
    assert all(same_bytes(x, state[name]) for name, x in load_compressed(tmp_path / "m.muws").items())


def test_a_buffer_that_equals_a_parameter_keeps_its_own_precision(tmp_path):
    module = nn.Linear(2048, 4)
    module.register_buffer("scale", module.weight.detach()[0].clone())
    module.first = nn.Parameter(module.scale.clone())
    save_compressed(module, tmp_path / "m.muws", compression=6)
    loaded = load_compressed(tmp_path / "m.muws")
    torch.testing.assert_close(loaded["scale"], module.scale, rtol=2**-10, atol=1e-7)


def test_the_errors_of_copies_are_those_of_the_first(tmp_path):
    report = compress_file(layers(), tmp_path / "m.muws", 40)
    found = [t.relative_error for t in report.tensors if "layers" in t.name]
    assert found == [found[0]] * 4
    assert found[0] > 0


def test_copies_count_for_what_a_caller_allows(tmp_path):
    save_compressed(layers(), tmp_path / "m.muws")
    n_bytes = sum(x.nbytes for x in layers().values())
    load_compressed(tmp_path / "m.muws", max_bytes=n_bytes)
    with pytest.raises(FormatError, match=f"take {n_bytes:,} bytes"):
        load_compressed(tmp_path / "m.muws", max_bytes=n_bytes - 1)


def test_a_copy_that_is_no_boolean_is_refused(tmp_path):
    save_compressed(layers(), tmp_path / "m.muws")
    manifest, streams = take_apart((tmp_path / "m.muws").read_bytes())
    manifest["tensors"][1]["copy"] = 1
    (tmp_path / "m.muws").write_bytes(put_together(manifest, streams))
    with pytest.raises(FormatError, match="copy is '1', a bool is needed"):
        load_compressed(tmp_path / "m.muws")


def test_progress_ends_with_all_bytes_that_are_decoded(tmp_path):
    saved, loaded = [], []
    save_compressed(layers(), tmp_path / "m.muws", progress=lambda *now: saved.append(now))
    for read in (load_compressed, verify_compressed):
        read(tmp_path / "m.muws", progress=lambda *now: loaded.append(now))
        assert loaded[-1][0] == loaded[-1][1] > 0
    assert saved[-1][0] == saved[-1][1] > 0
