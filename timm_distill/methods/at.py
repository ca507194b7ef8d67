"""Attention transfer.

Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via Attention Transfer
(Zagoruyko and Komodakis, ICLR 2017), https://arxiv.org/abs/1612.03928.

The attention map of a feature is its energy at each position, scaled to unit length. `power=2` is the published
variant. The scale is that of the common implementation, a mean over samples and positions; its weight is 1000.
"""
from typing import Annotated, Dict, Sequence

import torch

from ..losses import l2_normalize, match_grids
from ..utils.precision import in_full_precision
from ..utils.ranges import Range
from ._base import register_method
from ._stages import StageChoice, StageMethod


def attention_map(feature: torch.Tensor, power: float = 2.) -> torch.Tensor:
    """Mean over channels of |feature|^power, as a unit vector of positions: [B, C, H, W] -> [B, H * W]."""
    energy = feature.square() if power == 2 else feature.abs().pow(power)
    return l2_normalize(energy.mean(1).flatten(1))


@in_full_precision
def attention_transfer_loss(
        students: Sequence[torch.Tensor],
        teachers: Sequence[torch.Tensor],
        power: float = 2.,
) -> torch.Tensor:
    """Sum over stages of the mean squared difference of attention maps.

    Args:
        students: Feature map of each stage, [B, Cs, Hs, Ws].
        teachers: Likewise, [B, Ct, Ht, Wt], treated as constant. The larger of two grids is pooled to the smaller.
        power: Exponent of the activations.

    Returns:
        Scalar.
    """
    losses = []
    for student, teacher in zip(students, teachers):
        student, teacher = match_grids(student, teacher.detach())
        losses.append((attention_map(student, power) - attention_map(teacher, power)).square().mean())
    return torch.stack(losses).sum()


@register_method('at')
class AT(StageMethod):
    """Attention maps of intermediate features.

    Args:
        power: Exponent of the activations.
        stages: Which matched stages: 'all', 'last', 'middle' or positions, shallow to deep.
    """
    paper = 'Zagoruyko and Komodakis, ICLR 2017, https://arxiv.org/abs/1612.03928'
    published_weight = 1000.
    weight_source = 'RepDistiller'
    spatial = True

    def __init__(
            self,
            power: Annotated[float, Range(1, 16, without_low=True)] = 2.,
            stages: StageChoice = 'all',
    ):
        super().__init__(stages)
        self.power = float(power)

    def compare(self, students: Sequence[torch.Tensor], teachers: Sequence[torch.Tensor]) -> Dict[str, torch.Tensor]:
        return {'at_loss': attention_transfer_loss(students, teachers, self.power)}
