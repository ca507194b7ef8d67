"""Statistics of batch norms: which ones a norm reads in its mode, and what it keeps of a batch.

The rules are those of torch's own forward, for norms whose input is known by its moments alone.
"""
from typing import Any, Optional, Tuple, Union

import torch
import torch.distributed as dist
import torch.nn as nn
from torchvision.ops import FrozenBatchNorm2d

from ...utils._compat import BatchNormBase
from ...utils.precision import to_full_precision
from .moments import BatchStatistics, Moments, share_moments

_KNOWN_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)  # the last is what timm freezes them to


def is_known_norm(module: nn.Module) -> bool:
    """Whether the rules of this file are those of a module; a subclass may have a forward of its own."""
    return type(module) in _KNOWN_NORMS


def reads_batch(norm: nn.Module) -> bool:
    """Whether a batch norm normalises with the batch's statistics: in training, and where it has no others."""
    return isinstance(norm, BatchNormBase) and (norm.training or norm.running_var is None)


def count_ranks(norm: nn.Module) -> int:
    """Return over how many ranks a batch norm takes its statistics."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training or not dist.is_initialized():
        return 1
    return dist.get_world_size(norm.process_group)


def batch_statistics(norm: nn.Module, moments: Moments) -> Optional[BatchStatistics]:
    """Return what a batch norm reads of the batch, given the moments of the layer's input; None for running statistics.

    Over all ranks where the norm is synchronised.
    """
    if not reads_batch(norm):
        return None
    if count_ranks(norm) > 1:
        return share_moments(moments, norm.process_group)
    return BatchStatistics(moments.mean, moments.cov, moments.centred.shape[0])


def scale_and_bias(norm: Any, like: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return a batch norm's weight and bias, [C] each, in float32 or better; one and zero for those that it lacks.

    Args:
        norm: Batch norm.
        like: Tensor on its device, [C], in the precision that the lacking ones get.
    """
    weight = torch.ones_like(like) if norm.weight is None else to_full_precision(norm.weight)
    bias = torch.zeros_like(like) if norm.bias is None else to_full_precision(norm.bias)
    return weight, bias


def running_scale_and_shift(norm: Any) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return (scale, shift), [C] each, of a batch norm with running statistics: y = scale * x + shift."""
    mean, variance = (to_full_precision(x) for x in (norm.running_mean, norm.running_var))
    weight, bias = scale_and_bias(norm, variance)
    scale = weight * (variance + norm.eps).rsqrt()
    return scale, bias - scale * mean


def value_at_zero(norm: nn.Module, input: torch.Tensor) -> torch.Tensor:
    """Return what a batch norm makes of zero, [C], with the statistics that it uses for this input, [B, C, H, W]."""
    if not reads_batch(norm):
        return running_scale_and_shift(norm)[1]
    var, mean = torch.var_mean(to_full_precision(input), dim=(0, 2, 3), correction=0)
    weight, bias = scale_and_bias(norm, var)
    return bias - weight * mean * (var + norm.eps).rsqrt()


@torch.no_grad()
def update_running(
        norm: nn.Module,
        mean: torch.Tensor,
        variance: torch.Tensor,
        num_positions: Union[int, torch.Tensor],
) -> None:
    """Update running statistics as a batch norm does that reads a batch, from a biased variance.

    Nothing is kept in eval mode, nor where the norm does not track them. Without a momentum they are averages over all
    batches.
    """
    assert isinstance(norm, BatchNormBase)
    if not norm.training or not norm.track_running_stats:
        return
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if norm.running_mean is None or norm.running_var is None:
        return
    unbiased = variance * num_positions / (num_positions - 1)
    for running, value in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running.lerp_(value.to(running.dtype), _momentum(norm, running))


def _momentum(norm: BatchNormBase, running: torch.Tensor) -> Union[float, torch.Tensor]:
    """Return the share of a batch in the running statistics; as a tensor where the host would wait for it."""
    if norm.momentum is not None:
        return float(norm.momentum)
    if norm.num_batches_tracked is None:
        return 0.
    return norm.num_batches_tracked.to(torch.float64).reciprocal().to(running.dtype)
