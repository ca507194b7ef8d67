"""Affine maps over channels, and how they fold into the layers around them.

Everything is exact linear algebra in float64; nothing here knows a model, an adapter or a method.
"""
from typing import NamedTuple, Optional, Tuple

import torch


class AffineMap(NamedTuple):
    """The map y = weight @ x + bias of every position's channels.

    Attributes:
        weight: Matrix, [C_out, C_in].
        bias: Offset, [C_out].
    """
    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to the channels of `x`, [B, C_in, H, W] -> [B, C_out, H, W]."""
        return torch.einsum('oc,bchw->bohw', self.weight, x) + self.bias[:, None, None]


def to_float64(x: torch.Tensor) -> torch.Tensor:
    """Return a detached float64 copy, on the CPU where the device has no float64."""
    x = x.detach()
    return (x.cpu() if x.device.type == 'mps' else x).double()


def compose(outer: AffineMap, inner: AffineMap) -> AffineMap:
    """Return the map x -> outer(inner(x))."""
    return AffineMap(outer.weight @ inner.weight, outer.weight @ inner.bias + outer.bias)


def add_identity(affine: AffineMap) -> AffineMap:
    """Return the map x -> x + affine(x), a residual connection around a square map."""
    eye = torch.eye(affine.weight.shape[0], dtype=affine.weight.dtype, device=affine.weight.device)
    return AffineMap(affine.weight + eye, affine.bias)


def batch_norm_affine(
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        weight: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
        eps: float,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return (scale, shift), [C] each, of a batch norm at inference: y = scale * x + shift."""
    mean, var = to_float64(running_mean), to_float64(running_var)
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = to_float64(weight) * scale
    shift = -mean * scale
    if bias is not None:
        shift = shift + to_float64(bias)
    return scale, shift


def scale_shift(affine: AffineMap, scale: torch.Tensor, shift: torch.Tensor) -> AffineMap:
    """Return the map x -> scale * affine(x) + shift, `scale` and `shift` per channel, [C_out]."""
    return AffineMap(scale[:, None] * affine.weight, scale * affine.bias + shift)


def fold_into_weight(weight: torch.Tensor, affine: AffineMap) -> Tuple[torch.Tensor, torch.Tensor]:
    """Fold a map in front of a linear layer or an unpadded convolution into the layer's weight.

    Args:
        weight: Layer weight, [O, C] or [O, C, kh, kw].
        affine: Map of the layer's input channels, square, [C, C].

    Returns:
        The new weight, in the shape of `weight`, and the offset that its output gains, [O]; both float64.
    """
    matrix = to_float64(weight).flatten(2) if weight.ndim > 2 else to_float64(weight)[:, :, None]  # [O, C, k]
    folded = torch.einsum('ock,cd->odk', matrix, affine.weight)
    return folded.reshape(weight.shape), matrix.sum(2) @ affine.bias
