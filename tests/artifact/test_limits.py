"""Whatever save_compressed returns from, load_compressed reads; what no reader accepts is refused before any work."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from lightning_muws import inspect_compressed, load_compressed, save_compressed, verify_compressed
from lightning_muws.artifact.chunk import ChunkWriter
from lightning_muws.errors import FormatError, SettingError
from tests.support.forge import put_together, take_apart
from tests.support.strategies import DTYPES, OTHERS, same_bytes

FRESH = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model.muws"


def nested(depth: int) -> list:
    found: list = []
    for _ in range(depth - 1):
        found = [found]
    return found


NAMES = st.text(st.characters(), max_size=8) | st.sampled_from(["__metadata__", "manifest", "\ud83d\ude00", "\ud800"])
SHAPES = (
    st.lists(st.integers(0, 4), max_size=5)
    | st.integers(60, 70).map(lambda n: [1] * n)
    | st.lists(st.sampled_from([1, 2, 4, 1 << 30, 1 << 59, 1 << 61]), max_size=3)
    .filter(lambda sizes: math.prod(sizes) < 1 << 62)  # torch makes no others
    .map(lambda sizes: [0, *sizes])
)
KEYS = st.text(max_size=3) | st.sampled_from([1, "1", True, "true", None, "null", 1.5, "1.5"])
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | NAMES | st.sampled_from([1 << 8192, (1, 2)]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3) | st.builds(nested, st.integers(1, 80))
    ),
    max_leaves=8,
)


@FRESH
@given(
    names=st.lists(NAMES, max_size=3, unique=True),
    shape=SHAPES,
    dtype=st.sampled_from([*DTYPES, *OTHERS]),
    extra=st.dictionaries(KEYS, PLAIN, max_size=3),
    version=st.integers() | st.just(1 << 8192),
)
@example(["w"], [1] * 65, torch.float32, {}, 1)
@example(["w"], [0, 1 << 61], torch.float32, {}, 1)
@example(["w"], [0, 1 << 59, 4], torch.float32, {}, 1)
@example(["w"], [1], torch.float32, {1: 0, "1": 1}, 1)
@example(["w"], [1], torch.float32, {"a": {True: 0, "true": 1}}, 1)
@example(["w"], [1], torch.float32, {"a": nested(80)}, 1)
@example(["w"], [1], torch.float32, {"a": 1 << 8192}, 1)
@example(["\ud83d\ude00", "\U0001f600"], [1], torch.float32, {}, 1)
def test_whatever_is_saved_comes_back_equal(path, names, shape, dtype, extra, version):
    state = {name: torch.ones(shape, dtype=dtype) for name in names}
    state = torch.nn.Module().state_dict() | state
    state._metadata = {"module": {"version": version}}
    try:
        save_compressed(state, path, extra=extra)
    except SettingError:
        event("refused")
        return
    event("saved")
    loaded, info = load_compressed(path), inspect_compressed(path)
    assert list(loaded) == list(state)
    assert all(same_bytes(loaded[name], state[name]) for name in state)
    assert repr(info.extra) == repr(as_lists(extra))
    json.dumps(info.to_dict())
    assert getattr(loaded, "_metadata", {}) == ({} if version == 1 else {"module": {"version": version}})
    verify_compressed(path)


def as_lists(value):
    """Return the value with lists for tuples, the one thing that a file changes."""
    if isinstance(value, dict):
        return {key: as_lists(inner) for key, inner in value.items()}
    return [as_lists(inner) for inner in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize(
    ("state", "extra", "says"),
    [
        ({"w": torch.ones([1] * 65)}, {}, r"'w' has 65 axes, at most 64 can be stored"),
        ({"w": torch.ones(0, 1 << 61)}, {}, r"'w' has shape \(0, 2305843009213693952\), more than any memory holds"),
        ({"w": torch.ones(0, 1 << 59, 4)}, {}, r"'w' has shape .*, more than any memory holds"),
        ({"\ud83d\ude00": torch.ones(1)}, {}, r"the name '\\ud83d\\ude00' .* surrogate"),
        ({}, {1: 0, "1": 1}, r"extra has the key 1, only strings are allowed"),
        ({}, {"a": [{True: 0, "true": 1}]}, r"extra\['a'\]\[0\] has the key True, only strings are allowed"),
        ({}, {"a": nested(990)}, r"extra.* nests more than 64 deep"),
        ({}, {"a": nested(64)}, r"extra.* nests more than 64 deep"),
        ({}, {"a": 10**5000}, r"extra\['a'\] is an integer of 16610 bits, at most 8192 can be stored"),
        ({}, {"a": float("nan")}, r"extra\['a'\] is nan"),
        ({}, {"a": {1, 2}}, r"extra\['a'\] is a set"),
        ({}, {"a": "\ud83d\ude00"}, r"extra\['a'\] .* surrogate"),
        ({}, ["a"], r"extra is a list, a dict is needed"),
    ],
)
def test_what_a_reader_would_refuse_is_refused_before_any_work(state, extra, says, path, monkeypatch):
    monkeypatch.setattr(ChunkWriter, "add", None)
    with pytest.raises(SettingError, match=says):
        save_compressed(state, path, extra=extra)
    assert not path.exists()


def test_what_is_just_allowed_is_saved(path):
    state = {"w": torch.ones([1] * 64), "empty": torch.ones(0, 1 << 59), "\ud800": torch.ones(1)}
    extra = {"deep": nested(63), "int": (1 << 8192) - 1, "pair": (1, 2.5), "none": None, "\u00e9": True}
    save_compressed(state, path, extra=extra)
    loaded = load_compressed(path)
    assert all(same_bytes(loaded[name], state[name]) for name in state)
    assert inspect_compressed(path).extra == extra | {"pair": [1, 2.5]}


@pytest.mark.parametrize("sign", [torch.Tensor.conj, lambda x: x.conj().imag])
def test_lazily_conjugated_and_negated_views_are_not_taken_for_what_they_view(sign, path):
    x = torch.complex(torch.arange(6.0), torch.ones(6))
    other = sign(x)
    state = {"x": x if other.is_complex() else x.imag, "other": other}
    save_compressed(state, path)
    loaded = load_compressed(path)
    assert all(torch.equal(loaded[name], state[name].resolve_conj().resolve_neg()) for name in state)


@pytest.mark.parametrize(
    ("extra", "says"), [(b"[" * 65 + b"]" * 65, "extra nests more than 64 deep"), (b"1e999", "1e999 is no number")]
)
def test_a_file_with_such_an_extra_is_refused(extra, says, path):
    save_compressed({"w": torch.ones(1)}, path)
    manifest, streams = take_apart(path.read_bytes())
    raw = json.dumps(manifest, separators=(",", ":")).encode()[:-1] + b',"extra":{"a":' + extra + b"}}"
    path.write_bytes(put_together(manifest, streams, raw=raw))
    with pytest.raises(FormatError, match=says):
        inspect_compressed(path)


def test_extra_is_checked_whatever_the_recursion_limit(path):
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)
    try:
        with pytest.raises(SettingError, match="nests more than 64 deep"):
            save_compressed({}, path, extra={"a": nested(5000)})
    finally:
        sys.setrecursionlimit(limit)
