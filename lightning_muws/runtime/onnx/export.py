"""Writes a model as an ONNX file, with our operators for its packed layers or with dense weights."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_muws.errors import MuwsError, SettingError
from lightning_muws.runtime.onnx.dense import make_dense
from lightning_muws.runtime.onnx.fuse import fuse
from lightning_muws.runtime.onnx.library import onnx_library
from lightning_muws.runtime.onnx.operators import DOMAIN, VERSION, package, translations
from lightning_muws.runtime.rewrite.chain import layer_by_layer
from lightning_muws.runtime.rewrite.observe import Example, inference

OLD_OPSET, OLD_IR = 20, 9  # what ONNX Runtime 1.17 reads
LARGEST_FILE = 2_000_000_000  # bytes of tensors: protobuf ends at 2 GiB


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_input: object,
    custom_ops: bool = True,
    dynamic_batch: bool = False,
) -> Path:
    """Write a model as an ONNX file, for inputs of the example's shape, and return the file's path.

    With ``custom_ops`` the layers that run on our native kernels are operators of the domain ``lightning_muws``: the
    file holds their packed blocks, and a program registers :func:`~lightning_muws.runtime.onnx.library.onnx_library`
    before it loads the file. Without, the file has dense weights and is larger and slower; every ONNX runtime loads it.
    Weights of more than 2 GB go into a second file beside the first, ``<name>.data``.

    Args:
        model: What :func:`~lightning_muws.runtime.accelerate.accelerate` returned, or any module; in eval mode.
        path: Of the file to write; it is replaced when the new one is complete.
        example_input: A tensor, a tuple of arguments, or a dict of keyword arguments, as the model is called in use.
        custom_ops: Whether our operators may be in the file.
        dynamic_batch: Whether the file takes batches of any size: the first dimension of every input tensor. Then the
            example has at least two samples.

    Returns:
        The path.

    Raises:
        SettingError: The model is no module or in training mode, the path is in no folder, torch cannot export the
            model, it has a layer that ONNX does not have, a dynamic batch has an example of one sample, or the packages
            of the extra ``onnx`` are not installed.
        StateError: ``custom_ops`` is set and the native kernels are not built here.
    """
    if not isinstance(model, nn.Module):
        raise SettingError(f"model is a {type(model).__name__}: give a torch.nn.Module")
    if model.training:
        raise SettingError("the model is in training mode: call model.eval() before export_onnx")
    example, path = Example.of(example_input), Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise SettingError(
            f"{path} cannot be written: it is a folder, or is in none: give a file in a folder that exists"
        )
    shapes = _any_batch(model, example) if dynamic_batch else None
    if custom_ops:
        onnx_library()
    exported = _exported(model, example, shapes)
    fuse(exported.graph)
    if not custom_ops:
        make_dense(exported.graph)
        exported.opset_imports.pop(DOMAIN, None)
    elif DOMAIN in exported.opset_imports:
        exported.opset_imports[DOMAIN] = VERSION
    passes = package("onnx_ir").passes.common
    passes.RemoveUnusedNodesPass()(exported)
    passes.ClearMetadataAndDocStringPass()(exported)  # it holds paths of the machine that exported
    if exported.opset_imports[""] <= OLD_OPSET:
        exported.ir_version = OLD_IR  # nothing of a newer one is in the file
    _save(exported, path)
    return path


def _any_batch(model: nn.Module, example: Example) -> dict[str, Any]:
    """Return torch's description of inputs whose first dimension may have any size, by the names of the arguments."""
    shapes = [tuple(x.shape) for x in example.tensors]
    if any(not shape or shape[0] < 2 for shape in shapes):
        raise SettingError(
            f"dynamic_batch is set and the example has tensors of shapes {shapes}: give one of at least two samples, "
            "because torch takes a size of 1 for a constant"
        )
    given = inspect.signature(model.forward).bind(*example.args, **example.kwargs).arguments
    batch = {0: torch.export.Dim("batch")}
    described: dict[str, Any] = pytree.tree_map(lambda leaf: batch if isinstance(leaf, Tensor) else None, dict(given))
    return described


def _exported(model: nn.Module, example: Example, shapes: dict[str, Any] | None) -> Any:
    """Return the model as an ``onnx_ir.Model`` with our operators."""
    table = translations()
    package("onnx_ir")
    try:
        with inference(), layer_by_layer(), _quiet():
            program = torch.onnx.export(
                model,
                example.args,
                kwargs=dict(example.kwargs),
                dynamo=True,
                verbose=False,
                custom_translation_table=table,
                dynamic_shapes=shapes,
            )
    except Exception as error:
        reason: BaseException | None = error
        while reason is not None:
            if isinstance(reason, MuwsError):
                raise reason from error
            reason = reason.__cause__
        raise SettingError(
            f"torch cannot export this model to ONNX ({_first_line(error)}); if accelerate gave it layers that ONNX "
            "does not have, call accelerate with kernels=['native', 'compact']"
        ) from error
    assert program is not None  # noqa: S101  it is None only with dynamo=False
    return program.model


def _first_line(error: BaseException) -> str:
    """Return the type and the first line of the first cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what torch's exporter prints and logs of packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(before)


def _save(model: Any, path: Path) -> None:
    """Write the file beside its place, and put it there."""
    n_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    beside = f"{path.name}.data" if n_bytes > LARGEST_FILE else None
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        package("onnx_ir").save(model, Path(folder) / path.name, external_data=beside)
        for name in filter(None, (beside, path.name)):
            (Path(folder) / name).replace(path.parent / name)
