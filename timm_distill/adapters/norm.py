"""The N-to-one feature transform (FT).

NORM: Knowledge Distillation via N-to-One Representation Matching (Liu et al., ICLR 2023),
https://openreview.net/forum?id=CRNwGauQpb6.

Two linear layers with nothing in between: the first expands the student's feature to N times the teacher's channels,
the second contracts it back. `batch_norm=True, residual=True` is the published code (a batch norm behind each layer, a
residual connection around both); `batch_norm=False` is the plain linear pair of the paper's text.
"""
import logging
from typing import Optional, Tuple, Union

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UsageError
from ..expansion import Expansion, expand_moments
from ..linalg import AffineMap, add_identity, batch_norm_affine, compose, scale_shift, to_float64
from ..losses import match_grids, n_to_one_loss, to_full_precision
from ..moments import (
    BatchStatistics,
    Moments,
    compute_moments,
    map_rows,
    row_variances,
    share_moments,
)
from ..products import from_rows
from .base import Adapter, AdapterOutput, Match, register_adapter

_logger = logging.getLogger(__name__)


_FORMS = ('auto', 'direct', 'moments')
_POOLS = ('avg', 'max')
_DIRECT_BYTES = 2 ** 30  # activations of the direct form above which 'auto' leaves it


def batch_norm_mean_response(norm: nn.Module, input: torch.Tensor) -> torch.Tensor:
    """Return scale * mean, [C], of a batch norm for the statistics that it uses for this input, [B, C, H, W]."""
    if norm.training:
        var, mean = torch.var_mean(to_full_precision(input), dim=(0, 2, 3), correction=0)
    else:
        var, mean = norm.running_var, norm.running_mean  # type: ignore[assignment]
    return norm.weight * mean * (var + norm.eps).rsqrt()


@register_adapter('norm')
class NToOneTransform(Adapter):
    """Expand to N x Ct channels, contract to Cs; affine at inference (NORM, ICLR 2023).

    With x the student's feature: `e = BN1(W1 x)`, `y = x + BN2(W2 e)`.

    Args:
        student_channels: Cs.
        teacher_channels: Ct.
        segments: N, how many segments of the expanded feature are matched with the teacher's.
        batch_norm: Put a batch norm behind each layer; else the layers have biases.
        residual: Add the input to the output.
        pool: How the larger of two grids is pooled to the smaller for the match, 'avg' or 'max'.
        form: 'direct' computes e; 'moments' gets loss and output from the batch's moments, exactly and without any
            activation of N * Ct channels; 'auto' takes the cheaper for the batch. Parameters are the same.
        offset: Let the output have an offset. Without, y is a linear map of x at inference, for consumers that cannot
            take an offset: the contraction reads e without its offset, and BN2 only scales.
        side: Expand for the loss alone and leave the student's path as it is.

    Raises:
        UsageError: If a value is not allowed.
    """

    def __init__(
            self,
            student_channels: int,
            teacher_channels: int,
            segments: int = 8,
            batch_norm: bool = True,
            residual: bool = True,
            pool: str = 'avg',
            form: str = 'auto',
            offset: bool = True,
            side: bool = False,
    ):
        super().__init__(student_channels, teacher_channels)
        if not 1 <= segments <= 1024:
            raise UsageError(f'norm.segments={segments} must be from 1 to 1024 (--kd-kwargs norm.segments=8).')
        for option, value, known in (('pool', pool, _POOLS), ('form', form, _FORMS)):
            if value not in known:
                raise UsageError(f"norm.{option}={value!r} must be one of {', '.join(known)} "
                                 f'(--kd-kwargs norm.{option}={known[0]}).')
        self.segments = segments
        self.batch_norm = batch_norm
        self.residual = residual
        self.pool = pool
        self.form = form
        self._logged_form = ''
        self.offset = offset
        width = segments * teacher_channels
        self.expand = nn.Conv2d(student_channels, width, 1, bias=not batch_norm)
        self.expand_bn = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        self.contract: Optional[nn.Conv2d] = None
        if not side:
            self.contract = nn.Conv2d(width, student_channels, 1, bias=offset and not batch_norm)
            self.contract_bn = nn.BatchNorm2d(student_channels) if batch_norm else nn.Identity()
            if batch_norm and not offset:
                self.contract_bn.register_parameter('bias', None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the official code does: Kaiming normal over the fan-out, batch norms at identity."""
        for module in self.children():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor, match: Optional[Match] = None) -> AdapterOutput:
        if self._choose_form(x, match) == 'moments':
            device = x.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
            # moments in float32, whatever the precision around
            with torch.autocast(device, enabled=False):
                return self._from_moments(x, match, dtype)
        output, expanded = self.expand_contract(x)
        if match is None:
            return AdapterOutput(output)
        student, teacher = match_grids(match.to_map(expanded), match.teacher, self.pool)
        return AdapterOutput(output, n_to_one_loss(student, teacher, self.segments))

    def _choose_form(self, x: torch.Tensor, match: Optional[Match]) -> str:
        max_pooled = self.pool == 'max' and match is not None and _pools_student(match.to_map(x), match.teacher)
        form = self.form
        if not self.offset and isinstance(self.expand_bn, nn.SyncBatchNorm):
            form = 'moments'  # only these know the offset over all ranks
        if form == 'auto':
            form = 'direct' if max_pooled or not self._moments_are_cheaper(x) else 'moments'
            if form != self._logged_form and self.training:
                _logger.info(f'The N-to-one transform takes the {form} form at {_count_positions(x)} positions.')
                self._logged_form = form
        elif form == 'moments' and max_pooled:
            raise UsageError("norm.form=moments cannot max-pool the student's side: take norm.pool=avg or "
                             'norm.form=direct.')
        return form

    def _moments_are_cheaper(self, x: torch.Tensor) -> bool:
        """Compare the multiply-adds of a forward and backward pass, and what the direct form keeps."""
        positions, cs, ct = _count_positions(x), self.student_channels, self.teacher_channels
        width = self.segments * ct
        direct = 6 * positions * width * cs
        moments = (5 * width + 4 * ct) * cs ** 2 + positions * (5 * cs ** 2 + 5 * cs * ct)
        return moments < direct or 5 * positions * width * x.element_size() > _DIRECT_BYTES

    def expand_contract(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return output, [B, Cs, H, W], and expanded feature, [B, N * Ct, H, W]: the reference."""
        if x.shape[-1] == 1 and x.shape[-2] > 1:
            # Tokens, [B, Cs, L, 1], fit both memory formats, and torch's batch norm on the CPU then gives wrong
            # gradients where input and gradient differ in theirs (seen with 2.15). As images of one position each
            # they have a single format.
            output, expanded = self.expand_contract(x.permute(0, 2, 3, 1).reshape(-1, x.shape[1], 1, 1))
            return _unflatten_positions(output, x), _unflatten_positions(expanded, x)
        linear = self.expand(x)
        expanded = self.expand_bn(linear)
        if self.contract is None:
            return x, expanded
        output = self.contract(expanded)
        if not self.offset:
            offset = _matrix(self.contract) @ self._expansion_offset(linear)
            output = output - offset[:, None, None].to(output.dtype)
        contracted, output = output, self.contract_bn(output)
        if self.batch_norm and not self.offset:
            response = batch_norm_mean_response(self.contract_bn, contracted)
            output = output + response[:, None, None].to(output.dtype)
        return x + output if self.residual else output, expanded

    def _expansion_offset(self, linear: torch.Tensor) -> torch.Tensor:
        """Return the offset of e, [N * Ct]: what it is for x = 0."""
        if self.batch_norm:
            bias = to_full_precision(self.expand_bn.bias)  # type: ignore[arg-type]
            return bias - batch_norm_mean_response(self.expand_bn, linear)
        assert self.expand.bias is not None
        return to_full_precision(self.expand.bias)

    @torch.compiler.disable
    def _from_moments(self, x: torch.Tensor, match: Optional[Match], dtype: torch.dtype) -> AdapterOutput:
        """Return what `forward` does; the output's own product is of `dtype`, the rest of full precision.

        Not traced by `torch.compile`: these are products with gradients written by hand.
        """
        moments = compute_moments(to_full_precision(x))
        matched, teacher = self._matched_moments(x, match, moments)
        batch_stats = self._share(moments) if self.batch_norm and self.training else None
        scale, offset = self._expansion_scale(batch_stats is not None)
        expansion = expand_moments(
            _matrix(self.expand),
            None if self.contract is None else to_full_precision(self.contract.weight),
            scale,
            offset,
            None if batch_stats is None else batch_stats.cov,
            float(self.expand_bn.eps) if self.batch_norm else 0.,  # type: ignore[arg-type]
            matched,
            None if matched is None else _shift(matched, batch_stats),
            teacher,
        )
        if batch_stats is not None:
            mean = _matrix(self.expand).detach() @ batch_stats.mean.detach()
            _update_running(self.expand_bn, mean, expansion.variance, batch_stats.num_positions)
        loss = None if matched is None else expansion.loss
        if self.contract is None:
            return AdapterOutput(x, loss)
        weight, bias = self._contract(expansion, offset, batch_stats, moments)
        rows = moments.centred.to(dtype)
        if self.residual and rows.dtype == x.dtype == moments.centred.dtype:  # no rounding of x to `dtype` then
            output = map_rows(rows, weight, bias + moments.mean, residual=True)
            return AdapterOutput(from_rows(output, x), loss)
        output = from_rows(map_rows(rows, weight, bias), x)
        return AdapterOutput(x + output if self.residual else output, loss)

    def _matched_moments(
            self,
            x: torch.Tensor,
            match: Optional[Match],
            moments: Moments,
    ) -> Tuple[Optional[Moments], Optional[torch.Tensor]]:
        """Return the moments of the positions that are matched, and the teacher's map there."""
        if match is None:
            return None, None
        student, teacher = match.to_map(x), match.teacher
        if student.shape[-2:] != teacher.shape[-2:]:
            student, teacher = match_grids(to_full_precision(student), to_full_precision(teacher), self.pool)
        # the map holds all positions unless prefix tokens were dropped or it was pooled
        if _count_positions(student) == _count_positions(x):
            return moments, teacher
        return compute_moments(to_full_precision(student)), teacher

    def _share(self, moments: Moments) -> BatchStatistics:
        """Return the batch norms' statistics, over all ranks where they are synchronised."""
        if isinstance(self.expand_bn, nn.SyncBatchNorm) and dist.is_initialized():
            return share_moments(moments, self.expand_bn.process_group)
        return BatchStatistics(moments.mean, moments.cov, moments.centred.shape[0])

    def _expansion_scale(self, batch_stats: bool) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return scale and offset of the expansion for `expand_moments`."""
        norm = self.expand_bn
        if not self.batch_norm:
            assert self.expand.bias is not None
            bias = to_full_precision(self.expand.bias)
            return torch.ones_like(bias), bias
        weight, bias = to_full_precision(norm.weight), to_full_precision(norm.bias)  # type: ignore[arg-type]
        if batch_stats:
            return weight, bias
        scale = weight * (to_full_precision(norm.running_var) + norm.eps).rsqrt()  # type: ignore[arg-type]
        return scale, bias - scale * norm.running_mean

    def _contract(
            self,
            expansion: Expansion,
            offset: torch.Tensor,
            batch_stats: Optional[BatchStatistics],
            moments: Moments,
    ) -> AffineMap:
        """Return the contracted map of the centred feature, with the second batch norm."""
        assert self.contract is not None
        weight, norm = expansion.contracted, self.contract_bn
        if batch_stats is not None:
            variance = row_variances(weight, batch_stats.cov)
            with torch.no_grad():
                mean = _matrix(self.contract) @ offset if self.offset else weight @ batch_stats.mean
                _update_running(norm, mean, variance.detach(), batch_stats.num_positions)
            weight = (norm.weight * (variance + norm.eps).rsqrt())[:, None] * weight
            if not self.offset:
                return AffineMap(weight, weight @ moments.mean)
            bias, shift = to_full_precision(norm.bias), _shift(moments, batch_stats)  # type: ignore[arg-type]
            return AffineMap(weight, bias if shift is None else bias + weight @ shift)
        bias = torch.zeros_like(weight[0])
        if self.offset:
            bias = _matrix(self.contract) @ offset
        if self.batch_norm:
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            weight = scale[:, None] * weight
            bias = scale * (bias - norm.running_mean) + norm.bias if self.offset else bias
        elif self.offset:
            bias = bias + self.contract.bias
        return AffineMap(weight, bias + weight @ moments.mean)

    def affine(self) -> AffineMap:
        if self.contract is None:
            raise ValueError('A side adapter is not on the student\'s path: there is nothing to merge.')
        affine = compose(_layer_affine(self.contract, self.contract_bn), _layer_affine(self.expand, self.expand_bn))
        if not self.offset:
            affine = AffineMap(affine.weight, torch.zeros_like(affine.bias))
        return add_identity(affine) if self.residual else affine

    def extra_repr(self) -> str:
        return f'segments={self.segments}, residual={self.residual}, form={self.form}'


def _layer_affine(conv: nn.Conv2d, norm: nn.Module) -> AffineMap:
    affine = AffineMap(*_conv_tensors(conv))
    if isinstance(norm, nn.Identity):
        return affine
    return scale_shift(affine, *batch_norm_affine(
        norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps))  # type: ignore[arg-type]


def _conv_tensors(conv: nn.Conv2d) -> Tuple[torch.Tensor, torch.Tensor]:
    weight = to_float64(conv.weight).flatten(1)
    bias = weight.new_zeros(weight.shape[0]) if conv.bias is None else to_float64(conv.bias)
    return weight, bias


def _unflatten_positions(positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return [B * L, C, 1, 1] as [B, C, L, 1], with B and L of `x`."""
    return positions.view(x.shape[0], x.shape[2], 1, -1).permute(0, 3, 1, 2)


def _matrix(conv: nn.Conv2d) -> torch.Tensor:
    """Return the weight of a 1x1 convolution as [C_out, C_in], in float32 or better."""
    return to_full_precision(conv.weight).flatten(1)


def _count_positions(x: torch.Tensor) -> int:
    return x.numel() // x.shape[1]


def _pools_student(student: torch.Tensor, teacher: torch.Tensor) -> bool:
    return student.shape[-2] > teacher.shape[-2] or student.shape[-1] > teacher.shape[-1]


def _shift(moments: Moments, batch_stats: Optional[BatchStatistics]) -> Optional[torch.Tensor]:
    """Return a mean relative to the batch norms', or to zero; None where it is theirs."""
    if batch_stats is None:
        return moments.mean
    return None if moments.mean is batch_stats.mean else moments.mean - batch_stats.mean


@torch.no_grad()
def _update_running(
        norm: nn.Module,
        mean: torch.Tensor,
        variance: torch.Tensor,
        num_positions: Union[int, torch.Tensor],
) -> None:
    """Update running statistics as a batch norm does, from a biased variance."""
    assert isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None
    norm.num_batches_tracked.add_(1)
    unbiased = variance * num_positions / (num_positions - 1)
    for running, value in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running.lerp_(value.to(running.dtype), float(norm.momentum))  # type: ignore[arg-type]
