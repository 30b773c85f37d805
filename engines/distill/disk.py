"""Writing where there may be no room: what was asked for, what was free, what is still there."""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from engines.errors import TrainingError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NUMBER = re.compile(r"(?:os error |Errno )(\d+)")


@contextlib.contextmanager
def room_for(path: Path, num_bytes: int, kept: str) -> Iterator[None]:
    """Turn a full disk, an exhausted quota or a file size limit into an error that says what is needed.

    Args:
        path: file or directory that is written.
        num_bytes: roughly how large it gets.
        kept: what the user still has.
    Raises:
        TrainingError: there is no room.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _is_full(error):
            raise
        free = shutil.disk_usage(_existing(path)).free
        raise TrainingError(
            f"{path}: no room to write {num_bytes} bytes ({free} are free): {error}. {kept}; make room and "
            "run the same command again"
        ) from None


def _is_full(error: OSError | SafetensorError) -> bool:
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    # safetensors and shutil.copytree keep the number in their text alone
    return any(int(number) in _FULL for number in _NUMBER.findall(str(error)))


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
