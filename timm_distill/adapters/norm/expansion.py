"""The expansion, its N-to-one loss and its contraction from moments, a few rows of every segment at a time.

With x [P, Cs] the student's positions and t [P, Ct] the teacher's, both centred, the expanded feature of NORM (Liu et
al., ICLR 2023) is e = A x plus a constant, where A = diag(a) W1 and a depends on the batch only through S = Cov[x]. The
N segments A_i are their mean R and differences D_i = A_i - R, so that

    sum_i E||A_i x - t||^2 = sum_i <D_i S, D_i> + N E||R x - t||^2

and nothing of width N * Ct is needed per position. Where the segments match the teacher both terms are small sums of
small squares, and their gradients 2 D_i S and 2 E[(R x - t) x^T] are small too: none is a difference of large moments.
The same goes for the segments of W1, which are taken as their mean and what each differs from it.
"""
from typing import Any, Iterator, NamedTuple, Optional, Tuple

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ...utils.precision import full_float32
from .matmul import row_products
from .moments import Moments, residual_spread

# numbers of W1 worked on at a time: large enough for fast products, small enough for caches and memory
_PART_SIZE, _GPU_PART_SIZE = 2 ** 20, 2 ** 23


class Expansion(NamedTuple):
    """Expanding half of the transform for one batch, A = diag(a) W1.

    Attributes:
        contracted: W2 A, [Cs, Cs]; None without a contraction.
        loss: The N-to-one loss, scalar; 0 where nothing is matched.
        variance: Variances of W1 x, [N * Ct]; not differentiable, for running statistics.
    """
    contracted: Optional[torch.Tensor]
    loss: torch.Tensor
    variance: torch.Tensor


def match_expansion(
        expand: torch.Tensor,
        contract: Optional[torch.Tensor],
        scale: torch.Tensor,
        eps: Optional[float],
        matched: Moments,
        teacher: torch.Tensor,
        teacher_mean: torch.Tensor,
) -> Expansion:
    """Expand, contract and match what is centred: the loss lacks ||E[e] - E[t]||^2 / Ct.

    Args:
        expand: W1, [N * Ct, Cs].
        contract: W2, [Cs, N * Ct]; None for the loss alone.
        scale: The weight of a batch norm that reads the matched positions, else the factor a itself, [N * Ct].
        eps: That batch norm's; None where `scale` is a itself.
        matched: Moments of the positions that are matched.
        teacher: Teacher's feature map at these positions, [B, Ct, H, W].
        teacher_mean: Its mean over positions, [Ct].

    Returns:
        Contracted map, loss and variances; the loss in float64.
    """
    segments = expand.unflatten(0, (-1, len(teacher_mean)))
    columns = None if contract is None else contract.unflatten(1, segments.shape[:2])
    contracted, apart, reference, variance, factor = _ExpansionFunction.apply(
        segments, None if columns is None else columns.detach(), scale.view(segments.shape[:2]), eps, matched.cov)
    left = residual_spread(matched.centred, reference, teacher, teacher_mean)
    if columns is not None:
        # last: the gradient of W2 comes first then, and is passed on and gone before there is that of W1
        contracted = _ContractionFunction.apply(contracted, columns, segments.detach(), factor)
    return Expansion(contracted, (apart + len(segments) * left) / len(teacher_mean), variance.flatten())


class _State:
    """State between the forward and the backward pass, in the notation of `_ExpansionFunction`.

    What is one number for each row of W1 is in float64, where it costs nothing.

    Attributes:
        product: E S, [N, Ct, Cs]; None once the backward pass has overwritten it.
        factor: a, [N, Ct].
        apart: <E S, W1> of every row, [N, Ct].
        common: <W S, W1> of every row, [N, Ct].
        mean_product: W S, [Ct, Cs].
        weighted: F, [Ct, Cs].
    """

    def __init__(self, expand: torch.Tensor, scale: torch.Tensor):
        self.product: Optional[torch.Tensor] = torch.empty_like(expand)
        self.factor = scale.to(torch.float64, copy=True)
        self.apart, self.common = torch.empty_like(self.factor), torch.empty_like(self.factor)
        self.mean_product, self.weighted = torch.empty_like(expand[0]), torch.empty_like(expand[0])

    @property
    def variance(self) -> torch.Tensor:
        """v, [N, Ct]."""
        return self.apart + self.common

    def fill(self, weight: torch.Tensor, cov: torch.Tensor, rows: slice, eps: Optional[float]) -> torch.Tensor:
        """Compute what belongs to some rows of every segment and return their part of A."""
        assert self.product is not None
        mean = weight.mean(0)
        difference, mean_product = weight - mean, mean @ cov
        product = difference @ cov
        self.product[:, rows], self.mean_product[rows] = product, mean_product
        self.apart[:, rows] = row_products(product, weight)
        self.common[:, rows] = row_products(weight, mean_product)
        if eps is not None:
            self.factor[:, rows] *= (self.apart[:, rows] + self.common[:, rows] + eps).rsqrt()
        factor = _column(self.factor[:, rows], weight)
        self.weighted[rows] = difference.mul_(factor).mean(0)
        return torch.mul(weight, factor, out=difference)

    def reference(self, mean: torch.Tensor, cov: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return R and sum_i <D_i S, D_i>; what is mathematically not negative is not let below zero by rounding."""
        factor_mean = _column(self.factor.mean(0), mean)
        reference = torch.addcmul(self.weighted, factor_mean, mean)
        product = torch.addcmul(self.weighted @ cov, factor_mean, self.mean_product)  # R S
        shared = row_products(product, reference).sum()
        return reference, ((self.factor.square() * self.variance).sum() - len(self.factor) * shared).clamp_min(0.)

    def take_product(self, expand: torch.Tensor, cov: torch.Tensor) -> torch.Tensor:
        """Return E S to be overwritten; a second pass over a retained graph computes it again."""
        product, self.product = self.product, None
        if product is None:
            product = torch.empty_like(expand)
            for rows in _parts(expand):
                product[:, rows] = (expand[:, rows] - expand[:, rows].mean(0)) @ cov
        return product


class _ExpansionFunction(Function):
    """W2 A, sum_i <D_i S, D_i>, R, v and a; the last two without a gradient.

    v = diag(W1 S W1^T), a = scale / sqrt(v + eps), A = diag(a) W1. With W the mean segment of W1, E_i what a segment
    differs from it, b_i = a_i - E[a], F = E[a E] and means over the segments, R = F + E[a] W and
    D_i = a_i E_i + b_i W - F. With u the gradient of the sum, g that of v and K = W2^T grad(W2 A):

        grad A_i = 2 u (a_i E_i S + b_i W S) + G_i,    G_i = K_i + grad R / N - 2 u F S
        grad a   = <grad A, W1> of every row
        grad W1  = a grad A + 2 g W1 S
        grad S   = W1^T g W1 + u sum_i D_i^T D_i
                 = E^T (g + u a^2) E + Z + Z^T - N u F^T F,
        Z        = W^T sum_i ((g_i + u a_i b_i) E_i + (g_i + u b_i^2) W / 2)

    The last form needs one product of width N * Ct, and nothing large cancels in it. One function, since variances and
    sum read the same E S, and all outputs have a gradient of W1's size to W1: of separate ones the transform takes a
    third more time and twice the memory.
    """

    @staticmethod
    def forward(
            ctx: Any,
            expand: torch.Tensor,  # W1, [N, Ct, Cs]
            contract: Optional[torch.Tensor],  # W2, [Cs, N, Ct], without a gradient
            scale: torch.Tensor,  # [N, Ct]
            eps: Optional[float],
            cov: torch.Tensor,  # S, [Cs, Cs]
    ) -> Tuple[Optional[torch.Tensor], ...]:
        state, contracted = _State(expand, scale), None if contract is None else torch.zeros_like(cov)
        with full_float32():
            for rows in _parts(expand):
                scaled = state.fill(expand[:, rows], cov, rows, eps)
                if contract is not None:
                    contracted += contract[:, :, rows].flatten(1) @ scaled.flatten(0, 1)
            reference, apart = state.reference(expand.mean(0), cov)
        ctx.save_for_backward(expand, contract, scale, cov)
        ctx.eps, ctx.state = eps, state
        variance, factor = state.variance.to(scale.dtype), state.factor.to(scale.dtype, copy=True)
        ctx.mark_non_differentiable(variance, factor)
        return contracted, apart, reference, variance, factor

    @staticmethod
    @once_differentiable
    def backward(
            ctx: Any,
            grad_contracted: Optional[torch.Tensor],
            unit: torch.Tensor,
            grad_reference: torch.Tensor,
            *_: torch.Tensor,
    ) -> Tuple[Optional[torch.Tensor], ...]:
        expand, contract, scale, cov = ctx.saved_tensors
        state: _State = ctx.state
        deviation = state.factor - state.factor.mean(0)  # b
        grad_scale, grad_cov, mean_part = torch.empty_like(scale), torch.zeros_like(cov), torch.zeros_like(cov)
        with full_float32():
            grad_expand = state.take_product(expand, cov)
            for rows in _parts(expand):
                weight, a, b = expand[:, rows], state.factor[:, rows], deviation[:, rows]
                mean, weighted = weight.mean(0), state.weighted[rows]
                grad = (grad_reference[rows] / len(expand) - 2 * unit * (weighted @ cov)).expand_as(weight)  # G
                if contract is not None:
                    grad = grad + (contract[:, :, rows].flatten(1).t() @ grad_contracted).view_as(weight)
                slope = row_products(grad, weight) + 2 * unit * (a * state.apart[:, rows] + b * state.common[:, rows])
                grad_scale[:, rows], g = _norm_gradients(slope, scale[:, rows], state.variance[:, rows], ctx.eps)
                apart, common = _column(g + unit * a.square(), weight), _column(g + unit * a * b, weight)
                grad_expand[:, rows].mul_(2 * apart).addcmul_(grad, _column(a, weight)).addcmul_(
                    2 * common, state.mean_product[rows])
                difference = weight - mean
                constant = _column((g + unit * b.square()).sum(0), weight)
                mean_part += mean.t() @ (difference * common).sum(0).add_(0.5 * constant * mean)  # Z
                grad_cov -= len(expand) * unit * (weighted.t() @ weighted)
                grad_cov += difference.flatten(0, 1).t() @ (difference * apart).flatten(0, 1)
            grad_cov += mean_part + mean_part.t()
        return grad_expand, None, grad_scale, None, grad_cov


class _ContractionFunction(Function):
    """Hand W2 A on, and its gradient with that of W2, K A^T."""

    @staticmethod
    def forward(
            ctx: Any,
            contracted: torch.Tensor,
            contract: torch.Tensor,  # W2, [Cs, N, Ct]
            expand: torch.Tensor,  # W1, [N, Ct, Cs], without a gradient
            factor: torch.Tensor,  # a, [N, Ct]
    ) -> torch.Tensor:
        ctx.save_for_backward(expand, factor)
        return contracted.view_as(contracted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        expand, factor = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return grad, None, None, None
        grad_contract = expand.new_empty(len(grad), *factor.shape)
        with full_float32():
            for rows in _parts(expand):
                scaled = (expand[:, rows] * factor[:, rows, None]).flatten(0, 1)
                grad_contract[:, :, rows] = (grad @ scaled.t()).unflatten(1, (len(expand), -1))
        return grad, grad_contract, None, None


def _norm_gradients(
        slope: torch.Tensor,
        scale: torch.Tensor,
        variance: torch.Tensor,
        eps: Optional[float],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of scale and v, given that of a."""
    if eps is None:
        return slope, torch.zeros_like(slope)
    inverse = (variance + eps).rsqrt()
    return slope * inverse, -0.5 * slope * scale * inverse ** 3


def _parts(expand: torch.Tensor) -> Iterator[slice]:
    """Yield which rows of every segment of W1, [N, Ct, Cs], to work on at a time."""
    size = _PART_SIZE if expand.device.type == 'cpu' else _GPU_PART_SIZE
    step = max(1, size // expand[:, 0].numel())
    for start in range(0, expand.shape[1], step):
        yield slice(start, min(start + step, expand.shape[1]))


def _column(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a number for each row, [..., R], to multiply rows with, [..., R, 1], in the precision of `like`."""
    return values[..., None].to(like.dtype)
