"""The moment form of the N-to-one transform: loss and output from the batch's moments.

Exactly what the direct form computes, without any activation of N * Ct channels.
"""
from typing import List, NamedTuple, Optional, Tuple

import torch

from ...losses import match_grids, to_full_precision
from ...utils.affine import AffineMap
from ..base import AdapterOutput, Match
from .expansion import Expansion, match_expansion
from .layers import Layers, count_positions, matrix
from .matmul import channel_means, from_rows
from .moments import BatchStatistics, Moments, compute_moments, map_rows, row_variances
from .statistics import (
    batch_statistics,
    count_ranks,
    reads_batch,
    running_scale_and_shift,
    scale_and_bias,
    update_running,
)


class _Expanded(NamedTuple):
    """Expanding half of the transform for one batch.

    Attributes:
        contracted: W2 A, [Cs, Cs]; None without a contraction.
        losses: The N-to-one loss against each teacher, scalars; none where nothing is matched.
        variance: Variances of W1 x, [N * Ct]; not differentiable, for running statistics.
    """
    contracted: Optional[torch.Tensor]
    losses: Tuple[torch.Tensor, ...]
    variance: torch.Tensor


class _Batch(NamedTuple):
    """Moments of a batch, and what each batch norm reads of them; None for running statistics and for no norm."""
    moments: Moments
    expand: Optional[BatchStatistics]
    contract: Optional[BatchStatistics]


def run_moments(layers: Layers, x: torch.Tensor, match: Optional[Match]) -> AdapterOutput:
    """Return output and loss, the output's own product in the precision around, the rest in float32 or better."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        return _run(layers, x, match, dtype)


@torch.compiler.disable  # products with gradients written by hand
def _run(layers: Layers, x: torch.Tensor, match: Optional[Match], dtype: torch.dtype) -> AdapterOutput:
    batch = _batch(layers, compute_moments(to_full_precision(x)))
    moments = batch.moments
    scale, offset = _expansion_scale(layers, batch.expand is not None)
    expansion = _expand(layers, batch, scale) if match is None else _match(layers, batch, x, match, scale, offset)
    if batch.expand is not None:
        mean = matrix(layers.expand).detach() @ batch.expand.mean.detach()
        update_running(layers.expand_bn, mean, expansion.variance, batch.expand.num_positions)
    loss = expansion.losses[0] if len(expansion.losses) == 1 else expansion.losses or None
    if layers.contract is None:
        return AdapterOutput(x, loss)
    weight, bias = _contract(layers, batch, expansion.contracted, offset)
    bias = bias + 0 * offset.sum()  # where nothing depends on it, its gradient is zero and not none: DDP waits for it
    rows = moments.centred.to(dtype)
    if layers.residual and rows.dtype == x.dtype == moments.centred.dtype:  # no rounding of x to `dtype` then
        output = map_rows(rows, weight, bias + moments.mean, residual=True)
        return AdapterOutput(from_rows(output, x), loss)
    output = from_rows(map_rows(rows, weight, bias), x)
    return AdapterOutput(x + output if layers.residual else output, loss)


def _batch(layers: Layers, moments: Moments) -> _Batch:
    """Take what each batch norm reads of the batch, over all ranks where it is synchronised."""
    if not layers.norms:
        return _Batch(moments, None, None)
    first, second = layers.expand_bn, layers.contract_bn
    expand = batch_statistics(first, moments)
    if layers.contract is None:
        return _Batch(moments, expand, None)
    # most often both read the same: it is shared over the ranks once
    same = expand is not None and reads_batch(second) and (
        getattr(first, 'process_group', None) is getattr(second, 'process_group', None)
        and count_ranks(first) == count_ranks(second))
    return _Batch(moments, expand, expand if same else batch_statistics(second, moments))


def _expansion_scale(layers: Layers, from_batch: bool) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return the factor of W1, without what a batch norm takes from the batch, and e's constant part, [N * Ct] each."""
    if layers.norms:
        if not from_batch:
            return running_scale_and_shift(layers.expand_bn)
        return scale_and_bias(layers.expand_bn, matrix(layers.expand)[:, 0])
    assert layers.expand.bias is not None
    bias = to_full_precision(layers.expand.bias)
    return torch.ones_like(bias), bias


def _expand(layers: Layers, batch: _Batch, scale: torch.Tensor) -> _Expanded:
    """Expand and contract where there is nothing to match with."""
    weight, contract = matrix(layers.expand), None if layers.contract is None else matrix(layers.contract)
    variance = scale.detach()
    if batch.expand is not None:
        variance = row_variances(weight, batch.expand.cov)
        scale = scale * (variance + layers.expand_bn.eps).rsqrt()
    factor = scale[:, None] * weight
    # in full precision, forward and backward
    contracted = None if contract is None else map_rows(contract, factor.t(), torch.zeros_like(weight[0]))
    return _Expanded(contracted, (), variance.detach())


def _match(
        layers: Layers,
        batch: _Batch,
        x: torch.Tensor,
        match: Match,
        scale: torch.Tensor,
        offset: torch.Tensor,
) -> _Expanded:
    """Expand and contract, and match the segments of each teacher with its feature."""
    weight, contract = matrix(layers.expand), None if layers.contract is None else matrix(layers.contract)
    parts: List[Expansion] = []
    for rows, target in zip(layers.rows(), layers.targets(match), strict=True):
        if len(layers.blocks) == 1:
            parts.append(_match_block(layers, batch, x, Match(target, match.to_map), (weight, contract, scale, offset)))
            break
        block = weight[rows], None if contract is None else contract[:, rows], scale[rows], offset[rows]
        parts.append(_match_block(layers, batch, x, Match(target, match.to_map), block))
    contracted, variance = parts[0].contracted, parts[0].variance
    for part in parts[1:]:
        contracted = None if contracted is None or part.contracted is None else contracted + part.contracted
        variance = torch.cat([variance, part.variance])
    return _Expanded(contracted, tuple(part.loss for part in parts), variance)


def _match_block(
        layers: Layers,
        batch: _Batch,
        x: torch.Tensor,
        match: Match,
        block: Tuple[torch.Tensor, Optional[torch.Tensor], torch.Tensor, torch.Tensor],
) -> Expansion:
    """Expand, contract and match the segments of one teacher: their part of W1, W2, factor and constant part."""
    weight, contract, scale, offset = block
    matched, teacher = _matched_moments(layers, batch, x, match)
    eps, variance = None, scale.detach()
    if batch.expand is not None:
        eps = layers.expand_bn.eps
        if matched.cov is not batch.expand.cov:
            variance = row_variances(weight, batch.expand.cov)
            scale, eps = scale * (variance + eps).rsqrt(), None
    # in float64: near a match the loss depends on the last bits of its difference to the offset
    teacher_mean = channel_means(teacher)
    expansion = match_expansion(weight, contract, scale, eps, matched, teacher, teacher_mean)
    shift = _shift(matched.mean, batch.expand)
    constant = offset if shift is None else offset + scale * (weight @ shift)
    residual = constant.unflatten(0, (-1, len(teacher_mean))) - teacher_mean  # E[e] - E[t]
    loss = expansion.loss + residual.square().sum() / len(teacher_mean)
    return Expansion(
        expansion.contracted, loss.to(scale.dtype), variance.detach() if eps is None else expansion.variance)


def _matched_moments(
        layers: Layers,
        batch: _Batch,
        x: torch.Tensor,
        match: Match,
) -> Tuple[Moments, torch.Tensor]:
    """Return the moments of the positions that are matched, and the teacher's map there."""
    assert isinstance(match.teacher, torch.Tensor)  # for mypy: of one teacher
    student, teacher = match.to_map(x), match.teacher.detach()
    if student.shape[-2:] != teacher.shape[-2:]:
        student, teacher = match_grids(to_full_precision(student), to_full_precision(teacher), layers.pool)
    # the map holds all positions unless prefix tokens were dropped or it was pooled
    if count_positions(student) == count_positions(x):
        return batch.moments, teacher
    return compute_moments(to_full_precision(student)), teacher


def _contract(layers: Layers, batch: _Batch, contracted: Optional[torch.Tensor], offset: torch.Tensor) -> AffineMap:
    """Return the contracted map of the centred feature, with the second batch norm."""
    assert contracted is not None
    norm, moments, stats = layers.contract_bn, batch.moments, batch.contract
    if stats is None:
        scale, shift = _contraction_scale(layers)
        constant = _contracted_constant(layers, batch, contracted, offset, moments.mean)
        weight = scale[:, None] * contracted
        return AffineMap(weight, scale * constant + shift if layers.offset else weight @ moments.mean)
    variance = row_variances(contracted, stats.cov)
    with torch.no_grad():
        mean = _contracted_constant(layers, batch, contracted, offset, stats.mean)
        update_running(norm, mean, variance.detach(), stats.num_positions)
    scale, bias = scale_and_bias(norm, variance)
    weight = (scale * (variance + norm.eps).rsqrt())[:, None] * contracted
    if not layers.offset:
        return AffineMap(weight, weight @ moments.mean)
    shift_of_mean = _shift(moments.mean, stats)
    return AffineMap(weight, bias if shift_of_mean is None else bias + weight @ shift_of_mean)


def _contraction_scale(layers: Layers) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return scale and shift of what is behind the contraction, apart from a batch norm that reads the batch."""
    if layers.norms:
        return running_scale_and_shift(layers.contract_bn)
    assert layers.contract is not None
    ones = torch.ones_like(matrix(layers.contract)[:, 0])
    bias = layers.contract.bias
    return ones, torch.zeros_like(ones) if bias is None else to_full_precision(bias)


def _contracted_constant(
        layers: Layers,
        batch: _Batch,
        contracted: torch.Tensor,
        offset: torch.Tensor,
        point: torch.Tensor,
) -> torch.Tensor:
    """Return what the contraction gives where x is `point`, [Cs], without its own bias."""
    if not layers.offset:
        return contracted @ point
    assert layers.contract is not None
    constant, shift = matrix(layers.contract) @ offset, _shift(point, batch.expand)
    return constant if shift is None else constant + contracted @ shift


def _shift(mean: torch.Tensor, stats: Optional[BatchStatistics]) -> Optional[torch.Tensor]:
    """Return a mean relative to a batch norm's, or to zero for None; None where it is the norm's."""
    if stats is None:
        return mean
    return None if mean is stats.mean else mean - stats.mean
