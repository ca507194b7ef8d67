"""Tensors of all processes: weights that the first rank drew or read, columns that each has a part of."""
from typing import Optional

import torch
import torch.distributed as dist
import torch.nn as nn


@torch.no_grad()
def share_weights(module: nn.Module, device: torch.device) -> None:
    """Give all processes the first one's weights: those of a model without any are drawn by each for itself.

    Args:
        module: The same architecture in every process, on any device.
        device: Where the process group communicates.
    """
    for tensor in module.state_dict().values():
        shared = tensor.to(device)
        dist.broadcast(shared, src=0)
        tensor.copy_(shared)


def gather_in_order(column: torch.Tensor, device: torch.device, num_samples: Optional[int] = None) -> torch.Tensor:
    """Put together what the ranks have of a column: rank r of W holds the images r, r + W, r + 2 W, ...

    Args:
        column: This rank's part, of the same length on all, [N / W, ...].
        device: Where the process group communicates.
        num_samples: Images of the set; what a distributed sampler repeats to fill its last batch is cut off.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        own = column.to(device)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        column = torch.stack(parts, dim=1).flatten(0, 1).to(column.device)
    return column[:num_samples]
