"""Batch norms of torch and timm, recognised by what they keep."""
import torch
import torch.nn as nn


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module normalises with running statistics: batch norms of torch and timm, frozen ones included."""
    return hasattr(module, 'eps') and all(
        isinstance(getattr(module, name, None), torch.Tensor) for name in ('running_mean', 'running_var'))
