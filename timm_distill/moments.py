"""The N-to-one loss and the N-to-one transform from moments: exact, and nothing of width N * Ct per position.

With x [P, Cs] the student's positions and t [P, Ct] the teacher's, the expanded feature of NORM (Liu et al., ICLR 2023)
is e = A x + k, where A = diag(a) W1 and a depends on the batch only through Cov[x]. The loss is quadratic in e, so that
it needs Cov[x] and Cov[t, x] alone; the contraction needs W2 A, a matrix of Cs x Cs. Pure functions of tensors; the
backward passes are written by hand so that both keep only what is alive anyway and work on a few rows at a time.
"""
from typing import Any, Iterator, NamedTuple, Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight

from .precision import full_float32

_PART_SIZE = 2 ** 20  # numbers worked on at a time: large enough for fast products, small enough for caches


class Moments(NamedTuple):
    """Moments over positions, biased.

    Attributes:
        mean: E[x], [Cs].
        cov: Cov[x], [Cs, Cs].
        cross: Cov[t, x], [Ct, Cs]; empty without a teacher.
    """
    mean: torch.Tensor
    cov: torch.Tensor
    cross: torch.Tensor


class TeacherMoments(NamedTuple):
    """Moments of the teacher's feature: constants.

    Attributes:
        mean: E[t], [Ct].
        spread: E||t - E[t]||^2, scalar, float64.
    """
    mean: torch.Tensor
    spread: torch.Tensor


def compute_moments(x: torch.Tensor, teacher: Optional[torch.Tensor] = None) -> Moments:
    """Return the moments of a feature map, [B, Cs, H, W], and its covariance with a teacher's, [B, Ct, H, W]."""
    return Moments(*_MomentsFunction.apply(x, x.new_empty(0) if teacher is None else teacher.detach()))


def compute_teacher_moments(teacher: torch.Tensor) -> TeacherMoments:
    """Return the moments of a teacher's feature map, [B, Ct, H, W]."""
    teacher = teacher.detach()
    mean = teacher.mean(dim=(0, 2, 3))
    spread = teacher.sub(mean[:, None, None]).square_().mean(dim=(0, 2, 3)).sum(dtype=torch.float64)
    return TeacherMoments(mean, spread)


def share_moments(moments: Moments, num_positions: int, group: Any = None) -> Tuple[Moments, int]:
    """Return the moments over all ranks of a process group, with gradients to each, and the number of positions."""
    from torch.distributed.nn.functional import all_reduce
    count = moments.mean.new_tensor([num_positions])
    dist.all_reduce(count, group=group)
    share = num_positions / count
    mean = all_reduce(share * moments.mean, group=group)
    shift = moments.mean - mean
    cov = all_reduce(share * (moments.cov + torch.outer(shift, shift)), group=group)
    return Moments(mean, cov, moments.cross), int(count.item())


def _products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the sum over positions of x y^T, [B, C, H, W] and [B, D, H, W] -> [C, D].

    It is the weight gradient of a 1x1 convolution, which takes both memory formats as they come.
    """
    return conv2d_weight(y, (x.shape[1], y.shape[1], 1, 1), x).flatten(1)


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a @ b. On the CPU as a convolution: oneDNN takes half the time of the BLAS that torch comes with."""
    if _use_onednn(a):
        return F.conv2d(b[None, :, :, None], a[:, :, None, None])[0, :, :, 0]
    return a @ b


def _mm_nt(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a @ b^T, as `_mm`."""
    if _use_onednn(a):
        return _products(a[None, :, :, None], b[None, :, :, None])
    return a @ b.t()


def _mm_tn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a^T @ b, as `_mm`."""
    if _use_onednn(a):
        return conv2d_input((1, a.shape[1], b.shape[1], 1), a[:, :, None, None], b[None, :, :, None])[0, :, :, 0]
    return a.t() @ b


def _use_onednn(x: torch.Tensor) -> bool:
    if x.device.type != 'cpu' or x.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    return torch.get_num_threads() > 1  # torch takes oneDNN for one image only with several threads


def _centre(x: torch.Tensor) -> torch.Tensor:
    """Subtract each channel's mean from a feature map, [B, C, H, W]."""
    return x - x.mean(dim=(0, 2, 3))[:, None, None]


class _MomentsFunction(Function):
    """x, t -> E[x], Cov[x], Cov[t, x]. Saves its inputs, which are alive anyway, instead of centred copies."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, teacher: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        mean = x.mean(dim=(0, 2, 3))
        num_positions = x.numel() // x.shape[1]
        with full_float32():
            centred = _centre(x)
            cov = _products(centred, centred).div_(num_positions)
            cross = cov.new_empty(0)
            if teacher.numel():
                # centred too: a large mean would multiply what rounding leaves of the other one
                cross = _products(_centre(teacher), centred).div_(num_positions)
        ctx.save_for_backward(x, teacher, mean)
        return mean, cov, cross

    @staticmethod
    @once_differentiable
    def backward(
            ctx: Any,
            grad_mean: torch.Tensor,
            grad_cov: torch.Tensor,
            grad_cross: torch.Tensor,
    ) -> Tuple[torch.Tensor, None]:
        x, teacher, mean = ctx.saved_tensors
        num_positions = x.numel() // x.shape[1]
        weight = (grad_cov + grad_cov.t()).div_(num_positions)
        constant = grad_mean / num_positions - weight @ mean
        with full_float32():
            if teacher.numel():
                cross = grad_cross.t() / num_positions
                grad = F.conv2d(_centre(teacher), cross[:, :, None, None])
                grad += F.conv2d(x, weight[:, :, None, None], constant)
            else:
                grad = F.conv2d(x, weight[:, :, None, None], constant)
        return grad, None


class Expansion(NamedTuple):
    """What the expanding half of the transform is for one batch, e = diag(a) W1 x + k.

    Attributes:
        contracted: W2 diag(a) W1, [Cs, Cs]; empty without a contraction.
        loss: The N-to-one loss, scalar; 0 without a teacher.
        variance: Variances of W1 x, [N * Ct]; not differentiable, for running statistics.
    """
    contracted: torch.Tensor
    loss: torch.Tensor
    variance: torch.Tensor


def expand_moments(
        expand: torch.Tensor,
        contract: Optional[torch.Tensor],
        scale: torch.Tensor,
        offset: torch.Tensor,
        cov: Optional[torch.Tensor],
        eps: float,
        matched: Optional[Moments] = None,
        shift: Optional[torch.Tensor] = None,
        teacher: Optional[TeacherMoments] = None,
) -> Expansion:
    """Expand, match and contract from moments.

    Args:
        expand: W1, [N * Ct, Cs].
        contract: W2, [Cs, N * Ct].
        scale: The batch norm's weight in training, else the factor a itself, [N * Ct].
        offset: What e is where x equals E of the matched x minus `shift`, [N * Ct].
        cov: Cov[x] of the batch norm's positions, [Cs, Cs], in training; None where `scale` is a itself.
        eps: The batch norm's.
        matched: Moments of the positions that are matched, with `cross`; None without a loss.
        shift: E[x] of the matched positions minus the point where e is `offset`, [Cs].
        teacher: Moments of the teacher's feature at the matched positions.

    Returns:
        Contracted map, loss and variances.
    """
    empty = expand.new_empty(0)
    same = matched is not None and cov is matched.cov
    return Expansion(*_ExpansionFunction.apply(
        expand,
        empty if contract is None else contract,
        scale,
        offset,
        empty if cov is None else cov,
        empty if matched is None or same else matched.cov,
        empty if matched is None else matched.cross,
        empty if shift is None else shift,
        empty if teacher is None else teacher.mean,
        empty if teacher is None else teacher.spread,
        eps,
        same,
    ))


class _ExpansionFunction(Function):
    """Some rows of W1 at a time, in both directions."""

    @staticmethod
    def forward(
            ctx: Any,
            expand: torch.Tensor,
            contract: torch.Tensor,
            scale: torch.Tensor,
            offset: torch.Tensor,
            cov: torch.Tensor,
            matched_cov: torch.Tensor,
            cross: torch.Tensor,
            shift: torch.Tensor,
            teacher_mean: torch.Tensor,
            teacher_spread: torch.Tensor,
            eps: float,
            same: bool,
    ) -> Tuple[torch.Tensor, ...]:
        batch_stats, matching = cov.numel() > 0, cross.numel() > 0
        channels = expand.shape[1]
        contracted = expand.new_zeros(channels, channels) if contract.numel() else expand.new_empty(0)
        variance, factor = torch.zeros_like(scale), scale.clone()
        matched_variance, residual = torch.zeros_like(scale), torch.zeros_like(scale)
        total = torch.zeros_like(cross)  # sum of the segments of A, [Ct, Cs]
        # W1 times the covariance that is needed again in the backward pass; its memory becomes the gradient's there
        product = torch.empty_like(expand) if batch_stats else None
        with full_float32():
            for part, rows in _parts(expand, cross.shape[0] if matching else expand.shape[0]):
                weight = expand[part]
                if matching and not same:
                    spread = _mm(weight, matched_cov)
                    matched_variance[part] = _row_products(spread, weight)
                if batch_stats:
                    spread = _mm(weight, cov)
                    variance[part] = _row_products(spread, weight)
                    factor[part] = scale[part] * (variance[part] + eps).rsqrt()
                if same:
                    matched_variance[part] = variance[part]
                if product is not None:
                    product[part] = spread
                scaled = factor[part, None] * weight  # a segment of A
                if matching:
                    segments = scaled.view(-1, *cross[rows].shape)  # of this part, or the part is of one segment
                    residual[part] = scaled @ shift + offset[part] - teacher_mean[rows].repeat(len(segments))
                    total[rows] += segments.sum(0)
                if contract.numel():
                    contracted += _mm(contract[:, part], scaled)
        loss = expand.new_zeros(())
        if matching:
            loss = _loss(factor, matched_variance, residual, total, cross, teacher_spread)
        ctx.save_for_backward(expand, contract, scale, cov, matched_cov, cross, shift, variance, factor,
                              matched_variance, residual, total)
        ctx.product = product
        ctx.options = (eps, same)
        ctx.mark_non_differentiable(variance)
        return contracted, loss, variance

    @staticmethod
    @once_differentiable
    def backward(
            ctx: Any,
            grad_contracted: torch.Tensor,
            grad_loss: torch.Tensor,
            _: torch.Tensor,
    ) -> Tuple[Optional[torch.Tensor], ...]:
        (expand, contract, scale, cov, matched_cov, cross, shift, variance, factor, matched_variance, residual,
         total) = ctx.saved_tensors
        eps, same = ctx.options
        product, ctx.product = ctx.product, None  # a second pass over a retained graph computes it again
        batch_stats, matching = cov.numel() > 0, cross.numel() > 0
        unit = grad_loss / cross.shape[0] if matching else grad_loss
        grad_expand = torch.empty_like(expand) if product is None else product
        grad_contract = torch.empty_like(contract)
        grad_cov, grad_matched_cov = torch.zeros_like(cov), torch.zeros_like(matched_cov)
        grad_scale, grad_shift = torch.empty_like(scale), torch.zeros_like(shift)
        grad_offset = 2 * unit * residual if matching else torch.zeros_like(scale)
        matched_slope = unit * factor.square() if matching else torch.zeros_like(scale)  # d loss / d matched variance
        with full_float32():
            for part, rows in _parts(expand, cross.shape[0] if matching else expand.shape[0]):
                weight = expand[part]
                # with respect to a segment of A
                grad = _mm_tn(contract[:, part], grad_contracted) if contract.numel() else torch.zeros_like(weight)
                if contract.numel():
                    grad_contract[:, part] = _mm_nt(grad_contracted, factor[part, None] * weight)
                if matching:
                    grad.view(-1, *cross[rows].shape).add_(cross[rows] * (-2 * unit))
                    grad.addr_(grad_offset[part], shift)
                    grad_shift += weight.t() @ (factor[part] * grad_offset[part])
                slope = _row_products(grad, weight)  # d / d a
                if matching:
                    slope += 2 * unit * factor[part] * matched_variance[part]
                outer = matched_slope[part]
                result = grad_expand[part]
                if batch_stats:
                    inverse = (variance[part] + eps).rsqrt()
                    grad_scale[part] = slope * inverse
                    inner = -0.5 * slope * scale[part] * inverse ** 3  # d / d variance
                    inner = inner + outer if same else inner
                    if product is None:
                        result.copy_(_mm(weight, cov))
                    result.mul_(2 * inner[:, None]).addcmul_(grad, factor[part, None])
                    grad_cov += _mm_tn(weight, inner[:, None] * weight)
                else:
                    grad_scale[part] = slope
                    torch.mul(grad, factor[part, None], out=result)
                if matching and not same:
                    result.addcmul_(_mm(weight, matched_cov), 2 * outer[:, None])
                    grad_matched_cov += _mm_tn(weight, outer[:, None] * weight)
        return (
            grad_expand,
            grad_contract if contract.numel() else None,
            grad_scale,
            grad_offset,
            grad_cov if batch_stats else None,
            grad_matched_cov if matching and not same else None,
            -2 * unit * total if matching else None,
            grad_shift if matching else None,
            None, None, None, None,
        )


def _row_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the dot product of every two rows, [R, C] x [R, C] -> [R]."""
    return torch.linalg.vecdot(a, b)


def _parts(expand: torch.Tensor, segment: int) -> Iterator[Tuple[slice, slice]]:
    """Yield the rows of W1 to work on at a time, and which rows of each segment these are.

    A part is several whole segments or a piece of one.
    """
    rows = max(1, _PART_SIZE // expand.shape[1])
    if rows >= segment:
        rows -= rows % segment
        for start in range(0, expand.shape[0], rows):
            yield slice(start, start + rows), slice(None)
        return
    for start in range(0, expand.shape[0], segment):
        for row in range(0, segment, rows):
            end = min(row + rows, segment)
            yield slice(start + row, start + end), slice(row, end)


def _loss(
        factor: torch.Tensor,
        matched_variance: torch.Tensor,
        residual: torch.Tensor,
        total: torch.Tensor,
        cross: torch.Tensor,
        teacher_spread: torch.Tensor,
) -> torch.Tensor:
    """Combine the sums in float64; what is mathematically not negative is not let below zero by rounding."""
    segments = factor.shape[0] // cross.shape[0]
    quadratic = (factor.square() * matched_variance).sum(dtype=torch.float64)
    centred = quadratic - 2 * (total * cross).sum(dtype=torch.float64) + segments * teacher_spread
    return ((centred.clamp_min(0.) + residual.square().sum(dtype=torch.float64)) / cross.shape[0]).to(factor.dtype)
