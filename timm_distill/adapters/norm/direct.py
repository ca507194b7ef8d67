"""The direct form of the N-to-one transform: expand, match, contract. The reference of the moment form."""
from typing import Optional, Tuple

import torch
import torch.nn as nn

from ...losses import match_grids, n_to_one_loss, to_full_precision
from ..base import AdapterOutput, Match
from .layers import Layers, matrix
from .statistics import value_at_zero


def run_direct(layers: Layers, x: torch.Tensor, match: Optional[Match]) -> AdapterOutput:
    """Return output and loss; runs batch norms of whatever kind."""
    output, expanded = expand_contract(layers, x)
    if match is None:
        return AdapterOutput(output)
    losses = []
    for block, rows, target in zip(layers.blocks, layers.rows(), layers.targets(match), strict=True):
        part = expanded if len(layers.blocks) == 1 else expanded[:, rows]
        student, teacher = match_grids(match.to_map(part), target, layers.pool)
        losses.append(n_to_one_loss(student, teacher, block.segments))
    return AdapterOutput(output, losses[0] if len(losses) == 1 else tuple(losses))


def expand_contract(layers: Layers, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return output, [B, Cs, H, W], and expanded feature, [B, N * Ct, H, W]."""
    if x.shape[-1] == 1 and x.shape[-2] > 1:
        # Tokens, [B, Cs, L, 1], fit both memory formats, and torch's batch norm on the CPU then gives wrong
        # gradients where input and gradient differ in theirs (seen with 2.15). As images of one position each
        # they have a single format.
        output, expanded = expand_contract(layers, x.permute(0, 2, 3, 1).reshape(-1, x.shape[1], 1, 1))
        return _unflatten_positions(output, x), _unflatten_positions(expanded, x)
    linear = layers.expand(x)
    expanded = layers.expand_bn(linear)
    if layers.contract is None:
        return x, expanded
    output = layers.contract(expanded)
    if not layers.offset:
        offset = matrix(layers.contract) @ _expansion_offset(layers, linear)
        output = output - offset[:, None, None].to(output.dtype)
    contracted, output = output, layers.contract_bn(output)
    if layers.norms and not layers.offset:
        output = output - value_at_zero(layers.contract_bn, contracted)[:, None, None].to(output.dtype)
    return x + output if layers.residual else output, expanded


def _expansion_offset(layers: Layers, linear: torch.Tensor) -> torch.Tensor:
    """Return the offset of e, [N * Ct]: what it is for x = 0."""
    if not isinstance(layers.expand_bn, nn.Identity):
        return value_at_zero(layers.expand_bn, linear)
    assert layers.expand.bias is not None
    return to_full_precision(layers.expand.bias)


def _unflatten_positions(positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return [B * L, C, 1, 1] as [B, C, L, 1], with B and L of `x`."""
    return positions.view(x.shape[0], x.shape[2], 1, -1).permute(0, 3, 1, 2)
