"""The file at the end of fit: refused early what cannot be written, written once, by a writer that is handed in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_muws.errors import SettingError
from lightning_muws.structure.plan import Plan
from lightning_muws.structure.sharded import is_sharded, whole


class Saved(Protocol):
    """What a writer says of the file that it wrote."""

    @property
    def n_bytes(self) -> int:
        """Bytes of the file."""

    @property
    def compression_ratio(self) -> float:
        """Dense bytes over the bytes of the file."""


Writer = Callable[..., Saved]  # (state_dict, path, blocks={name: grid})


def prepare(path: str | Path, module: Any, is_global_zero: bool) -> Path:
    """Return the absolute path of the file that will be written, its folder made; in time, before any training.

    Raises:
        SettingError: Nothing can be written there, or the module's state is more than tensors.
    """
    path = Path(path).expanduser().absolute()
    if wrong := [name for name, value in module.state_dict().items() if not isinstance(value, Tensor)]:
        raise SettingError(
            f"save_to={str(path)!r} cannot hold {', '.join(wrong[:5])}, which get_extra_state makes and is no tensor: "
            "leave save_to out and save what you need of the state_dict"
        )
    if is_global_zero:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingError(f"save_to={str(path)!r} has a folder that cannot be made: {error}") from error
        if path.is_dir():
            raise SettingError(f"save_to={str(path)!r} is a folder: give the name of a file, such as model.muws")
    return path


def save(writer: Writer, path: Path, module: Any, plan: Plan, is_global_zero: bool) -> Saved | None:
    """Write the module's state_dict with the plan's blocks, on rank 0; sharded weights are gathered on all ranks."""
    state = module.state_dict()
    for name, value in state.items():
        if is_sharded(value):  # others stay where they are, so that shared ones are known to be shared
            full = whole(value.detach())
            state[name] = full.cpu() if is_global_zero else full.new_empty(0)
    if not is_global_zero:
        return None
    saved = writer(state, path, blocks={name: entry.grid for name, entry in plan.covered.items()})
    rank_zero_info(
        f"muws: {path} has {saved.n_bytes:,} bytes, {saved.compression_ratio:.1f} x smaller than its tensors"
    )
    return saved
