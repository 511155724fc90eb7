"""A model of transformers as a folder of the Hugging Face Hub: its configuration and a `.muws` file; and back."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_muws.artifact.into import check_fit
from lightning_muws.artifact.load import MAX_BYTES, load_compressed, opened
from lightning_muws.artifact.report import SaveReport
from lightning_muws.artifact.save import save_compressed
from lightning_muws.errors import SettingError, StateError
from lightning_muws.structure.plan import Plan

FILE, CONFIG, CARD = "model.muws", "config.json", "README.md"
KINDS = ("dense", "unified", "pruned")


def save_to_hub_folder(
    model: Any,
    folder: str | Path,
    *,
    plan: Plan | None = None,
    compression: float | None = None,
    tokenizer: Any = None,
    accuracy: Mapping[str, float] | None = None,
) -> SaveReport:
    """Write a model of transformers as a folder that :func:`load_pretrained` reads and the Hub shows.

    It holds ``config.json``, ``model.muws``, the files of the tokenizer if there is one, and a model card
    (``README.md``) with the bytes, the ratio, the share of zeros and of each kind of block, and how to load the model.
    Files of these names are replaced.

    Args:
        model: A ``PreTrainedModel``.
        folder: The folder; made if there is none.
        plan: How weights are cut into blocks, such as ``callback.plan``; by default the shapes that make the file
            smallest.
        compression: How many times smaller than its tensors the file is at least; by default the file is lossless.
        tokenizer: A tokenizer or processor, with ``save_pretrained``.
        accuracy: What you measured, by name, such as ``{"accuracy": 0.91}``; the card repeats it.

    Returns:
        The report on ``model.muws``.

    Raises:
        SettingError: ``model`` has no configuration of transformers, or a setting of
            :func:`lightning_muws.save_compressed` is not allowed.
        OSError: A file cannot be written.
    """
    if not callable(getattr(getattr(model, "config", None), "save_pretrained", None)):
        raise SettingError(
            f"{type(model).__name__} has no configuration that can be saved: give a PreTrainedModel of transformers, "
            "or use save_compressed"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    blocks = {name: entry.grid for name, entry in plan.covered.items()} if plan else None
    report = save_compressed(model, folder / FILE, blocks=blocks, compression=compression)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    (folder / CARD).write_text(model_card(model, report, dict(accuracy or {})), encoding="utf-8")
    return report


def load_pretrained(
    folder_or_id: str | Path,
    *,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Return the model of a folder that :func:`save_to_hub_folder` wrote, or of such a repository of the Hub.

    The class is that of transformers which ``config.json`` names; code of a repository is never run. The model is built
    on the meta device, and gets the tensors of ``model.muws`` in the dtype of its configuration. It is in eval mode.

    Args:
        folder_or_id: The folder, or the name of a repository such as ``someone/model`` (extra ``hub``), of which
            ``config.json`` and ``model.muws`` are fetched into the cache of huggingface_hub.
        device: Where the model goes.
        revision: A branch, a tag or a commit of the repository.
        max_bytes: The most bytes that all tensors together may take.

    Raises:
        FormatError: ``model.muws`` is damaged, or larger than ``max_bytes``.
        SettingError: There is no such folder or file, the class is none of transformers, or a package is missing.
        StateError: The tensors are not those of the model.
    """
    folder = _folder(folder_or_id, revision)
    for name in (CONFIG, FILE):
        if not (folder / name).is_file():
            raise SettingError(f"{folder_or_id} has no {name}: give a folder that save_to_hub_folder wrote")
    empty, config = empty_model(folder)
    with opened(folder / FILE) as (_, manifest):  # before memory is taken for what a configuration asks for
        check_fit(manifest.tensors, empty)
    kind: Any = type(empty)
    state = load_compressed(folder / FILE, device=device, max_bytes=max_bytes)
    loading = {"config": config, "state_dict": dict(state), "dtype": config.dtype, "output_loading_info": True}
    model, found = kind.from_pretrained(None, **loading)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, found[what])):
            raise StateError(
                f"{folder / FILE} does not fit {kind.__name__}: {what.replace('_', ' ')} {', '.join(keys[:5])}; save "
                "the model and its configuration together, with save_to_hub_folder"
            )
    return model.to(device)


def empty_model(folder: str | Path) -> tuple[nn.Module, Any]:
    """Return the model of a ``config.json`` on the meta device, where it takes no memory, and its configuration.

    Args:
        folder: A folder with a ``config.json``; nothing is fetched, and no code of the folder is run.

    Raises:
        SettingError: There is none, transformers cannot read it, or it names no class of transformers.
    """
    folder = Path(folder)
    transformers = _package("transformers", "transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise SettingError(f"{folder / CONFIG} is no configuration that transformers reads: {error}") from error
    kind = _class_of(transformers, config, folder)
    with torch.device("meta"):
        return kind(config), config


def push_folder(folder: str | Path, repo_id: str, *, private: bool = False, message: str = "Upload model") -> str:
    """Upload a folder of :func:`save_to_hub_folder` to a repository of the Hub, and return the URL of the commit.

    The repository is made if there is none. huggingface_hub finds your token (``hf auth login``).

    Args:
        folder: The folder.
        repo_id: The repository, such as ``you/model``.
        private: Whether a new repository is private.
        message: The message of the commit.

    Raises:
        SettingError: The folder holds no model, or huggingface_hub is not installed (extra ``hub``).
    """
    if not (Path(folder) / FILE).is_file():
        raise SettingError(f"{folder} has no {FILE}: write it with save_to_hub_folder first")
    api = _package("huggingface_hub", "hub").HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message=message).commit_url)


def model_card(model: nn.Module, report: SaveReport, accuracy: Mapping[str, float]) -> str:
    """Return the model card of a folder, in Markdown."""
    blocks = [sum(tensor.counts[i] for tensor in report.tensors) for i in range(len(KINDS))]
    zeros = sum(int((p == 0).sum()) for p in model.parameters()) / max(1, sum(p.numel() for p in model.parameters()))
    rows = [
        ("class", type(model).__name__),
        ("`model.muws`", f"{report.n_bytes:,} bytes"),
        ("its tensors", f"{report.dense_bytes:,} bytes"),
        ("compression ratio", f"{report.compression_ratio:.1f}"),
        ("zero weights before saving", f"{zeros:.1%}"),
        *((f"{kind} blocks", f"{n / max(1, sum(blocks)):.1%}") for kind, n in zip(KINDS, blocks, strict=True)),
        *((name, f"{value:g}") for name, value in accuracy.items()),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
tags:
- muws
- compressed
---

# {type(model).__name__}, compressed

The weights are in a `.muws` file: blocks that are dense, unified (one magnitude) or pruned (all zero).

| | |
|---|---|
{table}

```python
from lightning_muws.hub import load_pretrained

model = load_pretrained("path or name of this repository")
```
"""


def _folder(folder_or_id: str | Path, revision: str | None) -> Path:
    """Return the folder; that of a repository is fetched."""
    if Path(folder_or_id).is_dir():
        return Path(folder_or_id)
    if isinstance(folder_or_id, Path) or folder_or_id.count("/") != 1 or folder_or_id.startswith((".", "/", "~")):
        raise SettingError(f"{folder_or_id} is no folder: give one, or the name of a repository such as someone/model")
    hub = _package("huggingface_hub", "hub")
    try:
        return Path(hub.snapshot_download(folder_or_id, revision=revision, allow_patterns=[CONFIG, FILE]))
    except (OSError, ValueError) as error:
        raise SettingError(f"{folder_or_id} is no folder, and cannot be fetched from the Hub: {error}") from error


def _class_of(transformers: Any, config: Any, folder: Path) -> Any:
    """Return the class of transformers that a configuration names."""
    names = config.architectures or [""]
    kind = getattr(transformers, str(names[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise SettingError(
            f"{folder / CONFIG} names the class {names[0]!r}, which is no model of this version of transformers: load "
            "the weights into your own class with load_compressed"
        )
    return kind


def _package(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SettingError(f"{name} is needed for this: install lightning-muws[{extra}]") from error
