"""Shards of a table: files of rows that are only appended to, each row with its number and a checksum.

Files are read at a position, not mapped: a file that a full disk or another process cuts short would end a process that
has mapped it, and memory stays what it is either way. Few are open at a time, however many a large cache has.
"""
import os
import zlib
from collections import OrderedDict
from io import FileIO
from typing import Any, Iterator, List, Optional, Tuple

import numpy as np

MAGIC = b'timm_distill rows 1\n'
PREAMBLE = 128
OVERHEAD = 12  # bytes of a row beside its content: its number and a CRC-32 of both
SUFFIX = '.rows'
_OPEN = 64
_SCAN_BYTES = 1 << 20
_LONG_ROW = 1 << 14  # bytes of a row above which it is cheaper to skip to the next number than to read on


class DamagedShardError(Exception):
    """A shard whose beginning is not what was written."""


def pack_rows(slots: Any, rows: np.ndarray) -> np.ndarray:
    """Return rows, uint8 [N, row_bytes], as they lie in a shard: with their numbers and checksums."""
    packed = np.empty((len(rows), rows.shape[1] + OVERHEAD), np.uint8)
    packed[:, :8] = np.asarray(slots, '<u8').view(np.uint8).reshape(-1, 8)
    packed[:, 8:-4] = rows
    sums = [zlib.crc32(row) for row in packed[:, :-4]]
    packed[:, -4:] = np.array(sums, '<u4').view(np.uint8).reshape(-1, 4)
    return packed


def is_whole(row: Any, slot: Optional[int] = None) -> bool:
    """Whether a packed row has the checksum that it says, and is that of a slot."""
    view = memoryview(row)
    whole = zlib.crc32(view[:-4]) == int.from_bytes(view[-4:], 'little')
    return whole and slot in (None, int.from_bytes(view[:8], 'little'))


class Shards:
    """Files of a table's rows, by number.

    Args:
        folder: Where they lie.
        row_bytes: Length of a row.
        num_slots: Rows of a full table.
    """

    def __init__(self, folder: str, row_bytes: int, num_slots: int):
        self.folder = folder
        self.stride = row_bytes + OVERHEAD
        self.head = (MAGIC + f'{row_bytes} {num_slots}\n'.encode()).ljust(PREAMBLE, b'\0')
        self._files: OrderedDict[int, FileIO] = OrderedDict()

    def numbers(self) -> List[int]:
        """Return the numbers of all shards."""
        if not os.path.isdir(self.folder):
            return []
        names = [name[:-len(SUFFIX)] for name in os.listdir(self.folder) if name.endswith(SUFFIX)]
        return sorted(int(name) for name in names if name.isdecimal())

    def path(self, number: int) -> str:
        """Return the file of a shard."""
        return os.path.join(self.folder, f'{number:06d}{SUFFIX}')

    def count(self, number: int) -> int:
        """Return how many whole rows a shard has, 0 where it is gone."""
        try:
            size = os.path.getsize(self.path(number))
        except FileNotFoundError:
            return 0
        return max(0, size - PREAMBLE) // self.stride

    def read_into(self, number: int, row: int, buffer: Any) -> bool:
        """Read a packed row, uint8 [stride]; returns whether it is there.

        Raises:
            DamagedShardError: If the shard is of something else.
        """
        file = self._open(number)
        if file is None:
            return False
        file.seek(PREAMBLE + row * self.stride)
        return file.readinto(buffer) == self.stride

    def slots(self, number: int, start: int = 0) -> Iterator[Tuple[int, np.ndarray]]:
        """Yield parts of what slots the rows of a shard from `start` on are of: first row and slots, int64 [N].

        Raises:
            DamagedShardError: If the shard is of something else.
        """
        stop = self.count(number)
        file = self._open(number) if start < stop else None
        step = max(1, _SCAN_BYTES // self.stride) if self.stride < _LONG_ROW else 1
        for row in range(start, stop, step):
            if file is None:
                return
            length = min(step, stop - row)
            file.seek(PREAMBLE + row * self.stride)
            data = file.read(length * self.stride if step > 1 else 8)
            yield row, np.frombuffer(data, np.uint8).reshape(length, -1)[:, :8].copy().view('<i8')[:, 0]

    def forget(self, number: int) -> None:
        """Close the file of a shard that goes away."""
        if number in self._files:
            self._files.pop(number).close()

    def close(self) -> None:
        """Close all files."""
        for number in list(self._files):
            self.forget(number)

    def _open(self, number: int) -> Optional[FileIO]:
        if number not in self._files:
            try:
                file = open(self.path(number), 'rb', buffering=0)
            except FileNotFoundError:
                return None
            if file.read(PREAMBLE) != self.head:
                file.close()
                raise DamagedShardError(self.path(number))
            while len(self._files) >= _OPEN:
                self._files.popitem(last=False)[1].close()
            self._files[number] = file
        self._files.move_to_end(number)
        return self._files[number]
