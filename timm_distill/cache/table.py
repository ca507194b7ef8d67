"""Rows by number on disk: append-only shards of checksummed rows, and an index that says where each row lies.

A shard is written by one process and never changed. The index is a hint that can be built again: what it points to
counts only where number and checksum of the row are right. Files are read at a position, not mapped: a file that a full
disk or another process cuts short would end a process that has mapped it, and memory stays what it is either way.
"""
import json
import logging
import os
import tempfile
import zlib
from typing import Any, BinaryIO, Dict, List, Optional, Tuple

import numpy as np

from ..checkpoint.file import write_text
from ..errors import UsageError

_logger = logging.getLogger(__name__)

_MAGIC = b'timm_distill rows 1\n'
_PREAMBLE = 128
_SHARD_BYTES = 256 << 20
_FLUSH_BYTES = 64 << 20
_ROW_BITS = 32
_BLOCK = 1 << 20  # entries of the index that are looked at together
_OVERHEAD = 12  # bytes of a row beside its content: its number and a CRC-32 of both
_SUFFIX = '.rows'


class DamagedRowsError(UsageError):
    """Rows that are not what was written, in a cache that cannot be written to."""


def table_bytes(num_slots: int, row_bytes: int) -> int:
    """Return the size of a full table on disk, index included."""
    return num_slots * (row_bytes + _OVERHEAD + 8)


class Table:
    """Rows of one length, by number.

    Several processes may write to a table at once, each into shards of its own. A row that two of them write is there
    twice and counts once.

    Args:
        folder: Where it lies; made if `writable`.
        row_bytes: Length of a row.
        num_slots: Rows of a full table.
        writable: Whether rows may be added and damaged shards removed.
    """

    def __init__(self, folder: str, row_bytes: int, num_slots: int, writable: bool = True):
        self.folder = folder
        self.row_bytes = row_bytes
        self.num_slots = num_slots
        self.writable = writable
        self._stride = row_bytes + _OVERHEAD
        self._head = (_MAGIC + f'{row_bytes} {num_slots}\n'.encode()).ljust(_PREAMBLE, b'\0')
        self._files: Dict[int, BinaryIO] = {}
        self._own: Optional[BinaryIO] = None  # the shard that this process writes
        self._own_number = self._own_rows = self._unflushed = 0
        self._temporary: Any = None
        if writable:
            os.makedirs(folder, exist_ok=True)
        self._index = self._open_index()
        self._update_index()

    def contains(self, slots: Any) -> np.ndarray:
        """Return which rows the index knows, bool [N]; no row is looked at."""
        return np.array([self._entry(slot) != 0 for slot in slots], dtype=bool)

    def missing(self, start: int = 0, stop: Optional[int] = None) -> np.ndarray:
        """Return the numbers of the rows that the index does not know, in order, of those from `start` below `stop`."""
        found = [
            block_start + np.flatnonzero(block == 0)
            for block_start, block in self._blocks(start, self.num_slots if stop is None else stop)]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def count(self) -> int:
        """Return how many rows there are."""
        return sum(int(np.count_nonzero(block)) for _, block in self._blocks(0, self.num_slots))

    def read(self, slots: Any) -> Tuple[np.ndarray, np.ndarray]:
        """Return rows, uint8 [N, row_bytes], and which of them are there, bool [N].

        Raises:
            DamagedRowsError: If a row is damaged and its shard cannot be dropped.
        """
        rows = np.zeros((len(slots), self.row_bytes), np.uint8)
        found = np.zeros(len(slots), bool)
        for i, slot in enumerate(slots):
            data = self._read_row(int(slot))
            if data is not None:
                rows[i], found[i] = np.frombuffer(data, np.uint8), True
        return rows, found

    def write(self, slots: Any, rows: np.ndarray) -> None:
        """Append rows, uint8 [N, row_bytes].

        Raises:
            OSError: As the file system gave it; what was complete before stays.
        """
        assert self.writable
        if self._own is None or self._own_rows * self._stride >= _SHARD_BYTES:
            self._begin_shard()
        assert self._own is not None
        parts: List[bytes] = []
        for slot, row in zip(slots, rows):
            body = int(slot).to_bytes(8, 'little') + row.tobytes()
            parts += [body, zlib.crc32(body).to_bytes(4, 'little')]
        data = b''.join(parts)
        try:
            _write_all(self._own, data)
        except OSError:
            self._own.close()
            self._own = None  # its last row is cut short
            raise
        for i, slot in enumerate(slots):
            self._set_entry(int(slot), (self._own_number << _ROW_BITS) + self._own_rows + i + 1)
        self._own_rows += len(slots)
        self._unflushed += len(data)
        if self._unflushed >= _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Make what was written survive a power failure."""
        if self._own is not None:
            os.fsync(self._own.fileno())
        self._unflushed = 0
        self._note_rows()

    def close(self) -> None:
        """Flush, note what the index knows and close all files."""
        if self.writable and not self._index.closed:
            self.flush()
        for file in (*self._files.values(), self._index, *([self._own] if self._own else [])):
            file.close()
        self._files.clear()
        self._own = None

    def shards(self) -> List[int]:
        """Return the numbers of all shards."""
        if not os.path.isdir(self.folder):
            return []
        names = [name for name in os.listdir(self.folder) if name.endswith(_SUFFIX)]
        return sorted(int(name[:-len(_SUFFIX)]) for name in names if name[:-len(_SUFFIX)].isdecimal())

    def verify(self) -> Tuple[int, List[str]]:
        """Read every row of every shard; returns how many are right, and the shards that hold others."""
        right, damaged = 0, []
        for number in self.shards():
            bad, rows = 0, self._rows_of(number)
            with open(self._path(number), 'rb') as file:
                bad += file.read(_PREAMBLE) != self._head
                for _ in range(rows):
                    body = file.read(self._stride)
                    bad += zlib.crc32(body[:-4]) != int.from_bytes(body[-4:], 'little')
            right += rows - min(rows, bad)
            damaged += [self._path(number)] if bad else []
        return right, damaged

    def copy_from(self, other: 'Table') -> int:
        """Add the rows of another table that this one lacks; returns how many."""
        added = 0
        for start, block in other._blocks(0, other.num_slots):
            slots = start + np.flatnonzero(block)
            for part in np.array_split(slots, max(1, len(slots) // 4096)):
                part = part[~self.contains(part)]
                rows, found = other.read(part)
                if found.any():
                    self.write(part[found], rows[found])
                    added += int(found.sum())
        return added

    def drop(self, number: int) -> None:
        """Take a damaged shard out of the table.

        Raises:
            DamagedRowsError: If the cache cannot be written to.
        """
        path = self._path(number)
        if not self.writable:
            raise DamagedRowsError(
                f'{path} of --teacher-cache is damaged. `python -m timm_distill.cache verify --drop` takes it out '
                'where the folder can be written, and a run with --teacher fills it again.')
        if number in self._files:
            self._files.pop(number).close()
        if os.path.exists(path):
            os.replace(path, f'{path}.damaged')
        lost = self._forget_rows(number, 0)
        _logger.warning(
            f'{path} is damaged and was taken out of the cache (it is {path}.damaged now): {lost} rows are filled '
            'again when their turn comes.')

    def _read_row(self, slot: int) -> Optional[bytes]:
        entry = self._entry(slot)
        if not entry:
            return None
        number, row = (entry - 1) >> _ROW_BITS, (entry - 1) & ((1 << _ROW_BITS) - 1)
        file = self._open_shard(number)
        if file is None:
            self._forget(slot)
            return None
        file.seek(_PREAMBLE + row * self._stride)
        body = file.read(self._stride)
        if len(body) < self._stride:  # lost with the power: the index was flushed, the row was not
            self._forget(slot)
            return None
        whole = zlib.crc32(body[:-4]) == int.from_bytes(body[-4:], 'little')
        if not whole or int.from_bytes(body[:8], 'little') != slot:
            self.drop(number)
            return None
        return body[8:-4]

    def _forget_rows(self, number: int, start: int) -> int:
        """Take the rows of a shard from `start` on out of the index; returns how many."""
        lost, first = 0, (number << _ROW_BITS) + start + 1
        for block_start, block in self._blocks(0, self.num_slots):
            places = block_start + np.flatnonzero((block >= first) & (block < (number + 1) << _ROW_BITS))
            for slot in places:
                self._set_entry(int(slot), 0)
            lost += len(places)
        return lost

    def _forget(self, slot: int) -> None:
        if self.writable:
            self._set_entry(slot, 0)

    def _path(self, number: int) -> str:
        return os.path.join(self.folder, f'{number:06d}{_SUFFIX}')

    def _open_shard(self, number: int) -> Optional[BinaryIO]:
        if number not in self._files:
            try:
                file: BinaryIO = open(self._path(number), 'rb', buffering=0)
            except FileNotFoundError:
                return None
            if file.read(_PREAMBLE) != self._head:
                file.close()
                self.drop(number)
                return None
            self._files[number] = file
        return self._files[number]

    def _rows_of(self, number: int) -> int:
        try:
            size = os.path.getsize(self._path(number))
        except FileNotFoundError:
            return 0
        return max(0, size - _PREAMBLE) // self._stride

    def _begin_shard(self) -> None:
        if self._own is not None:
            self.flush()
            self._own.close()
        number = max([0, *self.shards()])
        while True:
            number += 1
            try:
                self._own = open(self._path(number), 'xb', buffering=0)
                break
            except FileExistsError:  # of another process
                continue
        assert self._own is not None
        self._own_number, self._own_rows = number, 0
        self._own.write(self._head)

    def _open_index(self) -> Any:
        path = os.path.join(self.folder, 'index.bin')
        if self.writable:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if not os.path.exists(os.path.join(self.folder, 'index.json')):
                os.ftruncate(handle, 0)  # nothing says what is in it: built again
            if os.fstat(handle).st_size < 8 * self.num_slots:
                os.ftruncate(handle, 8 * self.num_slots)
            return os.fdopen(handle, 'r+b', buffering=0)
        if self._is_indexed() and os.path.exists(path):
            return open(path, 'rb', buffering=0)
        self._temporary = tempfile.TemporaryFile(buffering=0)
        self._temporary.truncate(8 * self.num_slots)
        return self._temporary

    def _note_rows(self) -> None:
        """Write down how many rows of each shard are in the index."""
        os.fsync(self._index.fileno())
        counted = {str(number): self._rows_of(number) for number in self.shards()}
        path = os.path.join(self.folder, f'index-{os.getpid()}.json')
        write_text(json.dumps(counted), path)
        os.replace(path, os.path.join(self.folder, 'index.json'))

    def _counted(self) -> Dict[int, int]:
        try:
            with open(os.path.join(self.folder, 'index.json')) as file:
                return {int(number): int(rows) for number, rows in json.load(file).items()}
        except (OSError, ValueError, AttributeError):
            return {}

    def _is_indexed(self) -> bool:
        counted = self._counted()
        return all(self._rows_of(number) == counted.get(number, 0) for number in {*self.shards(), *counted})

    def _update_index(self) -> None:
        """Find the rows that no process has noted in the index."""
        if not self.writable and self._temporary is None:
            return
        counted = {} if self._temporary is not None else self._counted()
        for number, rows in counted.items():
            if self._rows_of(number) < rows:  # cut short since then, or gone
                self._forget_rows(number, self._rows_of(number))
        for number in self.shards():
            for row in range(counted.get(number, 0), self._rows_of(number)):
                file = self._open_shard(number)
                if file is None:
                    break
                file.seek(_PREAMBLE + row * self._stride)
                slot = int.from_bytes(file.read(8), 'little')
                if slot < self.num_slots and not self._entry(slot):
                    self._set_entry(slot, (number << _ROW_BITS) + row + 1)

    def _entry(self, slot: int) -> int:
        self._index.seek(8 * slot)
        return int.from_bytes(self._index.read(8), 'little')

    def _set_entry(self, slot: int, entry: int) -> None:
        self._index.seek(8 * slot)
        self._index.write(entry.to_bytes(8, 'little'))

    def _blocks(self, start: int, stop: int) -> Any:
        """Yield first slot and entries of parts of the index."""
        for first in range(start, stop, _BLOCK):
            self._index.seek(8 * first)
            yield first, np.frombuffer(self._index.read(8 * min(_BLOCK, stop - first)), '<i8')


def _write_all(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view):]
