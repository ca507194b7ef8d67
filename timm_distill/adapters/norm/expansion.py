"""The expanding half of the N-to-one transform and its contraction from moments, a few rows of W1 at a time.

With x [P, Cs] the student's positions and t [P, Ct] the teacher's, the expanded feature of NORM (Liu et al., ICLR 2023)
is e = A x + k, where A = diag(a) W1 and a depends on the batch only through S = Cov[x]. Its N segments A_i are their
mean R and differences D_i = A_i - R, so that with x and t centred and the constant parts apart

    sum_i E||A_i x - t||^2 = sum_i <D_i S, D_i> + N E||R x - t||^2

and nothing of width N * Ct is needed per position. Where the segments match the teacher both terms are small sums of
small squares, and their gradients 2 D_i S and 2 E[(R x - t) x^T] are small too: none is a difference of large moments.
The same goes for the segments of W1, which are taken as their mean and what each differs from it.
"""
from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ...utils.precision import full_float32
from .blocks import Segments, put_part
from .matmul import channel_means, gram, matmul_nn, matmul_nt, matmul_tn, row_products
from .moments import Moments, residual_spread


class Expansion(NamedTuple):
    """Expanding half of the transform for one batch, e = diag(a) W1 x + k.

    Attributes:
        contracted: W2 diag(a) W1, [Cs, Cs]; empty without a contraction.
        loss: The N-to-one loss, scalar; 0 where nothing is matched.
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
        teacher: Optional[torch.Tensor] = None,
) -> Expansion:
    """Expand, match and contract from moments.

    Args:
        expand: W1, [N * Ct, Cs].
        contract: W2, [Cs, N * Ct] or as a convolution's weight, [Cs, N * Ct, 1, 1].
        scale: The batch norm's weight in training, else the factor a itself, [N * Ct].
        offset: What e is where x equals E of the matched x minus `shift`, [N * Ct].
        cov: Cov[x] of the batch norm's positions, [Cs, Cs], in training; None where `scale` is a itself.
        eps: The batch norm's.
        matched: Moments of the positions that are matched, with `cov` itself where they are the same; None for none.
        shift: E[x] of the matched positions minus the point where e is `offset`, [Cs]; None for zero.
        teacher: Teacher's feature map at the matched positions, [B, Ct, H, W].

    Returns:
        Contracted map, loss and variances.
    """
    empty = expand.new_empty(0)
    same = matched is not None and cov is matched.cov
    # in float64: near a match the loss depends on the last bits of its difference to the offset
    teacher_mean = None if teacher is None else channel_means(teacher.detach())
    contracted, loss, variance, factor = _ExpansionFunction.apply(
        expand,
        empty if contract is None else contract.detach().flatten(1),
        scale,
        offset,
        empty if cov is None else cov,
        empty if matched is None or same else matched.cov,
        empty if shift is None else shift,
        empty if matched is None else matched.centred,
        empty if teacher is None else teacher.detach(),
        empty if teacher_mean is None else teacher_mean,
        eps,
        same,
    )
    if contract is not None:
        # last, and flattened here: its gradient comes first then, and is passed on and gone before there are others
        contracted = _ContractionFunction.apply(contracted, contract.flatten(1), expand.detach(), factor)
    return Expansion(contracted, loss, variance)


class _ExpansionFunction(Function):
    """Some rows of W1 at a time, in both directions.

    v = diag(W1 S W1^T), a = scale / sqrt(v + eps), A = diag(a) W1. With W the mean segment of W1, E_i what a segment
    differs from it, b_i = a_i - E[a] and means over the segments, a segment D_i of A minus its mean R is
    a_i E_i + b_i W - E[a E]. With g the gradient of v, d = R x - t centred, u = grad / Ct and K = W2^T grad(W2 A):

        grad A_i = 2 u (a_i E_i S + b_i W S) + 2 u (E[d x^T] - E[a E] S) + K_i
        grad W1  = a grad A + 2 g W1 S
        grad S   = W1^T g W1 + u sum_i D_i^T D_i
                 = E^T (g + u a^2) E + Z + Z^T - N u E[a E]^T E[a E],
        Z        = W^T sum_i ((g_i + u a_i b_i) E_i + (g_i + u b_i^2) W / 2)

    The last form needs one product of width N * Ct, and nothing large cancels in it.
    """

    @staticmethod
    def forward(
            ctx: Any,
            expand: torch.Tensor,
            contract: torch.Tensor,
            scale: torch.Tensor,
            offset: torch.Tensor,
            cov: torch.Tensor,
            matched_cov: torch.Tensor,
            shift: torch.Tensor,
            centred: torch.Tensor,
            teacher: torch.Tensor,
            teacher_mean: torch.Tensor,
            eps: float,
            same: bool,
    ) -> Tuple[torch.Tensor, ...]:
        batch_stats, matching = cov.numel() > 0, teacher_mean.numel() > 0
        match_cov = cov if same else matched_cov
        segments = Segments(expand, teacher_mean.shape[0] if matching else expand.shape[0])
        channels = expand.shape[1]
        contracted = expand.new_zeros(channels, channels) if contract.numel() else expand.new_empty(0)
        # one number for each row: in float64, where it costs nothing
        variance = torch.zeros_like(scale, dtype=torch.float64)
        spread_part, mean_part = torch.zeros_like(variance), torch.zeros_like(variance)  # of <E S, W1>, <W S, W1>
        factor = scale.to(torch.float64, copy=True)
        mean = segments.mean(expand) if matching else expand.new_empty(0)
        difference_mean = torch.zeros_like(mean)  # E[a E]
        # E S, or W1 S where nothing is matched: the backward pass needs it again, and its memory for the gradient
        product = torch.empty_like(expand) if matching or batch_stats else expand.new_empty(0)
        with full_float32():
            mean_product = matmul_nt(mean, match_cov) if matching else mean  # W S
            for part, rows in segments.parts():
                weight = expand[part]
                if matching:
                    difference = segments.minus(weight, mean, rows)
                    spread = matmul_nt(difference, match_cov)
                    product = put_part(product, part, spread)
                    spread_part[part] = segments.row_products(spread, weight)
                    mean_part[part] = segments.row_products(weight, mean_product[rows])
                if same:
                    variance[part] = spread_part[part] + mean_part[part]
                elif batch_stats:
                    spread = matmul_nt(weight, cov)
                    variance[part] = segments.row_products(spread, weight)
                    if not matching:
                        product = put_part(product, part, spread)
                if batch_stats:
                    factor[part] *= (variance[part] + eps).rsqrt()
                row_factor = factor[part].to(expand.dtype)
                if matching:
                    segments.add_to(difference_mean, difference, row_factor, rows)
                if contract.numel():
                    contracted += matmul_nn(contract[:, part], segments.scale(weight, row_factor))
            residual, loss, common, grad_centred = torch.zeros_like(scale), expand.new_zeros(()), mean, None
            if matching:
                difference_mean.div_(segments.count)
                factor_mean = segments.mean(factor)[:, None].to(expand.dtype)
                reference = torch.addcmul(difference_mean, factor_mean, mean)
                spread_mean = matmul_nt(difference_mean, match_cov)  # E[a E] S
                reference_product = torch.addcmul(spread_mean, factor_mean, mean_product)
                residual = _constant_residual(factor, expand, offset, shift, teacher_mean)
                shared = row_products(reference_product, reference, reference_product)
                left, grad_centred, grad_reference = residual_spread(
                    centred, reference, teacher, teacher_mean, any(ctx.needs_input_grad))
                loss = _loss(factor, spread_part + mean_part, shared, residual, left)
                if grad_reference is not None:
                    common = grad_reference.sub_(spread_mean, alpha=2).div_(len(reference))
        ctx.save_for_backward(
            expand, contract, scale, cov, matched_cov, shift, centred, teacher, teacher_mean,
            variance, factor, spread_part, mean_part, residual, mean_product, difference_mean, common)
        ctx.grad_centred = grad_centred
        ctx.product = product if matching or batch_stats else None
        ctx.options = (eps, same)
        rounded, row_factors = variance.to(scale.dtype, copy=True), factor.to(scale.dtype, copy=True)
        ctx.mark_non_differentiable(rounded, row_factors)
        return contracted, loss, rounded, row_factors

    @staticmethod
    @once_differentiable
    def backward(
            ctx: Any,
            grad_contracted: torch.Tensor,
            grad_loss: torch.Tensor,
            *_: torch.Tensor,
    ) -> Tuple[Optional[torch.Tensor], ...]:
        with full_float32():
            return _ExpansionBackward(ctx, grad_contracted, grad_loss).run()


class _ExpansionBackward:
    """The backward pass of `_ExpansionFunction`; `grad_NAME` is the gradient of what is called NAME there."""

    def __init__(self, ctx: Any, grad_contracted: torch.Tensor, grad_loss: torch.Tensor):
        (
            self.expand, self.contract, self.scale, self.cov, self.matched_cov, self.shift, self.centred, self.teacher,
            self.teacher_mean, self.variance, self.factor, self.spread_part, self.mean_part, residual,
            self.mean_product, self.difference_mean, self.common) = ctx.saved_tensors
        self.eps, self.same = ctx.options
        # a second pass over a retained graph computes these again
        self.product, ctx.product, self.grad_centred, ctx.grad_centred = ctx.product, None, ctx.grad_centred, None
        self.batch_stats, self.matching = self.cov.numel() > 0, self.common.numel() > 0
        self.match_cov = self.cov if self.same else self.matched_cov
        self.segments = Segments(self.expand, len(self.common) if self.matching else len(self.expand))
        self.grad_loss, self.grad_contracted = grad_loss, grad_contracted.contiguous()
        self.grad_expand = torch.empty_like(self.expand) if self.product is None else self.product
        self.grad_cov, self.grad_matched_cov, self.grad_shift = (
            torch.zeros_like(x) for x in (self.cov, self.matched_cov, self.shift))
        self.grad_scale, self.grad_offset = torch.empty_like(self.scale), residual
        if self.matching:
            self.unit = grad_loss / len(self.common)
            self.grad_offset = 2 * self.unit * residual
            self.mean = self.segments.mean(self.expand)  # W, taken again rather than kept
            factor_mean = self.segments.mean(self.factor)
            self.factor_mean = factor_mean[:, None].to(self.mean.dtype)
            self.deviation = self.factor - factor_mean.repeat(self.segments.count)  # b
            self.half, self.half_factor = torch.zeros_like(self.mean), torch.zeros_like(factor_mean)  # of Z = W^T half

    def run(self) -> Tuple[Optional[torch.Tensor], ...]:
        """Return the gradients of the function's inputs."""
        if self.product is None and (self.matching or self.batch_stats):
            self._repeat_product()
        reference = self._reference() if self.matching and not self.same else None  # R
        for part, rows in self.segments.parts():
            grad, slope = self._map_gradient(part, rows)
            inner = self._variance_gradient(part, slope)
            self._weight_gradient(part, rows, grad, inner)
            if self.same:
                self._add_to_matched_cov(part, rows, inner)
                continue
            if self.batch_stats:
                self.grad_cov += gram(self.expand[part], inner.to(self.expand.dtype))
            if reference is not None:
                scaled = self.segments.scale(self.expand[part], self.factor[part].to(self.expand.dtype))
                distance = self.segments.minus(scaled, reference, rows)  # D
                self.grad_matched_cov += gram(distance)
        if self.same:
            self._finish_matched_cov()
        return (
            self.grad_expand,
            None,
            self.grad_scale,
            self.grad_offset,
            self.grad_cov if self.batch_stats else None,
            self.grad_matched_cov.mul_(self.unit) if self.matching and not self.same else None,
            self.grad_shift if self.shift.numel() else None,
            self._centred_gradient() if self.matching else None,
            None, None, None, None,
        )

    def _reference(self) -> torch.Tensor:
        """Return R."""
        return torch.addcmul(self.difference_mean, self.factor_mean, self.mean)

    def _centred_gradient(self) -> torch.Tensor:
        """Return that of x in E||R x - t||^2."""
        gradient = self.grad_centred
        if gradient is None:
            gradient = residual_spread(self.centred, self._reference(), self.teacher, self.teacher_mean).grad_centred
            assert gradient is not None
        return gradient.mul_(self.segments.count * self.unit)

    def _repeat_product(self) -> None:
        """Write E S, or W1 S where nothing is matched, as the forward pass did."""
        for part, rows in self.segments.parts():
            weight = self.expand[part]
            difference = self.segments.minus(weight, self.mean, rows) if self.matching else weight
            self.grad_expand[part] = matmul_nt(difference, self.match_cov if self.matching else self.cov)

    def _map_gradient(self, part: slice, rows: slice) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return that of A but for 2 u (a E S + b W S), and that of a."""
        weight = self.expand[part]
        if self.contract.numel():
            grad = self.segments.product_of_columns(self.contract[:, part], self.grad_contracted)
        else:
            grad = torch.zeros_like(weight)
        if not self.matching:
            return grad, self.segments.row_products(grad, weight)
        factor, deviation = self.factor[part], self.deviation[part]
        self.segments.add_scaled_(grad, self.common, self.grad_loss.expand(len(grad)), rows)
        if self.shift.numel():
            grad.addr_(self.grad_offset[part], self.shift)
            self.grad_shift += weight.t() @ (factor.to(weight.dtype) * self.grad_offset[part])
        slope = self.segments.row_products(grad, weight)
        return grad, slope + 2 * self.unit * (factor * self.spread_part[part] + deviation * self.mean_part[part])

    def _variance_gradient(self, part: slice, slope: torch.Tensor) -> torch.Tensor:
        """Return that of v, given that of a, and write that of the scale; zero where a is given."""
        if not self.batch_stats:
            self.grad_scale[part] = slope
            return torch.zeros_like(slope)
        inverse = (self.variance[part] + self.eps).rsqrt()
        self.grad_scale[part] = slope * inverse
        return -0.5 * slope * self.scale[part] * inverse ** 3

    def _weight_gradient(self, part: slice, rows: slice, grad: torch.Tensor, inner: torch.Tensor) -> None:
        """Write that of W1 where E S is, or W1 S where nothing is matched; given that of v."""
        weight, result, factor = self.expand[part], self.grad_expand[part], self.factor[part]
        row_factor, row_inner = factor[:, None].to(weight.dtype), (2 * inner)[:, None].to(weight.dtype)
        if not self.matching:
            if self.batch_stats:
                result.mul_(row_inner).addcmul_(grad, row_factor)
            else:
                torch.mul(grad, row_factor, out=result)
            return
        spread, mean = 2 * self.unit * factor.square(), 2 * self.unit * factor * self.deviation[part]
        if self.same:
            spread, mean = spread + 2 * inner, mean + 2 * inner
        result.mul_(spread[:, None].to(weight.dtype)).addcmul_(grad, row_factor)
        self.segments.add_scaled_(result, self.mean_product, mean.to(weight.dtype), rows)
        if self.batch_stats and not self.same:
            result.addcmul_(matmul_nt(weight, self.cov), row_inner)

    def _add_to_matched_cov(self, part: slice, rows: slice, inner: torch.Tensor) -> None:
        """Add a part to the gradient of S, which variances and loss share, given that of v."""
        factor, deviation, dtype = self.factor[part], self.deviation[part], self.expand.dtype
        difference = self.segments.minus(self.expand[part], self.mean, rows)  # E
        self.segments.add_to(self.half, difference, (inner + self.unit * factor * deviation).to(dtype), rows)
        self.segments.add_to(self.half_factor, inner + self.unit * deviation.square(), None, rows)
        self.grad_cov += gram(difference, (inner + self.unit * factor.square()).to(dtype))

    def _finish_matched_cov(self) -> None:
        """Add what the parts have in common to the gradient of S: Z + Z^T - N u E[a E]^T E[a E]."""
        self.half.addcmul_(self.mean, 0.5 * self.half_factor[:, None].to(self.mean.dtype))
        half = matmul_tn(self.mean, self.half)
        self.grad_cov += half.add_(half.t().clone())
        self.grad_cov -= gram(self.difference_mean) * (self.segments.count * self.unit)


class _ContractionFunction(Function):
    """Hand W2 A on, and its gradient with that of W2, K A^T, which so is done with before that of W1 is computed."""

    @staticmethod
    def forward(
            ctx: Any,
            contracted: torch.Tensor,
            contract: torch.Tensor,
            expand: torch.Tensor,
            factor: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(expand, factor)
        return contracted.view_as(contracted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        expand, factor = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return grad, None, None, None
        segments, grad_contract = Segments(expand, len(expand)), expand.new_empty(len(grad), len(expand))
        with full_float32():
            for part, _ in segments.parts():
                product = matmul_nt(grad, segments.scale(expand[part], factor[part]))
                grad_contract = put_part(grad_contract, (slice(None), part), product)
        return grad, grad_contract, None, None


def _constant_residual(
        factor: torch.Tensor,
        expand: torch.Tensor,
        offset: torch.Tensor,
        shift: torch.Tensor,
        teacher_mean: torch.Tensor,
) -> torch.Tensor:
    """Return E[e] - E[t] of every channel, [N * Ct]."""
    mean = offset + factor * (expand @ shift) if shift.numel() else offset
    return (mean.unflatten(0, (-1, teacher_mean.shape[0])) - teacher_mean).flatten().to(offset.dtype, copy=True)


def _loss(
        factor: torch.Tensor,
        matched_variance: torch.Tensor,
        shared: torch.Tensor,
        residual: torch.Tensor,
        left: torch.Tensor,
) -> torch.Tensor:
    """Combine the sums in float64; what is mathematically not negative is not let below zero by rounding."""
    segments = factor.shape[0] / shared.shape[0]
    quadratic = (factor.square() * matched_variance).sum(dtype=torch.float64)
    differences = (quadratic - segments * shared.sum(dtype=torch.float64)).clamp_min(0.)
    constant = residual.square().sum(dtype=torch.float64)
    return ((differences + constant + segments * left) / shared.shape[0]).to(residual.dtype)
