"""Finds the library of operators for ONNX Runtime: the compiled kernels, which have its entry point too."""

from __future__ import annotations

from pathlib import Path

from lightning_muws.errors import StateError
from lightning_muws.runtime.native.library import library

ENTRY = "RegisterCustomOps"  # what ONNX Runtime calls


def onnx_library() -> Path:
    """Return the path of the library that computes our operators in ONNX Runtime 1.17 or newer.

    Register it before a session is made, in any language that has ONNX Runtime (``RegisterCustomOpsLibrary`` in C,
    ``register_custom_ops_library`` in Python). It needs neither Python nor torch: copy the file to the machine that
    runs the model. Every operator runs on the thread that calls it, or on so many of ONNX Runtime's threads as the
    session's setting ``lightning_muws.threads`` says. Several threads may call at once.

    Raises:
        StateError: The kernels are not built here.
    """
    found = library()
    if found is None or not hasattr(found, ENTRY):
        raise StateError(
            "the operators for ONNX Runtime are in the native kernels, which are not built here: install the package "
            "with a C++ compiler, or export with custom_ops=False"
        )
    return Path(found._name)
