"""Weight of a batch in a mean where batches differ in size."""
from typing import Optional, Union

import torch
import torch.distributed as dist


class BatchScale:
    """Factor on the loss of a batch, by its size.

    Args:
        mode: 'none' (all batches alike), 'linear' or 'sqrt' in the size over the reference.
        reference: Size of a batch with factor 1.
        device: Where sizes are exchanged between ranks whose batches differ; None where all ranks have the same.
    """

    def __init__(self, mode: str, reference: float, device: Optional[torch.device] = None):
        self.mode = mode
        self.reference = reference
        self.device = device

    def __call__(self, batch_size: int) -> Union[float, torch.Tensor]:
        """Return the factor for a batch of this size; with `device` a collective operation."""
        ratio = batch_size / self.reference
        scale: float = {'none': 1., 'sqrt': ratio ** 0.5, 'linear': ratio}[self.mode]
        if self.device is None:
            return scale
        # the mean over ranks that DDP takes of the gradients shall weigh every image alike
        total = torch.tensor(batch_size, device=self.device, dtype=torch.float32)
        dist.all_reduce(total)
        return scale * dist.get_world_size() * batch_size / total
