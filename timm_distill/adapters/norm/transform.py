"""The N-to-one feature transform (FT).

NORM: Knowledge Distillation via N-to-One Representation Matching (Liu et al., ICLR 2023),
https://openreview.net/forum?id=CRNwGauQpb6.

Two linear layers with nothing in between: the first expands the student's feature to N times the teacher's channels,
the second contracts it back. `batch_norm=True, residual=True` is the published code (a batch norm behind each layer, a
residual connection around both); `batch_norm=False` is the plain linear pair of the paper's text.
"""
import logging
from typing import Annotated, Any, NamedTuple, Optional, Tuple, cast

import torch
import torch.nn as nn

from ...errors import UsageError
from ...losses import match_grids, n_to_one_loss, to_full_precision
from ...utils.affine import AffineMap, add_identity, batch_norm_affine, compose, scale_shift, to_float64
from ...utils.batch_norm import is_batch_norm
from ...utils.ranges import OneOf, Range
from ..base import Adapter, AdapterOutput, Match, register_adapter
from .expansion import Expansion, expand_moments
from .matmul import from_rows
from .moments import BatchStatistics, Moments, compute_moments, map_rows, row_variances
from .statistics import (
    batch_statistics,
    count_ranks,
    is_known_norm,
    reads_batch,
    running_scale_and_shift,
    scale_and_bias,
    update_running,
    value_at_zero,
)

_logger = logging.getLogger(__name__)

_DIRECT_BYTES = 2 ** 30  # activations of the direct form above which 'auto' leaves it


class _Statistics(NamedTuple):
    """Statistics of a batch for the two batch norms; None for one that reads its running statistics, or is none."""
    expand: Optional[BatchStatistics]
    contract: Optional[BatchStatistics]


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
        init: 'identity' starts with an output that is the input, by a last batch norm of scale 0 (without batch norms:
            a contraction of weight 0), so that a student keeps its accuracy until it learns; the match trains the
            expansion meanwhile. 'official' starts at random as the published code does. 'auto' is the former for a
            student that comes with weights and the latter for others.

    Raises:
        UsageError: If the transform cannot be the identity and has to.
    """

    def __init__(
            self,
            student_channels: int,
            teacher_channels: int,
            segments: Annotated[int, Range(1, 1024, whole=True)] = 8,
            batch_norm: bool = True,
            residual: bool = True,
            pool: Annotated[str, OneOf('avg', 'max')] = 'avg',
            form: Annotated[str, OneOf('auto', 'direct', 'moments')] = 'auto',
            offset: bool = True,
            side: bool = False,
            init: Annotated[str, OneOf('auto', 'identity', 'official')] = 'auto',
    ):
        super().__init__(student_channels, teacher_channels)
        self.segments = segments
        self.batch_norm = batch_norm
        self.residual = residual
        self.pool = pool
        self.form = form
        self.init = init
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
        if self.init == 'identity':
            obstacle = self._identity_obstacle()
            if obstacle:
                raise UsageError(
                    f'norm.init=identity is impossible: {obstacle}. Give norm.residual=True, or '
                    'norm.init=official (--kd-kwargs).')
            self._become_identity()

    def start_pretrained(self) -> None:
        if self.init != 'auto' or self.contract is None:
            return
        obstacle = self._identity_obstacle()
        if obstacle:
            _logger.warning(
                "The N-to-one transform starts at random on the path of a student that comes with weights, "
                f'whose accuracy it takes at first: it cannot start as the identity, {obstacle}. '
                '--kd-kwargs norm.residual=True lets it.')
            return
        _logger.info(
            'The N-to-one transform starts as the identity, since the student comes with weights '
            '(--kd-kwargs norm.init=official starts at random).')
        self._become_identity()

    def _identity_obstacle(self) -> str:
        """Return why the transform cannot start as the identity, '' where it can."""
        if self.residual or self.contract is None:
            return ''
        if self.batch_norm:
            return 'without the residual connection its batch norms give every channel another mean and deviation'
        width = self.segments * self.teacher_channels
        if width < self.student_channels:
            return f'without the residual connection {width} channels cannot carry {self.student_channels}'
        return ''

    @torch.no_grad()
    def _become_identity(self) -> None:
        if self.contract is None:
            return
        if not self.residual:
            inverse = torch.linalg.pinv(_conv_tensors(self.expand)[0])
            self.contract.weight.copy_(inverse[:, :, None, None])
        elif self.batch_norm:
            nn.init.zeros_(cast(torch.Tensor, self.contract_bn.weight))
        else:
            nn.init.zeros_(self.contract.weight)

    def _norms(self) -> Tuple[nn.Module, ...]:
        return (self.expand_bn,) if self.contract is None else (self.expand_bn, self.contract_bn)

    def forward(self, x: torch.Tensor, match: Optional[Match] = None) -> AdapterOutput:
        self._check_positions(x)
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

    def _check_positions(self, x: torch.Tensor) -> None:
        """Reject a batch that has no variance, which a batch norm would divide by."""
        if _count_positions(x) == 1 and any(reads_batch(norm) and count_ranks(norm) == 1 for norm in self._norms()):
            raise UsageError(
                "The batch norms of the N-to-one transform need two positions in a batch, of which this "
                'one has 1: give a larger --batch-size, or --kd-kwargs norm.batch_norm=False.')

    def _choose_form(self, x: torch.Tensor, match: Optional[Match]) -> str:
        if self.batch_norm and not all(is_known_norm(norm) for norm in self._norms()):
            return 'direct'  # runs a norm of whatever kind
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
            raise UsageError(
                "norm.form=moments cannot max-pool the student's side: take norm.pool=avg or "
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
            output = output - value_at_zero(self.contract_bn, contracted)[:, None, None].to(output.dtype)
        return x + output if self.residual else output, expanded

    def _expansion_offset(self, linear: torch.Tensor) -> torch.Tensor:
        """Return the offset of e, [N * Ct]: what it is for x = 0."""
        if self.batch_norm:
            return value_at_zero(self.expand_bn, linear)
        assert self.expand.bias is not None
        return to_full_precision(self.expand.bias)

    @torch.compiler.disable
    def _from_moments(self, x: torch.Tensor, match: Optional[Match], dtype: torch.dtype) -> AdapterOutput:
        """Return what `forward` does; the output's own product is of `dtype`, the rest of full precision.

        Not traced by `torch.compile`: these are products with gradients written by hand.
        """
        moments = compute_moments(to_full_precision(x))
        matched, teacher = self._matched_moments(x, match, moments)
        stats = self._batch_statistics(moments)
        scale, offset = self._expansion_scale(stats.expand is not None)
        eps: Any = self.expand_bn.eps if self.batch_norm else 0.
        expansion = expand_moments(
            _matrix(self.expand),
            None if self.contract is None else to_full_precision(self.contract.weight),
            scale,
            offset,
            None if stats.expand is None else stats.expand.cov,
            eps,
            matched,
            None if matched is None else _shift(matched.mean, stats.expand),
            teacher,
        )
        if stats.expand is not None:
            mean = _matrix(self.expand).detach() @ stats.expand.mean.detach()
            update_running(self.expand_bn, mean, expansion.variance, stats.expand.num_positions)
        loss = None if matched is None else expansion.loss
        if self.contract is None:
            return AdapterOutput(x, loss)
        weight, bias = self._contract(expansion, offset, stats, moments)
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

    def _batch_statistics(self, moments: Moments) -> _Statistics:
        """Return what each batch norm reads of the batch, over all ranks where it is synchronised."""
        if not self.batch_norm:
            return _Statistics(None, None)
        expand = batch_statistics(self.expand_bn, moments)
        if self.contract is None:
            return _Statistics(expand, None)
        # most often both read the same: it is shared over the ranks once
        same = expand is not None and reads_batch(self.contract_bn) and (
            getattr(self.expand_bn, 'process_group', None) is getattr(self.contract_bn, 'process_group', None)
            and count_ranks(self.expand_bn) == count_ranks(self.contract_bn))
        return _Statistics(expand, expand if same else batch_statistics(self.contract_bn, moments))

    def _expansion_scale(self, from_batch: bool) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return scale and offset of the expansion for `expand_moments`."""
        if self.batch_norm:
            if not from_batch:
                return running_scale_and_shift(self.expand_bn)
            return scale_and_bias(self.expand_bn, _matrix(self.expand)[:, 0])
        assert self.expand.bias is not None
        bias = to_full_precision(self.expand.bias)
        return torch.ones_like(bias), bias

    def _contract(
            self,
            expansion: Expansion,
            offset: torch.Tensor,
            stats: _Statistics,
            moments: Moments,
    ) -> AffineMap:
        """Return the contracted map of the centred feature, with the second batch norm."""
        assert self.contract is not None
        weight, norm, batch = expansion.contracted, self.contract_bn, stats.contract
        if batch is None:
            scale, shift = self._contraction_scale()
            constant = self._contracted_constant(weight, offset, moments.mean, stats.expand)
            weight = scale[:, None] * weight
            return AffineMap(weight, scale * constant + shift if self.offset else weight @ moments.mean)
        variance = row_variances(weight, batch.cov)
        with torch.no_grad():
            mean = self._contracted_constant(weight, offset, batch.mean, stats.expand)
            update_running(norm, mean, variance.detach(), batch.num_positions)
        scale, bias = scale_and_bias(norm, variance)
        weight = (scale * (variance + norm.eps).rsqrt())[:, None] * weight
        if not self.offset:
            return AffineMap(weight, weight @ moments.mean)
        shift_of_mean = _shift(moments.mean, batch)
        return AffineMap(weight, bias if shift_of_mean is None else bias + weight @ shift_of_mean)

    def _contraction_scale(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return scale and shift of what is behind the contraction, apart from a batch norm that reads the batch."""
        assert self.contract is not None
        if self.batch_norm:
            return running_scale_and_shift(self.contract_bn)
        ones = torch.ones_like(_matrix(self.contract)[:, 0])
        return ones, to_full_precision(self.contract.bias) if self.contract.bias is not None else torch.zeros_like(ones)

    def _contracted_constant(
            self,
            weight: torch.Tensor,
            offset: torch.Tensor,
            point: torch.Tensor,
            expand_stats: Optional[BatchStatistics],
    ) -> torch.Tensor:
        """Return what the contraction gives where x is `point`, [Cs], without its own bias."""
        assert self.contract is not None
        if not self.offset:
            return weight @ point
        constant, shift = _matrix(self.contract) @ offset, _shift(point, expand_stats)
        return constant if shift is None else constant + weight @ shift

    def affine(self) -> AffineMap:
        if self.contract is None:
            raise ValueError('A side adapter is not on the student\'s path: there is nothing to merge.')
        affine = compose(_layer_affine(self.contract, self.contract_bn), _layer_affine(self.expand, self.expand_bn))
        if not self.offset:
            affine = AffineMap(affine.weight, torch.zeros_like(affine.bias))
        return add_identity(affine) if self.residual else affine

    def extra_repr(self) -> str:
        return f'segments={self.segments}, residual={self.residual}, form={self.form}'


def _layer_affine(conv: nn.Conv2d, norm: Any) -> AffineMap:
    affine = AffineMap(*_conv_tensors(conv))
    if isinstance(norm, nn.Identity):
        return affine
    if not is_batch_norm(norm):
        raise UsageError(
            f"{type(norm).__name__} in the N-to-one transform has no running statistics, so that what it "
            'does depends on the batch at inference, too, and cannot be merged: leave '
            'track_running_stats of its batch norms on, or give --kd-kwargs norm.batch_norm=False.')
    return scale_shift(affine, *batch_norm_affine(
        norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps))


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


def _shift(mean: torch.Tensor, batch: Optional[BatchStatistics]) -> Optional[torch.Tensor]:
    """Return a mean relative to a batch norm's, or to zero for None; None where it is the norm's."""
    if batch is None:
        return mean
    return None if mean is batch.mean else mean - batch.mean
