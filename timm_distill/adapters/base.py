"""The contract of an adapter: channels in, channels out, affine at inference."""
from dataclasses import dataclass
from typing import Callable, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn

from ..utils.affine import AffineMap
from ..utils.registry import Registry

ADAPTERS = Registry('adapter', '--kd', __package__)


def register_adapter(name: str) -> Callable[[type], type]:
    """Return a class decorator that registers an adapter under `name`."""
    return ADAPTERS.register(name)


@dataclass
class Match:
    """Target of an adapter's loss.

    Attributes:
        teacher: Teacher's feature, [B, Ct, H, W]; one for each of several teachers, in the order of their channels.
        to_map: Turns the adapter's positions, prefix tokens included, into a map: [B, C, L, 1] -> [B, C, H, W].
    """
    teacher: Union[torch.Tensor, Tuple[torch.Tensor, ...]]
    to_map: Callable[[torch.Tensor], torch.Tensor]


@dataclass
class AdapterOutput:
    """Output of an adapter for one batch.

    Attributes:
        output: Feature that replaces the adapter's input on the student's path, [B, Cs, H, W].
        loss: Loss of the match, scalar; one for each of several teachers; None without a match.
    """
    output: torch.Tensor
    loss: Union[torch.Tensor, Tuple[torch.Tensor, ...], None] = None


class Adapter(nn.Module):
    """Base of all adapters.

    An adapter maps the channels of every position alone, [B, Cs, H, W] -> [B, Cs, H, W] (tokens come as [B, Cs, L, 1],
    vectors as [B, Cs, 1, 1]), in training mode with statistics of the batch if it likes. In eval mode it must be
    affine, so that it folds into the next linear layer.

    Args:
        student_channels: Cs.
        teacher_channels: Ct, or that of each of several teachers.
    """

    def __init__(self, student_channels: int, teacher_channels: Union[int, Sequence[int]]):
        super().__init__()
        self.student_channels = student_channels
        self.teacher_channels = teacher_channels

    def forward(self, x: torch.Tensor, match: Optional[Match] = None) -> AdapterOutput:
        """Transform a feature, [B, Cs, H, W], and match it if there is something to match it with."""
        raise NotImplementedError

    def start_pretrained(self) -> None:
        """Initialise for a student that comes with weights; as for every other by default.

        Called once, before training. An adapter should leave the student's logits as they are then.
        """

    def affine(self) -> AffineMap:
        """Return the exact map of the eval mode in float64: weight [Cs, Cs], bias [Cs]."""
        raise NotImplementedError
