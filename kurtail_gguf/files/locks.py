"""An exclusive lock on an open file or directory, which the system gives back however its process ends."""

from __future__ import annotations

import os
import sys
import time

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

#: Where Windows locks one byte: behind everything that is in a lock's file, because nobody else may read what is locked.
_BYTE = 1 << 30
#: Seconds between two tries of a lock that is waited for.
_PAUSE = 0.1


def lock(descriptor: int, wait: bool = True) -> None:
    """Have the lock of an open file until it is closed.

    Args:
        descriptor: of the file; of a directory on systems that open them.
        wait: for another process that has it.

    Raises:
        BlockingIOError: another process has it, and ``wait`` is false.
        OSError: the file system has no locks.
    """
    if sys.platform != "win32":
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return
    position = os.lseek(descriptor, 0, os.SEEK_CUR)
    try:
        while True:
            os.lseek(descriptor, _BYTE, os.SEEK_SET)
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
                return
            except PermissionError as error:
                if not wait:
                    raise BlockingIOError(error.errno, error.strerror) from None
            time.sleep(_PAUSE)
    finally:
        os.lseek(descriptor, position, os.SEEK_SET)
