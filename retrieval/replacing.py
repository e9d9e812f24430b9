"""Putting a complete folder in the place of another one, so that a reader finds one of the two at every moment."""

import ctypes
import errno
import os
import re
import shutil
import sys
from pathlib import Path

# Values of the system calls `renameat2` (Linux) and `renamex_np` (macOS).
_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2


def partial_path(path: Path) -> Path:
    """The folder beside `path` in which this process prepares what `path` will be."""
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def replace_folder(new: Path, path: Path) -> None:
    """Rename the folder `new` to `path`, and delete the folder that was there, if any.

    Where the system can exchange two names at once, a process that is killed in between leaves the old or the new
    folder at `path`. Elsewhere it may leave the old one under another name, where `find_folder` finds it.
    """
    if not path.exists() or not any(path.iterdir()):
        os.replace(new, path)
    elif _exchange(new, path):
        shutil.rmtree(new, ignore_errors=True)
    else:
        old = path.with_name(f".{path.name}.old-{os.getpid()}")
        os.replace(path, old)
        os.replace(new, path)
        shutil.rmtree(old, ignore_errors=True)


def find_folder(path: Path) -> Path:
    """`path`, or the earlier folder if a process was killed while it replaced it."""
    if not path.exists():
        for old in _beside(path, "old"):
            return old
    return path


def clean_up(path: Path) -> None:
    """Remove what killed processes have left beside `path`, and put back a folder that they were replacing."""
    for old in _beside(path, "old"):
        if not path.exists():
            os.replace(old, path)
        elif not _is_running(old):
            shutil.rmtree(old, ignore_errors=True)
    for partial in _beside(path, "partial"):
        if not _is_running(partial):
            shutil.rmtree(partial, ignore_errors=True)


def _beside(path: Path, kind: str) -> list[Path]:
    if not path.parent.is_dir():
        return []
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{kind}-\d+")
    return [path.parent / name for name in sorted(os.listdir(path.parent)) if pattern.fullmatch(name)]


def _is_running(path: Path) -> bool:
    """Whether the process that a folder is named after is another one that still runs."""
    number = int(path.name.rpartition("-")[2])
    if number == os.getpid():
        return False
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two folders in one step; False if the system or the file system cannot."""
    names = os.fsencode(first), os.fsencode(second)
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            failed = library.renamex_np(*names, _RENAME_SWAP)
        else:
            failed = library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    except (OSError, TypeError, AttributeError):  # no such library or function
        return False
    if failed and ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV, errno.EPERM):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(second))
    return not failed
