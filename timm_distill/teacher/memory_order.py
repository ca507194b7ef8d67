"""Memory order of a frozen model's convolutions."""
import logging
from typing import Sequence

import torch
import torch.nn as nn

from ..features.inputs import CANNOT_RUN, random_images
from .fold_pairs import Read

_logger = logging.getLogger(__name__)


@torch.no_grad()
def order_channels_last(model: nn.Module, input_size: Sequence[int], read: Read) -> None:
    """Bring the convolutions into channels_last order, unless the model has operations that need another.

    Args:
        model: Model in eval mode.
        input_size: What it is fed, (channels, height, width).
        read: Returns everything that is read of the model.
    """
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    before = [weight.data for weight in weights]
    for weight in weights:
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    try:
        read(model, random_images(model, input_size))
    except CANNOT_RUN as e:
        _logger.debug(f'{type(model).__name__} does not run in channels_last order: {e}')
        for weight, data in zip(weights, before):
            weight.data = data
