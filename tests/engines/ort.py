"""ONNX Runtime on one thread: by itself it takes one for each core, and they turn in circles while idle."""

from __future__ import annotations

from pathlib import Path

import onnxruntime


def session_of(model: bytes | Path) -> onnxruntime.InferenceSession:
    """A session over a model, or over a file with its weights beside it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    source = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
