"""Reads tensors from a module, a state_dict, or a file of either, without running code."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muws.artifact.json_text import why_unstorable
from lightning_muws.artifact.load import MAX_BYTES, Progress, check_max_bytes, is_out_of_memory, read_compressed
from lightning_muws.artifact.manifest import DTYPES, why_too_large
from lightning_muws.artifact.shards import is_safetensors, list_tensors
from lightning_muws.errors import SettingError
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.plan import clean_name
from lightning_muws.structure.sharded import whole

Source = nn.Module | Mapping[str, Any] | str | Path


@dataclass(frozen=True)
class Stored:
    """A tensor that can be stored: what it is, and how to get its values, which may still be in a file.

    Args:
        dtype: Its dtype.
        shape: Its shape.
        key: Equal for two tensors only if they are the same memory seen the same way.
        load: Returns it.
        change: Returns what is stored instead, of the same shape and dtype; None stores it as it is.
    """

    dtype: torch.dtype
    shape: torch.Size
    key: Hashable
    load: Callable[[], Tensor]
    change: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(cls, x: Tensor) -> Stored:
        """Return a tensor that is in memory."""
        return cls(x.dtype, x.shape, identity(x), lambda: x)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.shape.numel() * self.dtype.itemsize

    @property
    def is_cuttable(self) -> bool:
        """Whether it is of a floating dtype that the file can cut into blocks or round."""
        return self.dtype.is_floating_point and self.dtype.itemsize > 1

    def read(self) -> Tensor:
        """Return the tensor, contiguous and on the CPU; itself if it is already."""
        return plain(self.load())


@dataclass(frozen=True)
class State:
    """A state_dict that can be stored.

    Args:
        tensors: By name, in order, without the marks of compiled modules.
        weights: Names of the tensors of two or more axes that are trained, as far as that is known: buffers of a module
            are not among them.
        modules: The versions that modules record for their state, without the usual 1.
        grids: How tensors are cut in the `.muws` file that they come from, by name.
        extra: The user's values in that file.
    """

    tensors: dict[str, Stored]
    weights: frozenset[str]
    modules: dict[str, Any]
    grids: Mapping[str, BlockGrid] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


def read_state(source: Source, max_bytes: int = MAX_BYTES, progress: Progress | None = None) -> State:
    """Return the tensors of a module, a state_dict, a Lightning checkpoint, or a file of one of these.

    A safetensors file, or several with an index, stays on the disk: each tensor is read when it is needed.

    Args:
        source: What holds the tensors. A dict with the key ``state_dict`` is a checkpoint.
        max_bytes: The most bytes that tensors may take which are smaller in their file: of a `.muws` file, and of
            compressed or repeated values in a file that torch.save wrote.
        progress: Called with the bytes done and all bytes while a `.muws` file is decoded.

    Raises:
        SettingError: It holds anything but tensors of known dtypes, or the file cannot be read without running code.
        FormatError: It is a broken `.muws` file, or takes more than ``max_bytes``.
    """
    check_max_bytes(max_bytes)
    if isinstance(source, (str, Path)):
        return _read_file(Path(source), max_bytes, progress)
    if not isinstance(source, (nn.Module, Mapping)):
        raise SettingError(
            f"a {type(source).__name__} is no model: give a module, a state_dict, a Lightning checkpoint, "
            "or the path of a file that holds one"
        )
    if isinstance(source, nn.Module):
        return _of_tensors(source.state_dict(), {clean_name(name) for name, _ in source.named_buffers()})
    return _of_tensors(source)


def _read_file(path: Path, max_bytes: int, progress: Progress | None) -> State:
    """Return the tensors of a `.muws` or safetensors checkpoint, or of a file that torch.save wrote."""
    if path.suffix == ".muws":
        found, manifest = read_compressed(path, max_bytes=max_bytes, progress=progress)
        grids = {entry.name: entry.grid for entry in manifest.tensors if entry.grid}
        state = _of_tensors(found)
        return State(state.tensors, state.weights, state.modules, grids, manifest.extra)
    if is_safetensors(path):
        tensors: dict[str, Stored] = {}
        for key, span in list_tensors(path).items():
            name = _free_name(key, tensors)
            tensors[name] = Stored(span.dtype, span.shape, (span.path, name), span.read)
        return State(tensors, frozenset(name for name, x in tensors.items() if len(x.shape) >= 2), {})
    loaded = _unpickled(path, max_bytes)
    if not isinstance(loaded, Mapping):
        raise SettingError(f"{path} holds a {type(loaded).__name__}, a state_dict or a Lightning checkpoint is needed")
    state = _of_tensors(loaded)
    n_bytes = sum({x.key: x.nbytes for x in state.tensors.values()}.values())
    if n_bytes > (allowed := max(max_bytes, path.stat().st_size)):
        raise SettingError(
            f"{path} holds tensors that repeat their values and take {n_bytes:,} bytes, at most {allowed:,} are "
            "allowed: raise max_bytes if you trust the file"
        )
    return state


def _unpickled(path: Path, max_bytes: int) -> Any:
    """Return what torch.save wrote, if it is made of tensors and plain values only."""
    with path.open("rb") as file:  # a missing file is an error of the system, not one of the format
        is_archive = file.read(2) == b"PK"
    if is_archive:
        _check_archive(path, max_bytes)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # whatever torch raises: the bytes of a damaged file are read as anything
        if is_archive and is_out_of_memory(error):  # its records were checked; elsewhere a size may be a lie
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SettingError(
            f"{path} cannot be read as tensors and plain values alone, and no code is run: {reason}; save its "
            "state_dict and pack that"
        ) from None


def _check_archive(path: Path, max_bytes: int) -> None:
    """Refuse an archive whose records are larger than the file: torch.save compresses none."""
    try:
        with zipfile.ZipFile(path) as archive:
            n_bytes = sum(record.file_size for record in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise SettingError(f"{path} is a damaged archive of torch.save: {error}") from None
    if n_bytes > (allowed := max(max_bytes, path.stat().st_size)):
        raise SettingError(
            f"{path} expands to {n_bytes:,} bytes, at most {allowed:,} are allowed: raise max_bytes if you trust the "
            "file"
        )


def _of_tensors(state: Mapping[str, Any], buffers: Collection[str] = ()) -> State:
    """Return the tensors of a state_dict, or of a checkpoint that has one."""
    if isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    tensors: dict[str, Stored] = {}
    for key, value in state.items():
        _check_tensor(key, value)
        tensors[_free_name(key, tensors)] = Stored.of(whole(value.detach()))
    if masked := [n for n in tensors if n.endswith("_orig") and f"{n.removesuffix('orig')}mask" in tensors]:
        warnings.warn(
            f"{masked[0]} and its mask are of torch.nn.utils.prune, and are stored dense as they are: "
            "call prune.remove on the module before, or silence this UserWarning",
            stacklevel=4,
        )
    weights = frozenset(name for name, x in tensors.items() if len(x.shape) >= 2 and name not in buffers)
    return State(tensors, weights, _versions(getattr(state, "_metadata", None) or {}))


def _check_tensor(key: object, value: object) -> None:
    """Check that an entry of a state_dict is a tensor that can be stored."""
    if not isinstance(key, str):
        raise SettingError(f"the state_dict has the key {key!r}, only strings are allowed")
    if not isinstance(value, Tensor):
        raise SettingError(
            f"{key!r} is a {type(value).__name__} (of get_extra_state?), only tensors can be stored: leave it out"
        )
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in DTYPES or value.layout != torch.strided or value.is_meta or value.is_quantized:
        kind = "on the meta device" if value.is_meta else f"of dtype {dtype} and layout {value.layout}"
        raise SettingError(f"{key!r} is {kind}, only dense tensors with values of {', '.join(DTYPES)} can be stored")
    if why := why_too_large(value.shape):
        raise SettingError(f"{key!r} {why}")


def _free_name(key: str, taken: Mapping[str, object]) -> str:
    """Return the name of a tensor without the marks of compiled modules, if no other tensor has it."""
    if why := why_unstorable(key, f"the name {key!r}"):
        raise SettingError(why)
    if (name := clean_name(key)) in taken:
        raise SettingError(f"two tensors are named {name!r} once the prefixes of compiled modules are removed")
    return name


def _versions(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the versions that modules record for their state, without the usual 1."""
    versions = {name: about.get("version", 1) for name, about in metadata.items() if isinstance(about, dict)}
    unusual = {name: version for name, version in versions.items() if type(version) is int and version != 1}
    return {clean_name(f"{name}.")[:-1]: {"version": version} for name, version in unusual.items()}


def identity(x: Tensor) -> Hashable:
    """Return a key that two tensors share only if they are the same memory seen the same way; empty ones never are."""
    if not x.numel():
        return (id(x),)
    lazy = (x.is_conj(), x.is_neg())  # such a view has the memory of what it views, and other values
    return (x.untyped_storage().data_ptr(), x.device, x.storage_offset(), tuple(x.shape), x.stride(), x.dtype, lazy)


def plain(x: Tensor) -> Tensor:
    """Return the tensor contiguous and on the CPU; itself if it is already."""
    x = x.cpu().resolve_conj().resolve_neg().contiguous()
    # a single element counts as contiguous whatever its strides are, and then cannot be viewed as bytes
    return x.clone(memory_format=torch.contiguous_format) if x.numel() == 1 else x
