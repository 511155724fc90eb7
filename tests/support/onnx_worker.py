"""Runs an ONNX file in a process without torch: ``python onnx_worker.py model.onnx arrays.npz [library]``.

``arrays.npz`` has the inputs by name; the outputs are written beside it, to ``outputs.npz``.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime


def main(model: str, arrays: str, *library: str) -> None:
    """Run the model, and write its outputs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for path in library:
        options.register_custom_ops_library(path)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    outputs = session.run(None, dict(np.load(arrays)))
    np.savez(Path(arrays).with_name("outputs.npz"), *outputs)
    strangers = {"torch", "lightning_muws"} & set(sys.modules)
    assert not strangers, f"{strangers} was imported"


if __name__ == "__main__":
    main(*sys.argv[1:])
