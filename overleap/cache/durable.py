"""Files that a kill, a power cut or another process cannot leave half written.

Functions over paths; nothing here knows what the files hold. Read next: store.py.
"""

import os
import stat
import sys
from pathlib import Path

from overleap.cache.unit import Unsound

READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def own(folder: Path, mark: str) -> None:
    """Make the folder, or make sure that it is ours alone and holds nothing else.

    mark  a file that a folder of ours has, if it has any
    """
    if sys.platform == "win32":
        raise OSError("this system has no file locks of the kind that is needed")
    try:
        os.makedirs(folder, mode=0o700)
        return
    except FileExistsError:
        pass
    found = os.stat(folder)
    if found.st_uid != os.geteuid():
        raise PermissionError(f"it belongs to the user {found.st_uid}")
    names = os.listdir(folder)
    if names and mark not in names:
        raise FileExistsError("it holds other things")
    if stat.S_IMODE(found.st_mode) & 0o077:
        os.chmod(folder, 0o700)


def take(lock: int, *, alone: bool) -> bool:
    """Take the lock, alone or with others; False where another process has it otherwise."""
    import fcntl

    try:
        fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def read(path: str, size: int) -> bytearray:
    """A file of exactly this size. Raises Unsound for another, before any memory is taken."""
    handle = os.open(path, READ)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            raise Unsound(f"has {found.st_size} bytes, not {size}")
        data = bytearray(size)
        left = memoryview(data)
        while left and (count := os.readv(handle, [left])):
            left = left[count:]
        if left:
            raise Unsound("became shorter while it was read")
        return data
    finally:
        os.close(handle)


def write_new(path: str, data: bytes | bytearray) -> None:
    """A new file, on the disk when this returns."""
    handle = os.open(path, _NEW, 0o600)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(handle, left) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
