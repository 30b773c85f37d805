"""Parses, builds, runs and graph-captures a pack's stages with a real TensorRT, and compares with eager.

    python -m loadtests.witness.tensorrt PACK [--precision fp16]

An outside witness for the ONNX files that bundles are built from: it imports nothing of this project and no
torch, only numpy and `tensorrt`. It runs on Python 3.10 with TensorRT 8.6.0, the newest whose libraries a
package index has; on version 10 it builds in fp32 and fp16, on 11 in fp32. PACK is written by
`loadtests.witness.pack`.

It prints a line of JSON for each stage and batch size, and exits with 1 if one differs. It has never run on a
GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

MIN_COSINE = {"fp32": 0.9999, "fp16": 0.999}
MAX_PIXELS = {"fp32": 2, "fp16": 8}
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
THREAD_LOCAL = 1
RUNS = 20


class Cuda:
    """The few calls of the CUDA runtime that running a plan takes."""

    def __init__(self) -> None:
        for name in ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so"):
            try:
                self._library = ctypes.CDLL(name)
                break
            except OSError:
                continue
        else:
            raise SystemExit("no CUDA runtime was found; put the folder of libcudart.so into LD_LIBRARY_PATH")

    def __call__(self, function: str, *arguments: Any) -> None:
        """Call a function of the runtime.

        Raises:
            RuntimeError: it returned an error.
        """
        error = getattr(self._library, function)(*arguments)
        if error:
            describe = self._library.cudaGetErrorString
            describe.restype = ctypes.c_char_p
            raise RuntimeError(f"{function}: {describe(error).decode()}")

    def upload(self, array: np.ndarray[Any, Any]) -> int:
        """Copy an array to the GPU; its address there."""
        address = ctypes.c_void_p()
        self("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(max(1, array.nbytes)))
        data = array.ctypes.data_as(ctypes.c_void_p)
        self("cudaMemcpy", address, data, ctypes.c_size_t(array.nbytes), HOST_TO_DEVICE)
        return int(address.value or 0)

    def download(self, address: int, array: np.ndarray[Any, Any]) -> None:
        """Copy an array back."""
        data = array.ctypes.data_as(ctypes.c_void_p)
        size = ctypes.c_size_t(array.nbytes)
        self("cudaMemcpy", data, ctypes.c_void_p(address), size, DEVICE_TO_HOST)


def build(trt: Any, logger: Any, folder: Path, batches: list[int], precision: str) -> Any:
    """Parse and build one stage; the engine.

    Raises:
        RuntimeError: TensorRT does not read the file, or does not build it.
    """
    builder = trt.Builder(logger)
    major = int(trt.__version__.split(".")[0])
    network = builder.create_network(
        1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH) if major < 10 else 0
    )
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(folder / "stage.onnx")):
        said = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise RuntimeError(f"not parsed: {'; '.join(said)}")
    config = builder.create_builder_config()
    if precision == "fp16":
        if not hasattr(trt.BuilderFlag, "FP16"):
            raise RuntimeError("this TensorRT has strongly typed networks only; use --precision fp32")
        config.set_flag(trt.BuilderFlag.FP16)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        rest = tuple(tensor.shape)[1:]
        profile.set_shape(tensor.name, (batches[0], *rest), (batches[-1], *rest), (batches[-1], *rest))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("not built")
    return trt.Runtime(logger).deserialize_cuda_engine(plan)


def run(trt: Any, cuda: Cuda, engine: Any, arrays: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Run one batch plainly and as a CUDA graph.

    Returns:
        Outputs by name, of the graph's replay; `ms` of both; whether both gave the same.
    """
    stream, graph, executable = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    cuda("cudaStreamCreate", ctypes.byref(stream))
    context = engine.create_execution_context()
    handle = int(stream.value or 0)
    addresses: dict[str, int] = {}
    outputs: dict[str, np.ndarray[Any, Any]] = {}
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    for name in inputs:
        # before version 10 there is no int64: inputs that are one in the file are int32 in the engine
        array = np.ascontiguousarray(arrays[f"in_{name}"].astype(trt.nptype(engine.get_tensor_dtype(name))))
        addresses[name] = cuda.upload(array)
        context.set_input_shape(name, array.shape)
    for name in names:
        if name not in inputs:
            dtype = trt.nptype(engine.get_tensor_dtype(name))
            outputs[name] = np.zeros(tuple(context.get_tensor_shape(name)), dtype=dtype)
            addresses[name] = cuda.upload(outputs[name])
        context.set_tensor_address(name, addresses[name])

    def execute() -> None:
        if not context.execute_async_v3(handle):
            raise RuntimeError("refused to run")

    def timed(call: Any) -> float:
        cuda("cudaStreamSynchronize", stream)
        start = time.perf_counter()
        for _ in range(RUNS):
            call()
        cuda("cudaStreamSynchronize", stream)
        return (time.perf_counter() - start) * 1e3 / RUNS

    execute()  # what a first run does at leisure, a graph must not contain
    plain_ms = timed(execute)
    plain = {}
    for name, array in outputs.items():
        cuda.download(addresses[name], array)
        plain[name] = array.copy()
        cuda("cudaMemset", ctypes.c_void_p(addresses[name]), 0, ctypes.c_size_t(array.nbytes))
    cuda("cudaStreamBeginCapture", stream, THREAD_LOCAL)
    execute()
    cuda("cudaStreamEndCapture", stream, ctypes.byref(graph))
    cuda("cudaGraphInstantiate", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
    graph_ms = timed(lambda: cuda("cudaGraphLaunch", executable, stream))
    for name, array in outputs.items():
        cuda.download(addresses[name], array)
    same = all(np.array_equal(plain[name], array) for name, array in outputs.items())
    for address in addresses.values():
        cuda("cudaFree", ctypes.c_void_p(address))
    return {"outputs": outputs, "ms": round(plain_ms, 4), "graph_ms": round(graph_ms, 4), "graph_same": same}


def judge(
    outputs: dict[str, np.ndarray[Any, Any]], arrays: dict[str, np.ndarray[Any, Any]], precision: str
) -> dict[str, Any]:
    """Compare with eager: the worst row's cosine, the largest difference, and whether that will do."""
    cosines, largest, passed = [], 0.0, True
    for name, array in outputs.items():
        expected = arrays[f"out_{name}"]
        a, b = (one.reshape(len(expected), -1).astype(np.float64) for one in (expected, array))
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosine = float(((a * b).sum(axis=1) / norms).min())
        cosines.append(cosine)
        difference = float(np.abs(a - b).max())
        largest = max(largest, difference)
        # a comparison with NaN is false
        passed &= bool(cosine >= MIN_COSINE[precision])
        passed &= bool(expected.dtype != np.uint8 or difference <= MAX_PIXELS[precision])
    return {"cosine": min(cosines), "max_abs": largest, "passed": passed}


def main() -> int:
    """Run a pack; 0 if everything agrees with eager, 1 if not, 2 if nothing can be run here."""
    parser = argparse.ArgumentParser(description="Run a pack's stages with TensorRT.")
    parser.add_argument("pack", type=Path)
    parser.add_argument("--precision", choices=sorted(MIN_COSINE), default="fp16")
    args = parser.parse_args()
    try:
        import tensorrt as trt
    except ImportError as error:
        print(f"tensorrt is not to be had here ({error})", file=sys.stderr)
        return 2
    described = json.loads((args.pack / "pack.json").read_text(encoding="utf-8"))
    cuda, logger = Cuda(), trt.Logger(trt.Logger.WARNING)
    failed = 0
    for stage in described["stages"]:
        folder = args.pack / stage
        line: dict[str, Any] = {"stage": stage, "tensorrt": trt.__version__, "precision": args.precision}
        try:
            engine = build(trt, logger, folder, described["batches"], args.precision)
            for batch in described["batches"]:
                with np.load(folder / f"{batch}.npz") as file:
                    arrays = dict(file)
                found = run(trt, cuda, engine, arrays)
                verdict = judge(found.pop("outputs"), arrays, args.precision)
                failed += not (verdict["passed"] and found["graph_same"])
                print(json.dumps({**line, "batch": batch, **found, **verdict}), flush=True)
        except RuntimeError as error:
            failed += 1
            print(json.dumps({**line, "error": str(error)}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
