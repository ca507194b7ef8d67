"""The N-to-one feature transform (FT).

NORM: Knowledge Distillation via N-to-One Representation Matching (Liu et al., ICLR 2023),
https://openreview.net/forum?id=CRNwGauQpb6.

Two linear layers with nothing in between: the first expands the student's feature to N times the teacher's channels,
the second contracts it back. `batch_norm=True, residual=True` is the published code (a batch norm behind each layer, a
residual connection around both); `batch_norm=False` is the plain linear pair of the paper's text.
"""
from typing import Optional, Tuple

import torch
import torch.nn as nn

from ..errors import UsageError
from ..linalg import AffineMap, add_identity, batch_norm_affine, compose, scale_shift, to_float64
from .base import Adapter, AdapterOutput, register_adapter


class BatchScale2d(nn.BatchNorm2d):
    """Batch norm that only scales: divides by the deviation and multiplies by the weight, without any offset."""

    def __init__(self, num_features: int):
        super().__init__(num_features)
        self.register_parameter('bias', None)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + self.mean_response(input)[:, None, None]

    def mean_response(self, input: torch.Tensor) -> torch.Tensor:
        """Return what a batch norm subtracts from the scaled input, [C]."""
        return batch_norm_mean_response(self, input)


def batch_norm_mean_response(norm: nn.BatchNorm2d, input: torch.Tensor) -> torch.Tensor:
    """Return scale * mean, [C], of a batch norm for the statistics that it uses for this input, [B, C, H, W]."""
    if norm.training:
        var, mean = torch.var_mean(input.float(), dim=(0, 2, 3), correction=0)
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
        offset: Let the output have an offset. Without, y is a linear map of x at inference, for consumers that cannot
            take an offset: the contraction reads e without its offset, and BN2 only scales.
        side: Expand for the loss alone and leave the student's path as it is.

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
            offset: bool = True,
            side: bool = False,
    ):
        super().__init__(student_channels, teacher_channels)
        if segments < 1:
            raise UsageError(f'norm.segments={segments} must be at least 1 (--kd-kwargs norm.segments=8).')
        self.segments = segments
        self.residual = residual
        self.offset = offset
        width = segments * teacher_channels
        self.expand = nn.Conv2d(student_channels, width, 1, bias=not batch_norm)
        self.expand_bn = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        self.contract: Optional[nn.Conv2d] = None
        if not side:
            self.contract = nn.Conv2d(width, student_channels, 1, bias=offset and not batch_norm)
            contract_bn = nn.BatchNorm2d if offset else BatchScale2d
            self.contract_bn = contract_bn(student_channels) if batch_norm else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the official code does: Kaiming normal over the fan-out, batch norms at identity."""
        for module in self.children():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> AdapterOutput:
        linear = self.expand(x)
        expanded = self.expand_bn(linear)  # [B, N * Ct, H, W]
        if self.contract is None:
            return AdapterOutput(x, expanded, self.segments)
        output = self.contract(expanded)  # [B, Cs, H, W]
        if not self.offset:
            output = output - (self.contract.weight.flatten(1) @ self._expansion_offset(linear))[:, None, None]
        output = self.contract_bn(output)
        return AdapterOutput(x + output if self.residual else output, expanded, self.segments)

    def _expansion_offset(self, linear: torch.Tensor) -> torch.Tensor:
        """Return the offset of e, [N * Ct]: what it is for x = 0."""
        if isinstance(self.expand_bn, nn.BatchNorm2d):
            return self.expand_bn.bias - batch_norm_mean_response(self.expand_bn, linear)
        assert self.expand.bias is not None
        return self.expand.bias

    def affine(self) -> AffineMap:
        if self.contract is None:
            raise ValueError('A side adapter is not on the student\'s path: there is nothing to merge.')
        affine = compose(_layer_affine(self.contract, self.contract_bn), _layer_affine(self.expand, self.expand_bn))
        if not self.offset:
            affine = AffineMap(affine.weight, torch.zeros_like(affine.bias))
        return add_identity(affine) if self.residual else affine

    def extra_repr(self) -> str:
        return f'segments={self.segments}, residual={self.residual}'


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
