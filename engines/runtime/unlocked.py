"""Compiled CPU code through its C interface, so that Python's other threads run while it does.

torch's own loader holds the global interpreter lock from the call to the return. A batch of the engine would
then be a time in which a server's process neither keeps its leases nor packs what is finished: 2.8 s of a
compiled call let another thread run once, where this lets it run every millisecond.

The interface is that of torch/csrc/inductor/aoti_runtime/interface.h, which each package exports. Functions
return 0, or anything else for an error. A tensor crosses it as a pointer to an `at::Tensor` of its own.
"""

from __future__ import annotations

import ctypes
import tempfile
import weakref
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from ctypes import POINTER, byref, c_bool, c_char_p, c_size_t, c_void_p
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from engines.errors import BundleError

_PREFIX = "AOTInductorModelContainer"
_ARGUMENTS: Mapping[str, tuple[Any, ...]] = {
    "CreateWithDevice": (POINTER(c_void_p), c_size_t, c_char_p, c_char_p),
    "Delete": (c_void_p,),
    "GetNumConstants": (c_void_p, POINTER(c_size_t)),
    "GetConstantName": (c_void_p, c_size_t, POINTER(c_char_p)),
    "GetConstantOriginalFQN": (c_void_p, c_size_t, POINTER(c_char_p)),
    "GetNumInputs": (c_void_p, POINTER(c_size_t)),
    "GetNumOutputs": (c_void_p, POINTER(c_size_t)),
    "UpdateUserManagedConstantBufferPairs": (c_void_p, c_void_p, c_size_t, c_bool, c_bool),
    "RunSingleThreaded": (
        c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_void_p), c_size_t, c_void_p, c_void_p
    ),
}  # fmt: skip

_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = c_void_p, (ctypes.py_object, c_char_p)
_capsule_of = ctypes.pythonapi.PyCapsule_New
_capsule_of.restype, _capsule_of.argtypes = ctypes.py_object, (c_void_p, c_char_p, c_void_p)


class _NamedTensor(ctypes.Structure):
    """`AOTInductorConstantMapEntry`."""

    _fields_ = (("name", c_char_p), ("tensor", c_void_p))


class UnlockedPackage:
    """The code of one `.pt2` package for CPUs, with its constants. One thread at a time.

    Args:
        path: the package.
        constants: tensors by the names that the package has for them; used in place.

    Raises:
        BundleError: the code cannot be linked here, or needs other constants.
    """

    def __init__(self, path: Path, constants: Mapping[str, Tensor]) -> None:
        self._name = path.name
        self._library = _link(path)
        container = c_void_p()
        self._call("CreateWithDevice", byref(container), 1, b"cpu", None)
        self._container = container
        handles = _handles(list(constants.values()))
        # Whether the code makes handles of its own of these is torch's affair: they last as long as it does.
        weakref.finalize(self, _end, getattr(self._library, f"{_PREFIX}Delete"), container, handles)
        names = self._constant_names()
        if names.keys() != constants.keys():
            raise BundleError(
                f"files.engines/{self._name}", "its constants are not those of the file beside it"
            )
        pairs = (_NamedTensor * len(handles))(
            *(_NamedTensor(names[name], handle) for name, handle in zip(constants, handles, strict=True))
        )
        use_inactive, is_complete = False, True
        self._call(
            "UpdateUserManagedConstantBufferPairs", container, pairs, len(handles), use_inactive, is_complete
        )
        self._num_inputs, self._num_outputs = self._number_of("Inputs"), self._number_of("Outputs")

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the package on one batch.

        Raises:
            ValueError: it takes another number of tensors.
            RuntimeError: it failed; says what the code says.
        """
        if len(inputs) != self._num_inputs:
            raise ValueError(f"{self._name} takes {self._num_inputs} tensors, not {len(inputs)}")
        taken = (c_void_p * len(inputs))(*_handles(inputs))  # the callee frees them
        given = (c_void_p * self._num_outputs)()
        self._call(
            "RunSingleThreaded", self._container, taken, len(inputs), given, self._num_outputs, None, None
        )
        return tuple(_tensors(list(given)))

    def _constant_names(self) -> dict[str, bytes]:
        """What the code calls each constant, by the name that it had before compilation."""
        name, original = c_char_p(), c_char_p()
        names: dict[str, bytes] = {}
        for index in range(self._number_of("Constants")):
            self._call("GetConstantName", self._container, index, byref(name))
            self._call("GetConstantOriginalFQN", self._container, index, byref(original))
            names[(original.value or b"").decode()] = name.value or b""
        return names

    def _number_of(self, what: str) -> int:
        number = c_size_t()
        self._call(f"GetNum{what}", self._container, byref(number))
        return number.value

    def _call(self, function: str, *arguments: object) -> None:
        if getattr(self._library, f"{_PREFIX}{function}")(*arguments):
            raise RuntimeError(f"{self._name}: {function}: {_last_error(self._library)}")


def can_unlock(path: Path) -> bool:
    """Whether a package is one that `UnlockedPackage` can run: it calls no operators of Python's, and is of a
    torch that has the whole interface.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            libraries = [name for name in names if name.endswith(".so")]
            if len(libraries) != 1 or any("extern" in PurePosixPath(name).name for name in names):
                return False
            return f"{_PREFIX}UpdateUserManagedConstantBufferPairs".encode() in archive.read(libraries[0])
    except (OSError, zipfile.BadZipFile):
        return False  # torch's loader says what is wrong with it


def not_loaded(path: Path, error: Exception) -> BundleError:
    """What is said of a package whose code cannot be loaded."""
    why = str(error).splitlines()[0]
    if "failed to map segment" in why:  # the loader's words for a file that must not be executed
        why += " (code is unpacked where temporary files are: a place mounted noexec? TMPDIR names another)"
    return BundleError(f"files.engines/{path.name}", f"cannot be loaded: {why}")


def _link(path: Path) -> ctypes.CDLL:
    """The code of a package; its file is gone once it is mapped."""
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory(prefix="tdm-engine-") as folder:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        try:
            library = ctypes.CDLL(archive.extract(name, folder))
        except OSError as error:
            raise not_loaded(path, error) from None
    for function, arguments in _ARGUMENTS.items():
        getattr(library, f"{_PREFIX}{function}").argtypes = arguments
    return library


def _end(delete: Any, container: c_void_p, handles: Sequence[int]) -> None:
    delete(container)
    _tensors(handles)  # and drop them


def _handles(tensors: Sequence[Tensor]) -> list[int]:
    """A pointer for each tensor, to an `at::Tensor` that shares its memory; whoever gets it owns it."""
    capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))
    return [_pointer_of(capsule, None) for capsule in capsules]


def _tensors(handles: Iterable[int | None]) -> list[Tensor]:
    """The opposite of `_handles`; the pointers are no longer good then."""
    capsules = [_capsule_of(handle, None, None) for handle in handles]
    tensors: list[Tensor] = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(capsules)
    return tensors


def _last_error(library: ctypes.CDLL) -> str:
    """What the code says of the call that failed, if it is of a torch that lets it."""
    message = c_char_p()
    if not hasattr(library, "AOTInductorGetLastError") or library.AOTInductorGetLastError(byref(message)):
        return "failed"
    return (message.value or b"failed").decode(errors="replace")
