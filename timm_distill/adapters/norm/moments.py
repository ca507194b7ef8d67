"""Moments of features, and what the N-to-one transform needs of them: pure functions with hand-written gradients.

All take positions as rows, [P, C], and keep for their backward passes what is alive anyway.
"""
from typing import Any, NamedTuple, Optional, Tuple, Union

import torch
import torch.distributed as dist
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ...utils.precision import full_float32
from .matmul import gram, image_parts, matmul_tn, row_products, split_exactly, to_rows


class Moments(NamedTuple):
    """Moments over positions, biased.

    Attributes:
        centred: Every position minus the mean, [P, C].
        mean: E[x], [C].
        cov: Cov[x], [C, C].
    """
    centred: torch.Tensor
    mean: torch.Tensor
    cov: torch.Tensor


class BatchStatistics(NamedTuple):
    """Moments of a linear layer's input, as the batch norm behind it needs them.

    Attributes:
        mean: E[x], [C].
        cov: Cov[x], [C, C], biased.
        num_positions: P; a tensor, [1], where only the device knows it.
    """
    mean: torch.Tensor
    cov: torch.Tensor
    num_positions: Union[int, torch.Tensor]


def compute_moments(x: torch.Tensor) -> Moments:
    """Return the moments of a feature map, [B, C, H, W]."""
    centred, mean = _CentreFunction.apply(x)
    return Moments(centred, mean, _CovarianceFunction.apply(centred))


def share_moments(moments: Moments, group: Any = None) -> BatchStatistics:
    """Return the statistics over all ranks of a process group, with gradients to each.

    The number of positions stays a tensor: reading it would make the host wait for the device.
    """
    from torch.distributed.nn.functional import all_reduce
    own = moments.mean.new_full((1,), moments.centred.shape[0])
    count = own.clone()
    dist.all_reduce(count, group=group)
    share = own / count
    mean = all_reduce(share * moments.mean, group=group)
    shift = moments.mean - mean
    cov = all_reduce(share * (moments.cov + torch.outer(shift, shift)), group=group)
    return BatchStatistics(mean, cov, count)


class _CentreFunction(Function):
    """x -> x - E[x], E[x] over positions, as rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        rows = to_rows(x)
        mean = rows.mean(0)
        ctx.shape = x.shape
        owned = rows.data_ptr() != x.data_ptr()  # a copy, not a view
        return rows.sub_(mean) if owned else rows - mean, mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_centred: torch.Tensor, grad_mean: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = ctx.shape
        constant = grad_mean / len(grad_centred) - grad_centred.mean(0)
        return (grad_centred + constant).view(batch, height, width, channels).permute(0, 3, 1, 2)


class _CovarianceFunction(Function):
    """x -> E[x x^T]; gradient (G + G^T) x / P."""

    @staticmethod
    def forward(ctx: Any, centred: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(centred)
        with full_float32():
            return gram(centred).div_(centred.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        centred, = ctx.saved_tensors
        with full_float32():
            return centred @ (grad + grad.t()).div_(centred.shape[0])


def residual_spread(
        centred: torch.Tensor,
        weight: torch.Tensor,
        teacher: torch.Tensor,
        teacher_mean: torch.Tensor,
) -> torch.Tensor:
    """Return the variance of the teacher that a linear map leaves, E||W x - (t - E[t])||^2, in float64.

    The difference is taken position by position, some images at a time: it is wider than its gradients and not kept.
    Where it is small, W x cancels the teacher, so that its largest part is summed up without any rounding.

    Args:
        centred: Student's positions minus their mean, x, [P, Cs].
        weight: W, [Ct, Cs].
        teacher: Teacher's feature map, [B, Ct, H, W], with B * H * W = P, of any precision.
        teacher_mean: E[t], [Ct].
    """
    return _ResidualSpreadFunction.apply(centred, weight, teacher, teacher_mean)


class _ResidualSpreadFunction(Function):
    """With d the difference, gradients 2 d W / P to x and 2 E[d x^T] to W, taken in the forward pass."""

    @staticmethod
    def forward(
            ctx: Any,
            centred: torch.Tensor,
            weight: torch.Tensor,
            teacher: torch.Tensor,
            teacher_mean: torch.Tensor,
    ) -> torch.Tensor:
        count, positions, mean = len(centred), teacher[0, 0].numel(), teacher_mean.to(centred.dtype)
        high, low = split_exactly(weight)  # the products of high parts are exact
        total = torch.zeros((), dtype=torch.float64, device=centred.device)
        grads = (torch.empty_like(centred), torch.zeros_like(weight)) if any(ctx.needs_input_grad) else ()
        with full_float32():
            for images in image_parts(teacher):
                rows = slice(images.start * positions, images.stop * positions)
                difference = _add_product(centred[rows], high, low, mean - to_rows(teacher[images]))
                total += torch.linalg.vector_norm(difference, dim=1).square().sum(dtype=torch.float64)
                if grads:
                    grads[0][rows] = difference @ weight
                    grads[1].addmm_(difference.t(), centred[rows])
        ctx.save_for_backward(*grads)
        ctx.count = count
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        (grad_centred, grad_weight), factor = ctx.saved_tensors, 2 * grad / ctx.count
        return grad_centred * factor, grad_weight * factor, None, None


def _add_product(rows: torch.Tensor, high: torch.Tensor, low: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Add rows @ (high + low)^T to `out`, which it changes; the largest part first and without rounding."""
    rows_high, rows_low = split_exactly(rows)
    return out.addmm_(rows_high, high.t()).addmm_(rows_low, high.t()).addmm_(rows, low.t())


def row_variances(weight: torch.Tensor, cov: torch.Tensor) -> torch.Tensor:
    """Return the variances of weight @ x for x of covariance `cov`: diag(W S W^T), [O, C], [C, C] -> [O]."""
    return _RowVariancesFunction.apply(weight, cov)


class _RowVariancesFunction(Function):
    """Gradients 2 diag(g) W S to W and W^T diag(g) W to S."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, cov: torch.Tensor) -> torch.Tensor:
        with full_float32():
            product = weight @ cov
        ctx.save_for_backward(weight, product)
        return row_products(product, weight).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        weight, product = ctx.saved_tensors
        with full_float32():
            return product * (2 * grad[:, None]), weight.t() @ (grad[:, None] * weight)


def map_rows(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: bool = False) -> torch.Tensor:
    """Return rows @ weight^T + bias, [P, C] x [O, C] -> [P, O], in the precision of the rows.

    Weight and bias are of full precision, and so are their gradients: sums over positions are not rounded. With
    `residual` the rows are added.
    """
    return _MapFunction.apply(rows, weight, bias, residual)


class _MapFunction(Function):

    @staticmethod
    def forward(
            ctx: Any,
            rows: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor,
            residual: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.residual = residual
        with full_float32():
            result = (rows @ weight.to(rows.dtype).t()).add_(bias)
        return result.add_(rows) if residual else result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        rows, weight = ctx.saved_tensors
        grad = grad.contiguous()
        with full_float32():
            grad_rows = grad @ weight.to(grad.dtype)
            grad_weight = matmul_tn(grad, rows)
        if ctx.residual:
            grad_rows.add_(grad)
        return grad_rows, grad_weight, grad.sum(0, dtype=weight.dtype), None
