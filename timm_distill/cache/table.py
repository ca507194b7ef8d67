"""Rows on disk, by number: append-only shards of checksummed rows, and an index that says where each row lies.

A shard is written by one process and never changed.
"""
import logging
import os
from typing import Any, BinaryIO, Dict, Iterator, List, Optional, Tuple

import numpy as np

from ..errors import UsageError
from .index import Index, from_entry, to_entry
from .shards import OVERHEAD, PREAMBLE, DamagedShardError, Shards, is_whole, pack_rows

_logger = logging.getLogger(__name__)

_SHARD_BYTES = 256 << 20
_FLUSH_BYTES = 64 << 20


class DamagedRowsError(UsageError):
    """Rows that are not what was written, in a cache that cannot be written to."""


def table_bytes(num_slots: int, row_bytes: int) -> int:
    """Return the size of a full table on disk, index included."""
    return num_slots * (row_bytes + OVERHEAD + 8)


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
        self._shards = Shards(folder, row_bytes, num_slots)
        self._own: Optional[BinaryIO] = None  # the shard that this process writes
        self._own_number = self._own_rows = self._unflushed = 0
        if writable:
            os.makedirs(folder, exist_ok=True)
        self._index = Index(folder, num_slots, writable, self._count_rows())
        self._update_index()

    def contains(self, slots: Any) -> np.ndarray:
        """Return which rows the index knows, bool [N]; no row is looked at."""
        return np.array([self._index.get(int(slot)) != 0 for slot in slots], dtype=bool)

    def missing(self, start: int = 0, stop: Optional[int] = None) -> np.ndarray:
        """Return the numbers of the rows that the index does not know, in order, of those from `start` below `stop`."""
        return np.concatenate([np.zeros(0, np.int64), *self.iter_missing(start, stop)])

    def iter_missing(self, start: int = 0, stop: Optional[int] = None) -> Iterator[np.ndarray]:
        """Yield what `missing` returns in parts, as a cache may have more rows than memory holds numbers."""
        for first, block in self._index.blocks(start, stop):
            yield first + np.flatnonzero(block == 0)

    def count(self) -> int:
        """Return how many rows there are."""
        return sum(int(np.count_nonzero(block)) for _, block in self._index.blocks())

    def read(self, slots: Any) -> Tuple[np.ndarray, np.ndarray]:
        """Return rows, uint8 [N, row_bytes], and which of them are there, bool [N].

        Raises:
            DamagedRowsError: If a row is damaged and its shard cannot be dropped.
        """
        packed = np.zeros((len(slots), self.row_bytes + OVERHEAD), np.uint8)
        found = np.zeros(len(slots), bool)
        for i, slot in enumerate(slots):
            found[i] = self._read_row(int(slot), packed[i])
            if not found[i]:
                packed[i] = 0
        return packed[:, 8:-4], found

    def write(self, slots: Any, rows: np.ndarray) -> None:
        """Append rows, uint8 [N, row_bytes].

        Raises:
            OSError: As the file system gave it; what was complete before stays.
        """
        assert self.writable
        if self._own is None or self._own_rows * self._shards.stride >= _SHARD_BYTES:
            self._begin_shard()
        assert self._own is not None
        data = pack_rows(slots, rows)
        try:
            _write_all(self._own, data.tobytes())
        except OSError:
            self._own.close()
            self._own = None  # its last row is cut short
            raise
        for i, slot in enumerate(slots):
            self._index.set(int(slot), to_entry(self._own_number, self._own_rows + i))
        self._own_rows += len(slots)
        self._unflushed += data.size
        if self._unflushed >= _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Make what was written survive a power failure."""
        if self._own is not None:
            os.fsync(self._own.fileno())
        self._unflushed = 0
        self._index.flush(self._count_rows())

    def close(self) -> None:
        """Flush, note what the index knows and close all files."""
        if self.writable and not self._index.closed:
            self.flush()
        self._shards.close()
        self._index.close()
        if self._own is not None:
            self._own.close()
        self._own = None

    def shards(self) -> List[int]:
        """Return the numbers of all shards."""
        return self._shards.numbers()

    def verify(self) -> Tuple[int, List[str]]:
        """Read every row of every shard; returns how many are right, and the shards that hold others."""
        right, damaged = 0, []
        for number in self.shards():
            bad, rows, path = 0, self._shards.count(number), self._shards.path(number)
            with open(path, 'rb') as file:
                bad += file.read(PREAMBLE) != self._shards.head
                for _ in range(rows):
                    bad += not is_whole(file.read(self._shards.stride))
            right += rows - min(rows, bad)
            damaged += [path] if bad else []
        return right, damaged

    def copy_from(self, other: 'Table') -> int:
        """Add the rows of another table that this one lacks; returns how many."""
        added = 0
        for start, block in other._index.blocks():
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
        path = self._shards.path(number)
        if not self.writable:
            raise DamagedRowsError(
                f'{path} of --teacher-cache is damaged. `python -m timm_distill.cache verify --drop` takes it out '
                'where the folder can be written, and a run with --teacher fills it again.')
        self._shards.forget(number)
        if os.path.exists(path):
            os.replace(path, f'{path}.damaged')
        lost = self._index.forget_rows(number, 0)
        _logger.warning(
            f'{path} is damaged and was taken out of the cache (it is {path}.damaged now): {lost} rows are filled '
            'again when their turn comes.')

    def _read_row(self, slot: int, buffer: np.ndarray) -> bool:
        """Read a packed row where it is there."""
        entry = self._index.get(slot)
        if not entry:
            return False
        number, row = from_entry(entry)
        try:
            if not self._shards.read_into(number, row, buffer):
                self._forget(slot)  # lost with the power: the index was flushed, the row was not
                return False
        except DamagedShardError:
            self.drop(number)
            return False
        if not is_whole(buffer, slot):
            self.drop(number)
            return False
        return True

    def _forget(self, slot: int) -> None:
        if self.writable:
            self._index.set(slot, 0)

    def _count_rows(self) -> Dict[int, int]:
        return {number: self._shards.count(number) for number in self.shards()}

    def _begin_shard(self) -> None:
        if self._own is not None:
            self.flush()
            self._own.close()
        number = max([0, *self.shards()])
        while True:
            number += 1
            try:
                self._own = open(self._shards.path(number), 'xb', buffering=0)
                break
            except FileExistsError:  # of another process
                continue
        assert self._own is not None
        self._own_number, self._own_rows = number, 0
        _write_all(self._own, self._shards.head)

    def _update_index(self) -> None:
        """Find the rows that no process has noted in the index."""
        for number, rows in self._index.counted.items():
            if self._shards.count(number) < rows:  # cut short since then, or gone
                self._index.forget_rows(number, self._shards.count(number))
        for number in self.shards():
            try:
                for row, slots in self._shards.slots(number, self._index.counted.get(number, 0)):
                    self._note_slots(number, row, slots)
            except DamagedShardError:
                self.drop(number)

    def _note_slots(self, number: int, row: int, slots: np.ndarray) -> None:
        for i, slot in enumerate(slots.tolist()):
            if 0 <= slot < self.num_slots and not self._index.get(slot):
                self._index.set(slot, to_entry(number, row + i))


def _write_all(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view):]
