"""Matrix products as fast as torch has them, and feature maps as matrices of positions.

Knows nothing of what is multiplied.
"""
import math
from typing import Iterator, Optional, Tuple

import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_weight

_SUM_LENGTH = 64  # numbers that are summed in a row where rounding matters
_PART_SIZE, _GPU_PART_SIZE = 2 ** 20, 2 ** 23  # numbers of an activation worked on at a time
_HALVED_WIDTH = 512  # columns from which on symmetric products are computed by halves
_IMAGES = 16  # with one thread torch takes oneDNN for that many images or more
_ONEDNN_IS_FAST = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == 'AVX512'


def to_rows(x: torch.Tensor) -> torch.Tensor:
    """Return the positions of a feature map, [B, C, H, W] -> [B * H * W, C], contiguous; a view in channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()


def from_rows(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return a view of rows, [B * H * W, D] -> [B, D, H, W], with B, H and W of `x`."""
    return rows.view(x.shape[0], x.shape[2], x.shape[3], -1).permute(0, 3, 1, 2)


def image_parts(x: torch.Tensor, multiple: int = _IMAGES) -> Iterator[slice]:
    """Yield which images of a feature map, [B, C, H, W], to work on at a time, so that they stay in the cache."""
    size = _PART_SIZE if x.device.type == 'cpu' else _GPU_PART_SIZE
    step = -(-size // (x[0].numel() * multiple)) * multiple
    for start in range(0, len(x), step):
        yield slice(start, min(start + step, len(x)))


def channel_means(x: torch.Tensor) -> torch.Tensor:
    """Return the mean of every channel over positions in float64, [B, C, H, W] -> [C]."""
    total = x.new_zeros(x.shape[1], dtype=torch.float64)
    for images in image_parts(x, multiple=1):  # on the CPU torch converts all that it sums first
        total += x[images].sum((0, 2, 3), dtype=torch.float64)
    return total / (x.numel() // x.shape[1])


# On CPUs with AVX-512 the products below run as 1x1 convolutions of rows in channels_last: oneDNN takes half the time
# of the BLAS that torch comes with. With AVX2 alone it is slower than that and rounds more.

def matmul_nt(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a @ b^T, [R, K] x [O, K] -> [R, O]."""
    if _use_onednn(a):
        # a transposed matrix is copied in a tenth of the time that its copy as a convolution's weight takes
        weight = b.contiguous()[:, :, None, None]
        return F.conv2d(_as_images(a), weight).permute(0, 2, 3, 1).reshape(a.shape[0], -1)
    return a @ b.t()


def matmul_tn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a^T @ b, [R, I] x [R, O] -> [I, O]; of half precision inputs in float32."""
    if a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a.t(), b, out_dtype=torch.float32) if a.is_cuda else a.float().t() @ b.float()
    if _use_onednn(a):
        return conv2d_weight(_as_images(b), (a.shape[1], b.shape[1], 1, 1), _as_images(a)).flatten(1)
    return a.t() @ b


def gram(rows: torch.Tensor, weights: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Return rows^T diag(weights) rows, [R, C] and [R] -> [C, C]."""
    width = rows.shape[1]
    if not _use_onednn(rows) or width < _HALVED_WIDTH:
        return matmul_tn(rows, rows if weights is None else weights[:, None] * rows)
    # of the four quarters of the result two are the same
    left, right = (half.contiguous() for half in rows.tensor_split(2, 1))
    result, half = rows.new_empty(width, width), left.shape[1]
    scaled = right if weights is None else weights[:, None] * right
    result[half:, half:] = matmul_tn(right, scaled)
    del right
    result[:half, half:] = matmul_tn(left, scaled)
    result[half:, :half] = result[:half, half:].t()
    del scaled
    scaled = left if weights is None else weights[:, None] * left
    result[:half, :half] = matmul_tn(left, scaled)
    return result


def matmul_tn_wide(a: torch.Tensor, b: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """Return a^T @ b for an `a` wider than tall, [K, R] x [K, O] -> [R, O]; `buffer`, [R, K], may be overwritten."""
    if _use_onednn(a):
        # contiguous first: rows far apart are slow to transpose
        return matmul_nt(buffer.copy_(a.contiguous().t()), b.t())
    return a.t() @ b


def matmul_nn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a @ b, [O, K] x [K, R] -> [O, R]."""
    if _use_onednn(a):
        return F.conv2d(b[None, :, :, None], a[:, :, None, None])[0, :, :, 0]
    return a @ b


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


def row_products(a: torch.Tensor, b: torch.Tensor, buffer: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Return the dot product of every two rows in float64, [..., R, C] x [..., R, C] -> [..., R]."""
    length = math.gcd(a.shape[-1], _SUM_LENGTH)
    return torch.mul(a, b, out=buffer).unflatten(-1, (-1, length)).sum(-1).sum(-1, dtype=torch.float64)


def _as_images(rows: torch.Tensor) -> torch.Tensor:
    """Return a view of contiguous rows, [R, C], as images in channels_last, [B, C, R / B, 1]."""
    images = _IMAGES if rows.shape[0] % _IMAGES == 0 else 1
    return rows.view(images, -1, 1, rows.shape[1]).permute(0, 3, 1, 2)


def _use_onednn(x: torch.Tensor) -> bool:
    return x.device.type == 'cpu' and x.dtype == torch.float32 and _ONEDNN_IS_FAST
