"""The N-to-one feature transform (FT).

NORM: Knowledge Distillation via N-to-One Representation Matching (Liu et al., ICLR 2023),
https://openreview.net/forum?id=CRNwGauQpb6.

Two linear layers with nothing in between: the first expands the student's feature to N times the teacher's channels,
the second contracts it back. `batch_norm=True, residual=True` is the published code (a batch norm behind each layer, a
residual connection around both); `batch_norm=False` is the plain linear pair of the paper's text.
"""
import logging
from typing import Annotated, Any, Dict, Optional, Sequence, Tuple, Union, cast

import torch
import torch.nn as nn

from ...errors import UsageError
from ...utils.affine import AffineMap, add_identity, batch_norm_affine, compose, scale_shift, to_float64
from ...utils.batch_norm import is_batch_norm
from ...utils.ranges import OneOf, Range
from ..base import Adapter, AdapterOutput, Match, register_adapter
from .direct import expand_contract, run_direct
from .from_moments import run_moments
from .layers import Form, Layers, count_positions, share_segments
from .statistics import count_ranks, is_known_norm, reads_batch

_logger = logging.getLogger(__name__)

_DIRECT_BYTES = 2 ** 30  # activations of the direct form above which 'auto' leaves it


FORMS: Dict[str, Form] = {'direct': run_direct, 'moments': run_moments}


@register_adapter('norm')
class NToOneTransform(Adapter):
    """Expand to N x Ct channels, contract to Cs; affine at inference (NORM, ICLR 2023).

    With x the student's feature: `e = BN1(W1 x)`, `y = x + BN2(W2 e)`.

    With several teachers the N segments are shared out among them: e has the segments of the first teacher, each of its
    channels, then those of the second. The loss against a teacher is the sum over its segments of each one's mean
    squared error, as with one teacher; together they are a sum over N segments, however many teachers there are.

    Args:
        student_channels: Cs.
        teacher_channels: Ct, or that of each of several teachers.
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
            expansion meanwhile. 'official' starts at random as the published code does. 'auto' is the former where
            the transform can be the identity, and the latter where not.

    Raises:
        UsageError: If the transform cannot be the identity and has to, or there are more teachers than segments.
    """

    def __init__(
            self,
            student_channels: int,
            teacher_channels: Union[int, Sequence[int]],
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
        self.blocks = share_segments(segments, teacher_channels)
        if segments < len(self.blocks):
            raise UsageError(
                f'norm.segments={segments} cannot be shared out among {len(self.blocks)} teachers: each needs a '
                'segment of its own (--kd-kwargs norm.segments=N).')
        self.batch_norm = batch_norm
        self.residual = residual
        self.pool = pool
        self.form = form
        self.init = init
        self._logged_form = ''
        self.offset = offset
        width = self.width
        self.expand = nn.Conv2d(student_channels, width, 1, bias=not batch_norm)
        self.expand_bn = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        self.contract: Optional[nn.Conv2d] = None
        if not side:
            self.contract = nn.Conv2d(width, student_channels, 1, bias=offset and not batch_norm)
            self.contract_bn = nn.BatchNorm2d(student_channels) if batch_norm else nn.Identity()
            if batch_norm and not offset:
                self.contract_bn.register_parameter('bias', None)
        self.reset_parameters()

    @property
    def width(self) -> int:
        """Channels of the expanded feature, N * Ct."""
        return sum(block.width for block in self.blocks)

    def reset_parameters(self) -> None:
        """Initialise as the official code does: Kaiming normal over the fan-out, batch norms at identity."""
        for module in self.children():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        obstacle = self._identity_obstacle()
        if self.init == 'identity' and obstacle:
            raise UsageError(
                f'norm.init=identity is impossible: {obstacle}. Give norm.residual=True, or '
                'norm.init=official (--kd-kwargs).')
        if self.init != 'official' and not obstacle:
            self._become_identity()

    def start_pretrained(self) -> None:
        obstacle = self._identity_obstacle()
        if self.init == 'auto' and obstacle:
            _logger.warning(
                "The N-to-one transform starts at random on the path of a student that comes with weights, "
                f'whose accuracy it takes at first: it cannot start as the identity, {obstacle}. '
                '--kd-kwargs norm.residual=True lets it.')

    def _identity_obstacle(self) -> str:
        """Return why the transform cannot start as the identity, '' where it can."""
        if self.residual or self.contract is None:
            return ''
        if self.batch_norm:
            return 'without the residual connection its batch norms give every channel another mean and deviation'
        if self.width < self.student_channels:
            return f'without the residual connection {self.width} channels cannot carry {self.student_channels}'
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

    def layers(self) -> Layers:
        """Return what the forms read."""
        return Layers(
            self.expand, self.expand_bn, self.contract, nn.Identity() if self.contract is None else self.contract_bn,
            self.blocks, self.residual, self.offset, self.pool)

    def forward(self, x: torch.Tensor, match: Optional[Match] = None) -> AdapterOutput:
        layers = self.layers()
        self._check_positions(layers, x)
        return FORMS[self._choose_form(layers, x, match)](layers, x, match)

    def expand_contract(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return output, [B, Cs, H, W], and expanded feature, [B, N * Ct, H, W], as the direct form does."""
        return expand_contract(self.layers(), x)

    def _check_positions(self, layers: Layers, x: torch.Tensor) -> None:
        """Reject a batch that has no variance, which a batch norm would divide by."""
        if count_positions(x) == 1 and any(reads_batch(norm) and count_ranks(norm) == 1 for norm in layers.norms):
            raise UsageError(
                "The batch norms of the N-to-one transform need two positions in a batch, of which this "
                'one has 1: give a larger --batch-size, or --kd-kwargs norm.batch_norm=False.')

    def _choose_form(self, layers: Layers, x: torch.Tensor, match: Optional[Match]) -> str:
        if not all(is_known_norm(norm) for norm in layers.norms):
            return 'direct'  # runs a norm of whatever kind
        max_pooled = self.pool == 'max' and match is not None and any(
            _pools_student(match.to_map(x), teacher) for teacher in layers.targets(match))
        form = self.form
        if not self.offset and isinstance(self.expand_bn, nn.SyncBatchNorm):
            form = 'moments'  # only these know the offset over all ranks
        if form == 'auto':
            form = 'direct' if max_pooled or not self._moments_are_cheaper(x) else 'moments'
            if form != self._logged_form and self.training:
                _logger.info(f'The N-to-one transform takes the {form} form at {count_positions(x)} positions.')
                self._logged_form = form
        elif form == 'moments' and max_pooled:
            raise UsageError(
                "norm.form=moments cannot max-pool the student's side: take norm.pool=avg or "
                'norm.form=direct.')
        return form

    def _moments_are_cheaper(self, x: torch.Tensor) -> bool:
        """Compare the multiply-adds of a forward and backward pass, and what the direct form keeps."""
        positions, cs, width = count_positions(x), self.student_channels, self.width
        ct = sum(block.channels for block in self.blocks)
        direct = 6 * positions * width * cs
        moments = (5 * width + 4 * ct) * cs ** 2 + positions * (5 * cs ** 2 + 5 * cs * ct)
        return moments < direct or 5 * positions * width * x.element_size() > _DIRECT_BYTES

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


def _pools_student(student: torch.Tensor, teacher: torch.Tensor) -> bool:
    return student.shape[-2] > teacher.shape[-2] or student.shape[-1] > teacher.shape[-1]

