"""Weights of one process on all: what the first rank drew or read, the others take."""
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
