"""Feature maps as matrices of positions; products and sums of them where rounding matters.

Knows nothing of what is multiplied.
"""
import math
from typing import Iterator, Tuple

import torch

_SUM_LENGTH = 64  # numbers that are summed in a row where rounding matters
_PART_SIZE, _GPU_PART_SIZE = 2 ** 20, 2 ** 23  # numbers of an activation worked on at a time


def to_rows(x: torch.Tensor) -> torch.Tensor:
    """Return the positions of a feature map, [B, C, H, W] -> [B * H * W, C], contiguous; a view in channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()


def from_rows(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return a view of rows, [B * H * W, D] -> [B, D, H, W], with B, H and W of `x`."""
    return rows.view(x.shape[0], x.shape[2], x.shape[3], -1).permute(0, 3, 1, 2)


def image_parts(x: torch.Tensor) -> Iterator[slice]:
    """Yield which images of a feature map, [B, C, H, W], to work on at a time, so that they stay in the cache."""
    size = _PART_SIZE if x.device.type == 'cpu' else _GPU_PART_SIZE
    step = max(1, size // x[0].numel())
    for start in range(0, len(x), step):
        yield slice(start, min(start + step, len(x)))


def channel_means(x: torch.Tensor) -> torch.Tensor:
    """Return the mean of every channel over positions in float64, [B, C, H, W] -> [C]."""
    total = x.new_zeros(x.shape[1], dtype=torch.float64)
    for images in image_parts(x):  # on the CPU torch converts all that it sums first
        total += x[images].sum((0, 2, 3), dtype=torch.float64)
    return total / (x.numel() // x.shape[1])


def matmul_tn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a^T @ b, [R, I] x [R, O] -> [I, O]; of half precision inputs in float32."""
    if a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a.t(), b, out_dtype=torch.float32) if a.is_cuda else a.float().t() @ b.float()
    return a.t() @ b


def gram(rows: torch.Tensor) -> torch.Tensor:
    """Return rows^T rows, [R, C] -> [C, C]; on the CPU summed in float64, as its long sums of float32 lose digits."""
    if rows.device.type != 'cpu' or rows.dtype == torch.float64:
        return rows.t() @ rows
    total = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for part in rows.split(max(1, _PART_SIZE // rows.shape[1])):
        part = part.double()
        total.addmm_(part.t(), part)
    return total.to(rows.dtype)


def split_exactly(rows: torch.Tensor, bits: int = 10) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return high and low parts, [R, K] -> 2 x [R, K], which sum up to the rows exactly.

    The high parts are integers of few bits times a power of two for each row: a product of two such matrices is exact,
    in whatever order it is summed up (Ozaki et al., Numerical Algorithms 59, 2012).
    """
    largest = rows.abs().amax(1, keepdim=True)
    # a number of this size has no bits for what is smaller than largest / 2^bits
    large = largest * (1.5 / (2 ** bits * torch.finfo(rows.dtype).eps))
    high = (rows + large).sub_(large)
    return high, rows - high


def row_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the dot product of every two rows in float64, [..., R, C] x [..., R, C] -> [..., R]."""
    length = math.gcd(a.shape[-1], _SUM_LENGTH)
    return (a * b).unflatten(-1, (-1, length)).sum(-1).sum(-1, dtype=torch.float64)
