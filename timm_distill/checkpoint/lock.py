"""A lock on a run's folder, so that no two runs write there at once.

The lock is the system's (flock) on a file in the folder that stays there: it ends with the process that holds it,
however that ends. The file says who holds it.
"""
import json
import logging
import os
import socket
import sys
import weakref
from datetime import datetime
from typing import Any, Dict, Optional

from ..errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_logger = logging.getLogger(__name__)

__all__ = ['LOCK_NAME', 'FolderLock']

LOCK_NAME = '.lock'


class FolderLock:
    """Holds a folder while it is entered, from `acquire` on. Where the file system knows no locks it warns.

    Args:
        enabled: Do anything at all: of several ranks only the first one locks.
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self.folder = ''
        self._file: Optional[int] = None
        _LOCKS.add(self)

    def __enter__(self) -> 'FolderLock':
        return self

    def __exit__(self, *error: Any) -> None:
        self.release()

    def acquire(self, folder: str) -> None:
        """Lock a folder, which has to exist, and let go of the one before.

        Raises:
            UsageError: If another process holds it; names that process.
        """
        folder = os.path.realpath(folder)
        if not self.enabled or folder == self.folder:
            return
        self.release()
        self.folder = folder
        path = os.path.join(folder, LOCK_NAME)
        try:
            self._file = _open_locked(path)
        except BlockingIOError as e:
            self.folder = ''
            raise UsageError(
                f'The folder {folder!r} is in use by {_describe_holder(path)}: wait for that run or '
                'stop it, or give another --experiment.') from e
        except OSError as e:
            _logger.warning(
                f'{folder!r} cannot be locked ({e.strerror or e}): take care that no second run writes '
                'there.')
            return
        _write_holder(self._file)

    def release(self) -> None:
        """Let go of the folder; the lock's file stays, since another process may be waiting for it."""
        self.folder = ''
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # for the copy of a process that was forked just now, too
        self._close()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)


def _open_locked(path: str) -> int:
    if fcntl is None:
        raise OSError('this system has no flock')
    file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, 'O_CLOEXEC', 0), 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(file)
        raise
    return file


def _write_holder(file: int) -> None:
    holder: Dict[str, Any] = {
        'pid': os.getpid(),
        'host': socket.gethostname(),
        'since': datetime.now().isoformat(' ', 'seconds'),
        'command': os.path.basename(sys.argv[0]),
    }
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(holder).encode(), 0)
    except OSError:  # a full disk: the lock holds without a name
        pass


def _describe_holder(path: str) -> str:
    try:
        with open(path, encoding='utf-8') as file:
            holder = json.load(file)
        return f"process {holder['pid']} on {holder['host']} ({holder['command']}, since {holder['since']})"
    except (OSError, ValueError, LookupError, TypeError):  # it is being written
        return 'another process'


_LOCKS: 'weakref.WeakSet[FolderLock]' = weakref.WeakSet()


def _let_go() -> None:
    """Close the copies in a forked loader process, which may outlive its parent and must not keep what it locked."""
    for lock in _LOCKS:
        lock._close()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_let_go)
