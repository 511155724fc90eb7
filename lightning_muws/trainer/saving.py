"""The file at the end of fit: tried before training, written once, by a writer that the callback hands in."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_muws.errors import SettingError
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.plan import Plan, named_weights
from lightning_muws.structure.sharded import is_sharded, whole


class Saved(Protocol):
    """What a writer reports about the file it wrote."""

    @property
    def n_bytes(self) -> int:
        """Bytes of the file."""

    @property
    def compression_ratio(self) -> float:
        """Dense bytes over the bytes of the file."""


Writer = Callable[..., Saved]  # (state_dict, path, blocks={name: grid}, **lossy)


def prepare(path: str | Path, module: Any, is_global_zero: bool) -> Path:
    """Return the absolute path of the file to write, after a trial on rank 0 that leaves nothing behind.

    Raises:
        SettingError: No file can be written there, or the module's state holds more than tensors.
    """
    path = Path(path).expanduser().absolute()
    if wrong := [name for name, value in module.state_dict().items() if not isinstance(value, Tensor)]:
        raise SettingError(
            f"save_to={str(path)!r} cannot hold {', '.join(wrong[:5])}, which get_extra_state makes and is no tensor: "
            "leave save_to out and save what you need of the state_dict"
        )
    if is_global_zero:
        try:
            if path.is_dir():
                raise SettingError(f"save_to={str(path)!r} is a folder: give the name of a file, such as model.muws")
            _try(path)
        except OSError as error:
            raise SettingError(f"save_to={str(path)!r} cannot be written: {error}") from error
    return path


def _try(path: Path) -> None:
    """Make the folder of ``path`` and a file in it, then remove what was made.

    The file's name is as long as that of the temporary file which a writer makes beside ``path``: file systems limit
    the length of a name.
    """
    missing = [folder for folder in path.parents if not folder.exists()]
    trial = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with trial.open("xb"):
            pass
        trial.unlink()
    finally:
        with contextlib.suppress(OSError):  # not made, or another process put something in it meanwhile
            for folder in missing:
                folder.rmdir()


def save(
    writer: Writer,
    path: Path,
    module: Any,
    plan: Plan,
    is_global_zero: bool,
    compression: float | None = None,
    steps: Mapping[str, float] | None = None,
) -> Saved | None:
    """Write the module's state_dict with the plan's blocks, on rank 0; all ranks take part in gathering shards.

    Args:
        writer: Writes the file.
        path: The file, from :func:`prepare`.
        module: The module; its state_dict is written.
        plan: Its covered entries tell how weights are cut.
        is_global_zero: Whether this is rank 0.
        compression: How many times smaller than its tensors the file is at least; None for a lossless file.
        steps: Of which parameters are whole multiples, by name.

    Returns:
        The writer's report on rank 0, else None.
    """
    state = _gathered(module, is_global_zero)
    if not is_global_zero:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    lossy: dict[str, Any] = {}
    if compression is not None:
        lossy = {"compression": compression, "parameters": _parameters(module), "steps": steps}
    saved = writer(state, path, blocks={name: entry.grid for name, entry in plan.covered.items()}, **lossy)
    rank_zero_info(
        f"muws: {path} has {saved.n_bytes:,} bytes, {saved.compression_ratio:.1f} x smaller than its tensors"
    )
    return saved


def choose_steps(
    stepper: Callable[..., Mapping[str, float]],
    module: Any,
    is_global_zero: bool,
    broadcast: Callable[[Any], Any],
    blocks: Mapping[str, BlockGrid],
    compression: float,
) -> Mapping[str, float]:
    """Return the step of each parameter with which the module's file has the size; the same on all ranks. A collective.

    Args:
        stepper: Chooses the steps, on rank 0.
        module: The module.
        is_global_zero: Whether this is rank 0.
        broadcast: Returns on every rank what rank 0 gave to it.
        blocks: How weights are cut, by name.
        compression: How many times smaller than its tensors the file is at least.

    Raises:
        SettingError: No file is as small as that; on all ranks.
    """
    state = _gathered(module, is_global_zero)
    found: dict[str, float] | str = ""
    if is_global_zero:
        try:
            found = dict(stepper(state, blocks, compression, _parameters(module)))
        except SettingError as error:  # the other ranks wait: they must hear of it
            found = str(error)
    shared: dict[str, float] | str = broadcast(found)
    if isinstance(shared, str):
        raise SettingError(shared)
    return shared


def _gathered(module: Any, is_global_zero: bool) -> dict[str, Any]:
    """Return the module's state_dict with whole tensors on rank 0. A collective where tensors are sharded."""
    state: dict[str, Any] = module.state_dict()
    for name, value in state.items():
        if is_sharded(value):  # the other tensors keep their identity, by which the writer finds shared ones
            full = whole(value.detach())
            state[name] = full.cpu() if is_global_zero else full.new_empty(0)
    return state


def _parameters(module: Any) -> list[str]:
    return [name for name, _, _ in named_weights(module)]
