"""Teacher dropping: some of several teachers are left out of a step, never the one with the largest loss.

UNIC: Universal Classification Models via Multi-teacher Distillation (Sariyildiz et al., ECCV 2024),
https://arxiv.org/abs/2408.05088, drops teachers of single images; here they are dropped of whole batches, since the
terms of most methods are numbers of a batch.
"""
from typing import Any, Dict, Mapping

import torch
import torch.distributed as dist

from ..utils.random import scramble


class TeacherDrop:
    """Choice of the teachers whose terms count in a step.

    The choice depends on a seed and on how many batches there were: random numbers of the run are not drawn, and a
    resumed run goes on with the choices that it would have made.

    Args:
        probability: With which a teacher is dropped that has not the largest loss.
        seed: Of the choices.
    """

    def __init__(self, probability: float, seed: int):
        self.probability = probability
        self.seed = seed
        self.step = 0

    def choose(self, losses: Mapping[str, torch.Tensor], distributed: bool = False) -> Dict[str, torch.Tensor]:
        """Return whether each teacher's terms count, booleans on the losses' device, and count the batch.

        Args:
            losses: Weighted sum of each teacher's terms, scalars.
            distributed: Compare the averages over all processes.
        """
        step, self.step = self.step, self.step + 1
        if not losses:
            return {}
        values = torch.stack([loss.float() for loss in losses.values()])
        if distributed:
            dist.all_reduce(values)
        kept = torch.tensor([not self._drops(step, i) for i in range(len(values))], device=values.device)
        kept = kept | (torch.arange(len(values), device=values.device) == values.argmax())  # nan counts as largest
        return dict(zip(losses, kept.unbind()))

    def _drops(self, step: int, index: int) -> bool:
        return scramble(self.seed, step, index) < self.probability * 2 ** 64

    def share(self) -> None:
        """Take over the first process' choices."""
        state = [self.state_dict()]
        dist.broadcast_object_list(state)
        self.load_state_dict(state[0])

    def state_dict(self) -> Dict[str, int]:
        return {'seed': self.seed, 'step': self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seed, self.step = int(state['seed']), int(state['step'])
