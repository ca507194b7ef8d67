"""The segments of a tall matrix and the parts of it that are worked on at a time."""
from typing import Dict, Iterator, Optional, Tuple, Union

import torch

from .matmul import matmul_tn_wide, row_products

# numbers of W1 worked on at a time: large enough for fast products, small enough for caches
_PART_SIZE = 2 ** 21
_GPU_PART_SIZE = 2 ** 23


class Segments:
    """The segments of a matrix, [N * Ct, C], and the parts of it that are worked on at a time.

    A part is several whole segments or a piece of one. `rows` are the rows of every segment that it covers.
    """

    def __init__(self, matrix: torch.Tensor, channels: int):
        self.height, self.channels = matrix.shape[0], channels
        self.count = self.height // channels
        size = _PART_SIZE if matrix.device.type == 'cpu' else _GPU_PART_SIZE
        rows = max(1, size // matrix.shape[1])
        pieces = max(1, round(channels / rows))  # of a segment, of equal size
        self.rows = rows - rows % channels if rows >= channels else -(-channels // pieces)
        # written again and again: new memory of this size would cost more than what is computed in it
        self._buffers: Dict[int, torch.Tensor] = {}
        self._matrix = matrix

    def parts(self) -> Iterator[Tuple[slice, slice]]:
        """Yield the rows of the matrix to work on at a time, and which rows of each segment these are."""
        if self.rows >= self.channels:
            for start in range(0, self.height, self.rows):
                yield slice(start, min(start + self.rows, self.height)), slice(None)
            return
        for start in range(0, self.height, self.channels):
            for row in range(0, self.channels, self.rows):
                end = min(row + self.rows, self.channels)
                yield slice(start + row, start + end), slice(row, end)

    def mean(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return the mean over the segments, [N * Ct, ...] -> [Ct, ...]."""
        return matrix.unflatten(0, (self.count, self.channels)).mean(0)

    def minus(self, part: torch.Tensor, common: torch.Tensor, rows: slice) -> torch.Tensor:
        """Subtract a matrix of one segment, [Ct, C], from each segment of a part; holds until the next call."""
        result = self._buffer(0, len(part))
        torch.sub(_split(part, common[rows]), common[rows], out=_split(result, common[rows]))
        return result

    def scale(self, part: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Multiply each row of a part; holds until the next call of `scale` or `row_products`."""
        return torch.mul(part, factor[:, None], out=self._buffer(1, len(part)))

    def product_of_columns(self, columns: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Return columns^T @ other for a part's columns of a wide matrix, [C, rows] x [C, C] -> [rows, C]."""
        return matmul_tn_wide(columns, other, self._buffer(0, columns.shape[1]))

    def row_products(self, part: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Return each row's dot product with that of another part or, in each segment, of one segment."""
        split = _split(part, other)
        return row_products(split, other, _split(self._buffer(1, len(part)), other)).flatten()

    def _buffer(self, index: int, rows: int) -> torch.Tensor:
        """Return the first rows of one of two buffers."""
        if index not in self._buffers:
            self._buffers[index] = self._matrix.new_empty(min(self.rows, self.height), self._matrix.shape[1])
        return self._buffers[index][:rows]

    def add_scaled_(self, part: torch.Tensor, common: torch.Tensor, factor: torch.Tensor, rows: slice) -> None:
        """Add a matrix of one segment, [Ct, C], times a factor for each row of the part."""
        split = _split(part, common[rows])
        split.addcmul_(common[rows], factor.view(*split.shape[:2], 1))

    def add_to(self, total: torch.Tensor, part: torch.Tensor, factor: Optional[torch.Tensor], rows: slice) -> None:
        """Add the segments of a part, times a factor for each row, to one segment, [Ct, C] or [Ct]."""
        split = _split(part, total[rows])
        if factor is None:
            total[rows] += split.sum(0)
            return
        for segment, row_factor in zip(split, factor.view(*split.shape[:2], 1)):
            total[rows].addcmul_(segment, row_factor)


def put_part(whole: torch.Tensor, part: Union[slice, Tuple[slice, slice]], value: torch.Tensor) -> torch.Tensor:
    """Return a matrix with a part written; where the part is all of it, the part itself."""
    if value.shape == whole.shape:
        return value
    whole[part] = value
    return whole


def _split(part: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    return part.view(-1, *segment.shape)
