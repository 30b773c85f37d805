"""A stand-in for the `tensorrt` module: what its real bindings have and no more; ONNX Runtime computes.

Classes, members and enumerations are those that `vendor/tensorrt_api.json` recorded of the real wheels, for
one version; what is not there, or only in another version, is an AttributeError. Calls are checked against
the recorded signatures. The order of calls is checked too: whatever TensorRT's documentation demands before a
build or a run, and was not done, is an `OrderError`. A run reads inputs where the addresses say and writes
outputs where they say, so the whole way from a stage's module to its plan's result is walked, on the CPU.
"""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from tests.engines.ort import session_of

RECORDED = json.loads((Path(__file__).parent / "vendor" / "tensorrt_api.json").read_text(encoding="utf-8"))
VERSIONS = tuple(RECORDED)

SCRATCH_PER_ROW = 1000
"""Bytes that a run claims to need."""

NAMES = {
    "FLOAT": "FLOAT",
    "FLOAT16": "HALF",
    "BFLOAT16": "BF16",
    "INT64": "INT64",
    "UINT8": "UINT8",
}
ENUMS = (
    "BuilderFlag", "DataType", "ExecutionContextAllocationStrategy", "LayerInformationFormat",
    "MemoryPoolType", "NetworkDefinitionCreationFlag", "ProfilingVerbosity", "TensorIOMode",
)  # fmt: skip


class OrderError(AssertionError):
    """TensorRT was called in an order that it does not allow."""


class Member:
    """A value of one of pybind11's enumerations."""

    def __init__(self, name: str, value: int) -> None:
        self.name, self.value = name, value

    def __int__(self) -> int:
        return self.value

    def __repr__(self) -> str:
        return self.name


class Base:
    """Only recorded members exist, methods are logged and their arguments counted."""

    _fake: Any
    """The module that a class belongs to; each version has classes of its own."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_") and name != "__init__":
            return object.__getattribute__(self, name)
        fake, own = self._fake, type(self).__name__
        recorded = RECORDED[fake.__version__][own].get(name)
        if recorded is None:
            raise AttributeError(f"tensorrt {fake.__version__} has no {own}.{name}")
        value = object.__getattribute__(self, name)
        if not callable(value):
            return value
        return _checked(fake, own, name, recorded, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            fake, own = self._fake, type(self).__name__
            recorded = RECORDED[fake.__version__][own].get(name)
            if recorded != "property":
                raise AttributeError(f"tensorrt {fake.__version__} cannot set {own}.{name}: {recorded}")
            fake.calls.append((f"{own}.{name}", (value,)))
        object.__setattr__(self, name, value)


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = (Member(str(level), level) for level in range(5))

    def __init__(self) -> None:
        self.ready = True


class IHostMemory(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class ITimingCache(Base):
    def __init__(self, blob: bytes) -> None:
        self._blob = blob

    def serialize(self) -> IHostMemory:
        return self._fake.IHostMemory(b"timed" if not self._blob else self._blob)


class INetworkDefinition(Base):
    def __init__(self, flags: int) -> None:
        self._flags = flags
        self._model: onnx.ModelProto | None = None


class ParserError(Base):
    def node_operator(self) -> str:
        return "Det"

    def node_name(self) -> str:
        return "node_det"

    def desc(self) -> str:
        return "no importer"


class OnnxParser(Base):
    def __init__(self, network: INetworkDefinition, logger: Any) -> None:
        assert logger.ready
        self._network = network

    @property
    def num_errors(self) -> int:
        return 1

    def get_error(self, index: int) -> ParserError:
        assert index == 0
        return self._fake.ParserError()

    def parse_from_file(self, model: str) -> bool:
        self._network._model = onnx.load(model)
        return True


class IOptimizationProfile(Base):
    def __init__(self) -> None:
        self._shapes: dict[str, tuple[Any, Any, Any]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002  (their names)
        self._shapes[input] = (tuple(min), tuple(opt), tuple(max))


class IBuilderConfig(Base):
    builder_optimization_level = 3
    profiling_verbosity: Any

    def __init__(self) -> None:
        object.__setattr__(self, "profiling_verbosity", self._fake.ProfilingVerbosity.LAYER_NAMES_ONLY)
        self._profiles: list[IOptimizationProfile] = []
        self._cache: Any = None

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        assert pool.name == "WORKSPACE"
        assert pool_size > 0

    def clear_flag(self, flag: Any) -> None:
        assert flag.name in RECORDED[self._fake.__version__]["BuilderFlag"]

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        for low, best, high in profile._shapes.values():
            assert all(a <= b <= c for a, b, c in zip(low, best, high, strict=True))
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return self._fake.ITimingCache(bytes(serialized_timing_cache))

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache._blob not in (b"", b"timed"):
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache:
        return self._cache


class Builder(Base):
    def __init__(self, logger: Any) -> None:
        assert logger.ready
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        typed = 1 << int(self._fake.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        if self._fake.__version__.startswith("10.") and not flags & typed:
            raise OrderError("TensorRT 10 makes a weakly typed network unless told otherwise")
        return self._fake.INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return self._fake.IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return self._fake.IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> Any:
        model = network._model
        if model is None:
            raise OrderError("the network is empty")
        dynamic = {value.name for value in model.graph.input if value.type.tensor_type.shape.dim[0].dim_param}
        if not config._profiles or any(set(one._shapes) != dynamic for one in config._profiles):
            self._logger.log(ILogger.ERROR, "Network has dynamic inputs, but no profile of them")
            return None
        if "build_serialized_network" in self._fake.fail:
            self._logger.log(ILogger.WARNING, "a tactic was skipped")
            self._logger.log(ILogger.ERROR, "Could not find any implementation for node softmax_3")
            return None
        detailed = config.profiling_verbosity.name == "DETAILED"
        head = json.dumps(
            {
                "tensorrt": self._fake.__version__,
                "detailed": detailed,
                "profiles": [one._shapes for one in config._profiles],
            }
        ).encode()
        return self._fake.IHostMemory(len(head).to_bytes(4, "little") + head + model.SerializeToString())


class EngineInspector(Base):
    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def get_engine_information(self, format: Any) -> str:  # noqa: A002
        assert format.name == "JSON"
        nodes = self._engine._model.graph.node
        layers = [
            {"Name": node.name, "LayerType": node.op_type, "TacticName": _tactic(node)} for node in nodes
        ]
        return json.dumps(
            {"Layers": layers if self._engine._detailed else [layer["Name"] for layer in layers]}
        )


class ICudaEngine(Base):
    def __init__(self, plan: bytes) -> None:
        size = int.from_bytes(plan[:4], "little")
        head = json.loads(plan[4 : 4 + size])
        self._profiles = [
            {name: [tuple(shape) for shape in shapes] for name, shapes in one.items()}
            for one in head["profiles"]
        ]
        self._detailed = head["detailed"]
        self._model = onnx.load_from_string(plan[4 + size :])
        self._session = session_of(self._model.SerializeToString())
        graph = self._model.graph
        self._inputs = {value.name: value for value in graph.input}
        self._outputs = {value.name: value for value in graph.output}

    def _rows(self, profile: int) -> int:
        return max(shapes[2][0] for shapes in self._profiles[profile].values())

    @property
    def num_io_tensors(self) -> int:
        return len(self._inputs) + len(self._outputs)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    @property
    def device_memory_size_v2(self) -> int:
        return SCRATCH_PER_ROW * max(map(self._rows, range(len(self._profiles))))

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return SCRATCH_PER_ROW * self._rows(profile_index)

    def get_tensor_name(self, index: int) -> str:
        return [*self._inputs, *self._outputs][index]

    def get_tensor_mode(self, name: str) -> Any:
        mode = self._fake.TensorIOMode
        return mode.INPUT if name in self._inputs else mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        value = (self._inputs | self._outputs)[name]
        return getattr(self._fake.DataType, _dtype_name(value))

    def create_engine_inspector(self) -> EngineInspector:
        return self._fake.EngineInspector(self)

    def create_execution_context(self, strategy: Any = None) -> Any:
        return self._fake.IExecutionContext(self, strategy)


class IExecutionContext(Base):
    def __init__(self, engine: ICudaEngine, strategy: Any) -> None:
        self._engine, self._strategy = engine, strategy
        self._scratch: tuple[int, int] | None = None
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._inferred = False

    def set_device_memory(self, memory: int, size: int) -> None:
        if memory % 256:
            raise OrderError("scratch memory must begin at a multiple of 256")
        self._scratch = (memory, size)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        self._shapes, self._inferred = {}, False
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._profile is None:
            raise OrderError("a shape was set before the profile")
        low, _, high = self._engine._profiles[self._profile][name]
        self._shapes[name] = tuple(shape)
        return len(shape) == len(low) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def infer_shapes(self) -> list[str]:
        self._inferred = True
        return sorted(set(self._engine._inputs) - set(self._shapes))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if not self._inferred:
            raise OrderError("an output's shape was asked for before shapes were inferred")
        return self._shape_of(name)

    def _shape_of(self, name: str) -> tuple[int, ...]:
        value = (self._engine._inputs | self._engine._outputs)[name]
        batch = next(iter(self._shapes.values()))[0]
        return tuple(batch if dim.dim_param else dim.dim_value for dim in value.type.tensor_type.shape.dim)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._inputs | self._engine._outputs:
            return False
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine = self._engine
        if self._profile is None or not self._inferred:
            raise OrderError("a run before profile and shapes were set")
        if self._strategy is None or self._strategy.name != "USER_MANAGED":
            raise OrderError("scratch memory was not to be shared")
        if self._scratch is None or self._scratch[1] < SCRATCH_PER_ROW * engine._rows(self._profile):
            raise OrderError("a run without enough scratch memory")
        missing = (set(engine._inputs) | set(engine._outputs)) - set(self._addresses)
        if missing:
            raise OrderError(f"a run without the addresses of {sorted(missing)}")
        if "execute_async_v3" in self._fake.fail:
            return False
        # garbage in the scratch, as another engine would leave it
        ctypes.memset(self._scratch[0], 0xFF, self._scratch[1])
        fed = {
            name: _view(self._addresses[name], self._shape_of(name), value).copy()
            for name, value in engine._inputs.items()
        }
        made = engine._session.run(list(engine._outputs), fed)
        for (name, value), array in zip(engine._outputs.items(), made, strict=True):
            _view(self._addresses[name], array.shape, value)[...] = array
        return True


class Runtime(Base):
    def __init__(self, logger: Any) -> None:
        assert logger.ready
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        plan = bytes(serialized_engine)
        size = int.from_bytes(plan[:4], "little")
        try:
            built_with = json.loads(plan[4 : 4 + size])["tensorrt"]
        except ValueError:
            built_with = "nothing"
        if built_with != self._fake.__version__:
            said = f"The engine plan file was made by {built_with}"
            self._logger.log(ILogger.ERROR, said)
            return None
        return self._fake.ICudaEngine(plan)


CLASSES = (
    Builder, ICudaEngine, IExecutionContext, IHostMemory, ILogger, IBuilderConfig, INetworkDefinition,
    IOptimizationProfile, ITimingCache, OnnxParser, ParserError, Runtime, EngineInspector,
)  # fmt: skip


def make(version: str) -> Any:
    """The module of one recorded version.

    Attributes of the result beside TensorRT's: `calls`, all calls in order; `fail`, a set of names of methods
    that shall refuse, as they do by returning None or False.
    """
    fake = SimpleNamespace(__version__=version, calls=[], fail=set())
    for name in ENUMS:
        members = {
            member: Member(member, int(what.split()[1]))
            for member, what in RECORDED[version][name].items()
            if isinstance(what, str) and what.startswith("value ")
        }
        setattr(fake, name, _Namespace(name, members))
    for one in CLASSES:
        setattr(fake, one.__name__, type(one.__name__, (one,), {"_fake": fake}))
    return fake


class _Namespace:
    def __init__(self, name: str, members: dict[str, Member]) -> None:
        self._name, self._members = name, members

    def __getattr__(self, name: str) -> Member:
        if name not in self._members:
            raise AttributeError(f"{self._name} has no {name}")
        return self._members[name]


def _checked(
    fake: Any, owner: str, name: str, signatures: list[str], method: Callable[..., Any]
) -> Callable[..., Any]:
    """The method, refusing numbers and names of arguments that no recorded signature has."""
    allowed = [_arguments(signature) for signature in signatures]

    def call(*positional: Any, **named: Any) -> Any:
        fits = [
            (names, required)
            for names, required in allowed
            if len(positional) <= len(names)
            and set(named) <= set(names[len(positional) :])
            and len(positional) + len(named) >= required
        ]
        if not fits:
            raise TypeError(f"{owner}.{name}{positional}{named}: none of {signatures}")
        fake.calls.append((f"{owner}.{name}", (*positional, *named.values())))
        if name in fake.fail and name not in ("build_serialized_network", "execute_async_v3"):
            return {"infer_shapes": ["latents"], "add_optimization_profile": -1}.get(name)
        return method(*positional, **named)

    return call


def _arguments(signature: str) -> tuple[list[str], int]:
    """Names of a recorded signature's arguments, `self` aside, and how many have no default."""
    inside = signature[signature.index("(") + 1 : signature.rindex(") ->")]
    names = re.findall(r"(?:^|, )(\w+):", inside)[1:]
    defaults = len(re.findall(r"(?:^|, )\w+: [^,]*? = ", inside))
    return names, len(names) - defaults


def _view(address: int, shape: tuple[int, ...], value: onnx.ValueInfoProto) -> Any:
    """The memory of a tensor as an array."""
    dtype = {
        "FLOAT": np.dtype(np.float32),
        "HALF": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "INT64": np.dtype(np.int64),
        "UINT8": np.dtype(np.uint8),
    }[_dtype_name(value)]
    size = int(np.prod(shape)) * dtype.itemsize
    buffer = (ctypes.c_uint8 * size).from_address(address)
    return np.frombuffer(buffer, dtype=dtype).reshape(shape)


def _dtype_name(value: onnx.ValueInfoProto) -> str:
    return NAMES[onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)]


def _tactic(node: onnx.NodeProto) -> str:
    return "_gemm_mha_v2_0x1234" if node.op_type == "Softmax" else "kgen"
