"""Files that survive a crash: written beside, flushed, put in place in one step, and checked when they are read.

A checkpoint is an ordinary file of `torch.save` that every reader of such files takes: a zip archive with a CRC-32 of
each tensor, which torch itself does not compare. Reading is weights-only: tensors, numbers, text, containers of these
and the `argparse.Namespace` of a run; never code.
"""
import argparse
import errno
import os
import pickle
import shutil
import tempfile
import zipfile
from contextlib import contextmanager
from typing import Any, BinaryIO, Dict, Iterator, Optional, Tuple, cast

import torch

from ..errors import UsageError
from ..utils.text import printable

__all__ = [
    'DISK_FULL', 'DamagedFileError', 'check_file', 'check_folder', 'checkpoint_size', 'describe_space', 'flush',
    'put_in_place', 'read_checkpoint', 'read_metadata', 'respect_umask', 'verify', 'why_unwritten', 'write_checkpoint',
    'write_text', 'written_at_once',
]

_DIRECTORY = 0x10  # the attribute by which zip archives tell folders from files
_MAX_LISTED = 8
DISK_FULL = {errno.ENOSPC, getattr(errno, 'EDQUOT', errno.ENOSPC)}


class DamagedFileError(UsageError):
    """A file that cannot be what was written: truncated, changed, or not a checkpoint at all."""


class _WatchedFile:
    """A file that torch.save writes into; keeps the error, which torch reports in its own words."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.error: Optional[OSError] = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as e:
            self.error = e
            raise

    def flush(self) -> None:
        self.file.flush()


def flush(path: str) -> None:
    """Make a file's content, or a folder's list of names, survive a power failure."""
    flags = os.O_RDONLY if os.path.isdir(path) else os.O_RDWR
    try:
        handle = os.open(path, flags)
    except PermissionError:  # Windows cannot open folders, and needs no flush of them
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def respect_umask(path: str) -> None:
    """Give a file the permissions that `open` would: writers that go through temporary files leave it to the owner."""
    mask = os.umask(0o077)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def put_in_place(source: str, target: str) -> None:
    """Give a flushed file its final name in one step."""
    os.replace(source, target)
    flush(os.path.dirname(target) or '.')


def write_checkpoint(state: Dict[str, Any], path: str) -> None:
    """Write a checkpoint and flush it; nothing stays behind where that fails.

    Raises:
        OSError: As the file system gave it, for example that no space is left.
    """
    try:
        with open(path, 'wb') as file:
            _write(state, file)
        flush(path)
    except BaseException:  # an interrupt too
        if os.path.exists(path):
            os.remove(path)
        raise


def _write(state: Dict[str, Any], file: BinaryIO) -> None:
    target = _WatchedFile(file)
    try:
        torch.save(state, cast(BinaryIO, target))
    except RuntimeError:
        if target.error is not None:
            raise target.error from None
        raise


@contextmanager
def written_at_once(path: str) -> Iterator[str]:
    """Give the name to write a file under: it becomes `path` where the block ends well, and is removed where not.

    What is no file of its own (a link, a device, a pipe) is written in place.
    """
    if os.path.islink(path) or os.path.exists(path) and not os.path.isfile(path):
        yield path
        return
    temporary = path + '.tmp'
    try:
        yield temporary
        flush(temporary)
        put_in_place(temporary, path)
    except BaseException:  # an interrupt too
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def write_text(text: str, path: str) -> None:
    """Write a small text file in one step, newlines as they are."""
    with written_at_once(path) as name, open(name, 'w', newline='') as file:
        file.write(text)


class _Counter:
    """A file that keeps nothing but its length."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: Any) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        pass


def checkpoint_size(state: Dict[str, Any]) -> int:
    """Return how many bytes `write_checkpoint` needs."""
    counter = _Counter()
    torch.save(state, cast(BinaryIO, counter))
    return counter.size


def why_unwritten(error: BaseException) -> str:
    """Return why a file was not written, with its name where the system gave it, in one line."""
    if not isinstance(error, OSError):
        return ' '.join(str(error).split())
    return f'{error.strerror or error}' + (f': {error.filename}' if error.filename else '')


def describe_space(folder: str, needed: int = 0) -> str:
    """Return where the space of a run's folder went: what is free, what is needed, and its largest files."""
    if not os.path.isdir(folder):
        return f'The folder {folder} is gone.'
    usage = shutil.disk_usage(folder)
    sizes: Dict[Any, Tuple[int, str]] = {}
    for name in sorted(os.listdir(folder)):
        stat = os.stat(os.path.join(folder, name), follow_symlinks=False)
        # names of the same file take its space once
        sizes.setdefault(stat.st_ino or name, (stat.st_size, name))
    largest = sorted(sizes.values(), reverse=True)[:_MAX_LISTED]
    need = f', a checkpoint takes {_with_unit(needed)}' if needed else ''
    files = ', '.join(f'{name} {_with_unit(size)}' for size, name in largest) or 'nothing'
    return (
        f'{_with_unit(usage.free)} of {_with_unit(usage.total)} are free{need}; of that {folder} takes '
        f'{_with_unit(sum(size for size, _ in sizes.values()))}: {files}.')


def _with_unit(size: float) -> str:
    for unit in ('B', 'KB', 'MB'):
        if size < 1000:
            return f'{size:.3g} {unit}'
        size /= 1000
    return f'{size:.4g} GB'


def check_folder(path: str, flag: str) -> None:
    """Find out whether files can be written to a folder, or it can be made; nothing is left behind.

    Raises:
        UsageError: If it cannot; names the path, the reason and the flag.
    """
    existing = os.path.abspath(path)
    try:
        while not _exists(existing):
            existing = os.path.dirname(existing)
        with tempfile.TemporaryFile(dir=existing):
            pass
    except (OSError, ValueError) as e:  # ValueError: a name that holds NUL
        reason = f'{existing} is a file' if os.path.isfile(existing) else getattr(e, 'strerror', None) or str(e)
        raise UsageError(f'{flag} {path!r} cannot be written: {reason}. Give another folder.') from e


def check_file(path: str, flag: str) -> None:
    """Find out whether a file can be written, as `check_folder`; its folder has to exist.

    Raises:
        UsageError: If it cannot.
    """
    folder = os.path.dirname(path) or '.'
    try:
        _exists(path + '.tmp')  # the longest name that is written
    except (OSError, ValueError) as e:  # ValueError: a name that holds NUL
        reason = getattr(e, 'strerror', None) or str(e)
        raise UsageError(f'{flag} {path!r} cannot be written: {reason}. Give another file.') from e
    if os.path.isdir(path) or not os.path.isdir(folder):
        reason = 'it is a folder' if os.path.isdir(path) else f'there is no folder {folder}'
        raise UsageError(f'{flag} {path!r} cannot be written: {reason}. Give a file in an existing folder.')
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise UsageError(f'{flag} {path!r} cannot be written: no permission. Give another file.')
    check_folder(folder, flag)


def _exists(path: str) -> bool:
    """As `os.path.exists`, but errors other than a missing name (one too long, no permission) are raised."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def verify(path: str) -> None:
    """Compare the tensors of a checkpoint with their checksums; files that have none pass.

    Raises:
        DamagedFileError: If the content is not what was written.
    """
    if not zipfile.is_zipfile(path):  # a part of a checkpoint or another format: torch tells which when it reads it
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = _is_damaged(archive)
    except PermissionError:
        raise
    except Exception as e:  # the archive's own tables fail with anything from BadZipFile to struct.error
        raise DamagedFileError(f'{path!r} is damaged: {e}.') from e
    if damaged:
        raise DamagedFileError(
            f'{path!r} is damaged: its content does not have the checksum that was written with it.')


def _is_damaged(archive: zipfile.ZipFile) -> bool:
    entries = archive.infolist()
    if any(entry.external_attr & _DIRECTORY for entry in entries):
        return True  # torch reads such a tensor as whatever the memory held
    has_checksums = any(entry.CRC for entry in entries)  # torch.serialization.set_crc32_options(False) leaves them out
    return has_checksums and archive.testzip() is not None


def read_checkpoint(path: str, flag: str = '--resume') -> Dict[str, Any]:
    """Read a checkpoint, tensors to the CPU, checked against their checksums, without ever running code from it.

    Args:
        path: A file written by torch.save that holds a dict.
        flag: The flag that named the file, for error messages.

    Raises:
        UsageError: The file is missing, not readable, or holds something else.
        DamagedFileError: It is truncated or changed.
    """
    return _load(path, flag, check=True)


def read_metadata(path: str) -> Dict[str, Any]:
    """Read a checkpoint for its numbers and flags: tensors stay on disk and are not checked.

    Raises:
        UsageError: As `read_checkpoint`.
    """
    return _load(path, '--resume', check=False, mmap=printable(path) == path)  # torch maps no other names


def _load(path: str, flag: str, check: bool, **kwargs: Any) -> Dict[str, Any]:
    if not os.path.isfile(path):
        raise UsageError(f'No checkpoint file at {path!r}, check {flag}.')
    try:
        if check:
            verify(path)
        # timm's checkpoints hold the flags of their run as a Namespace
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True, **kwargs)
    except DamagedFileError as e:
        raise DamagedFileError(f'{e} Check {flag}.') from e
    except PermissionError as e:
        raise UsageError(f'No permission to read {path!r}, check {flag}.') from e
    except Exception as e:  # damaged files fail with anything from EOFError to UnicodeDecodeError
        unsafe = _unsafe_objects(path)
        if unsafe:
            raise UsageError(
                f'{path!r} is refused: it holds objects that only unsafe loading accepts, which can run '
                f'code: {unsafe}. Check {flag}.') from e
        raise DamagedFileError(
            f'Cannot read {path!r} as a checkpoint (it is truncated, corrupt or of another format), '
            f'check {flag}.') from e
    if not isinstance(checkpoint, dict):
        raise UsageError(f'{path!r} holds a {type(checkpoint).__name__} and not a checkpoint, check {flag}.')
    return checkpoint


def _unsafe_objects(path: str) -> str:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return ', '.join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
    except (EOFError, LookupError, OSError, RuntimeError, ValueError, pickle.UnpicklingError):  # damaged
        return ''
