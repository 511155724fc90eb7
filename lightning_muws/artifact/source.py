"""Reads tensors from a module, a state_dict, or a file of either, without running code."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_muws.artifact.json_text import why_unstorable
from lightning_muws.artifact.load import load_compressed
from lightning_muws.artifact.manifest import DTYPES, why_too_large
from lightning_muws.errors import SettingError
from lightning_muws.structure.plan import clean_name
from lightning_muws.structure.sharded import whole

Source = nn.Module | Mapping[str, Any] | str | Path


@dataclass(frozen=True)
class State:
    """A state_dict that can be stored.

    Args:
        tensors: By name, in order, without the marks of compiled modules.
        weights: Names of the tensors of two or more axes that are trained, as far as that is known: buffers of a module
            are not among them.
        modules: The versions that modules record for their state, without the usual 1.
    """

    tensors: dict[str, Tensor]
    weights: frozenset[str]
    modules: dict[str, Any]


def read_state(source: Source) -> State:
    """Return the tensors of a module, a state_dict, a Lightning checkpoint, or a file of one of these.

    Raises:
        SettingError: It holds anything but tensors of known dtypes, or the file cannot be read without running code.
    """
    buffers = {clean_name(name) for name, _ in source.named_buffers()} if isinstance(source, nn.Module) else set()
    if isinstance(source, (str, Path)):
        source = read_file(Path(source))
    if not isinstance(source, (nn.Module, Mapping)):
        raise SettingError(
            f"a {type(source).__name__} is no model: give a module, a state_dict, a Lightning checkpoint, "
            "or the path of a file that holds one"
        )
    state = source.state_dict() if isinstance(source, nn.Module) else source
    if "pytorch-lightning_version" in state and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        name = _checked(key, value)
        if name in tensors:
            raise SettingError(f"two tensors are named {name!r} once the prefixes of compiled modules are removed")
        tensors[name] = whole(value.detach())
    if masked := [n for n in tensors if n.endswith("_orig") and f"{n.removesuffix('orig')}mask" in tensors]:
        warnings.warn(
            f"{masked[0]} and its mask are of torch.nn.utils.prune, and are stored dense as they are: "
            "call prune.remove on the module before, or silence this UserWarning",
            stacklevel=3,
        )
    weights = frozenset(name for name, x in tensors.items() if x.ndim >= 2 and name not in buffers)
    return State(tensors, weights, _versions(getattr(state, "_metadata", None) or {}))


def read_file(path: Path) -> Mapping[str, Any]:
    """Return the tensors in a `.muws` or `.safetensors` file, or in one that torch.save wrote, without running code.

    Raises:
        SettingError: It is none of these, or holds more than tensors and plain values.
        FormatError: It is a broken `.muws` file.
    """
    if path.suffix == ".muws":
        return load_compressed(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise SettingError(f"{path} is no safetensors file: {error}") from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, AttributeError) as error:
        raise SettingError(
            f"{path} cannot be read as tensors and plain values alone, and no code is run: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}; save its state_dict and pack that"
        ) from None
    if not isinstance(found, Mapping):
        raise SettingError(f"{path} holds a {type(found).__name__}, a state_dict or a Lightning checkpoint is needed")
    return found


def _checked(key: object, value: object) -> str:
    """Return the clean name of a tensor that can be stored."""
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
    if why := why_unstorable(key, f"the name {key!r}"):
        raise SettingError(why)
    return clean_name(key)


def _versions(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the versions that modules record for their state, without the usual 1."""
    versions = {name: about.get("version", 1) for name, about in metadata.items() if isinstance(about, dict)}
    unusual = {name: version for name, version in versions.items() if type(version) is int and version != 1}
    return {clean_name(f"{name}.")[:-1]: {"version": version} for name, version in unusual.items()}


def identity(x: Tensor) -> tuple[Any, ...]:
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
