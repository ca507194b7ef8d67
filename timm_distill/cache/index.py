"""Index of a table: in which shard and row each slot lies, one number of a file for each.

It is a hint that can be built again: what it points to counts only where number and checksum of the row are right.
"""
import json
import os
import tempfile
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple

import numpy as np

from ..checkpoint.file import write_text

_BLOCK = 1 << 20  # entries that are looked at together
_ROW_BITS = 32
_DATA, _COUNTS = 'index.bin', 'index.json'


def to_entry(number: int, row: int) -> int:
    """Return the entry of a shard's row; 0 stands for none."""
    return (number << _ROW_BITS) + row + 1


def from_entry(entry: int) -> Tuple[int, int]:
    """Return shard and row of an entry."""
    return (entry - 1) >> _ROW_BITS, (entry - 1) & ((1 << _ROW_BITS) - 1)


class Index:
    """Entries of all slots.

    Args:
        folder: Of the table.
        num_slots: Rows of a full table.
        writable: Whether entries that are set stay; else they do for this process.
        rows: How many rows each shard has.

    Attributes:
        counted: How many rows of each shard are known to be in it.
    """

    def __init__(self, folder: str, num_slots: int, writable: bool, rows: Mapping[int, int]):
        self.folder = folder
        self.num_slots = num_slots
        self.counted = self._read_counts()
        path = os.path.join(folder, _DATA)
        if writable:
            self._file: Any = self._open(path)
        elif rows == self.counted and os.path.exists(path) and os.path.getsize(path) >= 8 * num_slots:
            self._file = open(path, 'rb', buffering=0)
        else:
            self._file = tempfile.TemporaryFile(buffering=0)
            self._file.truncate(8 * num_slots)
            self.counted = {}

    def get(self, slot: int) -> int:
        """Return the entry of a slot."""
        self._file.seek(8 * slot)
        return int.from_bytes(self._file.read(8), 'little')

    def set(self, slot: int, entry: int) -> None:
        """Set the entry of a slot, 0 for none."""
        self._file.seek(8 * slot)
        self._file.write(entry.to_bytes(8, 'little'))

    def forget_rows(self, number: int, start: int) -> int:
        """Take the rows of a shard from `start` on out; returns how many."""
        lost, first, last = 0, to_entry(number, start), to_entry(number + 1, 0)
        for block_start, block in self.blocks():
            places = block_start + np.flatnonzero((block >= first) & (block < last))
            for slot in places:
                self.set(int(slot), 0)
            lost += len(places)
        return lost

    def blocks(self, start: int = 0, stop: Optional[int] = None) -> Iterator[Tuple[int, np.ndarray]]:
        """Yield first slot and entries of parts of the index, int64 each."""
        stop = self.num_slots if stop is None else stop
        for first in range(start, stop, _BLOCK):
            self._file.seek(8 * first)
            yield first, np.frombuffer(self._file.read(8 * min(_BLOCK, stop - first)), '<i8')

    def flush(self, rows: Mapping[int, int]) -> None:
        """Make the entries survive a power failure, and note how many rows of each shard they know."""
        os.fsync(self._file.fileno())
        path = os.path.join(self.folder, f'index-{os.getpid()}.json')
        write_text(json.dumps({str(number): count for number, count in rows.items()}), path)
        os.replace(path, os.path.join(self.folder, _COUNTS))

    @property
    def closed(self) -> bool:
        return self._file.closed

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _open(self, path: str) -> Any:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not os.path.exists(os.path.join(self.folder, _COUNTS)):
            os.ftruncate(handle, 0)  # nothing says what is in it: built again
        if os.fstat(handle).st_size < 8 * self.num_slots:
            os.ftruncate(handle, 8 * self.num_slots)
        return os.fdopen(handle, 'r+b', buffering=0)

    def _read_counts(self) -> Dict[int, int]:
        try:
            with open(os.path.join(self.folder, _COUNTS)) as file:
                return {int(number): int(rows) for number, rows in json.load(file).items()}
        except (OSError, ValueError, AttributeError):
            return {}
