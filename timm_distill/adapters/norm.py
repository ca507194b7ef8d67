"""The N-to-one feature transform (FT).

NORM: Knowledge Distillation via N-to-One Representation Matching (Liu et al., ICLR 2023),
https://openreview.net/forum?id=CRNwGauQpb6.

Two linear layers with nothing in between: the first expands the student's feature to N times the teacher's channels,
the second contracts it back. `batch_norm=True, residual=True` is the published code (a batch norm behind each layer, a
residual connection around both); `batch_norm=False` is the plain linear pair of the paper's text.
"""
from typing import Tuple

import torch
import torch.nn as nn

from ..errors import UsageError
from ..linalg import AffineMap, add_identity, batch_norm_affine, compose, scale_shift, to_float64
from .base import Adapter, AdapterOutput, register_adapter


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

    Raises:
        UsageError: If `segments` is below 1.
    """

    def __init__(
            self,
            student_channels: int,
            teacher_channels: int,
            segments: int = 8,
            batch_norm: bool = True,
            residual: bool = True,
    ):
        super().__init__(student_channels, teacher_channels)
        if segments < 1:
            raise UsageError(f'norm.segments={segments} must be at least 1 (--kd-kwargs norm.segments=8).')
        self.segments = segments
        self.residual = residual
        width = segments * teacher_channels
        self.expand = nn.Conv2d(student_channels, width, 1, bias=not batch_norm)
        self.expand_bn = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        self.contract = nn.Conv2d(width, student_channels, 1, bias=not batch_norm)
        self.contract_bn = nn.BatchNorm2d(student_channels) if batch_norm else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the official code does: Kaiming normal over the fan-out, batch norms at identity."""
        for conv in (self.expand, self.contract):
            nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        for norm in (self.expand_bn, self.contract_bn):
            if isinstance(norm, nn.BatchNorm2d):
                norm.reset_parameters()

    def forward(self, x: torch.Tensor) -> AdapterOutput:
        expanded = self.expand_bn(self.expand(x))  # [B, N * Ct, H, W]
        output = self.contract_bn(self.contract(expanded))  # [B, Cs, H, W]
        return AdapterOutput(x + output if self.residual else output, expanded, self.segments)

    def affine(self) -> AffineMap:
        affine = compose(_layer_affine(self.contract, self.contract_bn), _layer_affine(self.expand, self.expand_bn))
        return add_identity(affine) if self.residual else affine

    def extra_repr(self) -> str:
        return f'segments={self.segments}, residual={self.residual}'


def _layer_affine(conv: nn.Conv2d, norm: nn.Module) -> AffineMap:
    weight, bias = _conv_tensors(conv)
    affine = AffineMap(weight, bias)
    if isinstance(norm, nn.Identity):
        return affine
    return scale_shift(affine, *batch_norm_affine(
        norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps))  # type: ignore[arg-type]


def _conv_tensors(conv: nn.Conv2d) -> Tuple[torch.Tensor, torch.Tensor]:
    weight = to_float64(conv.weight).flatten(1)
    bias = weight.new_zeros(weight.shape[0]) if conv.bias is None else to_float64(conv.bias)
    return weight, bias
