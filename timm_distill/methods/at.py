"""Attention transfer.

Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via Attention Transfer
(Zagoruyko and Komodakis, ICLR 2017), https://arxiv.org/abs/1612.03928.

The attention map of a feature is its energy at each position, scaled to unit length. `power=2` is the published
variant. The scale is that of the common implementation, a mean over samples and positions; its weight is 1000.
"""
from typing import Dict, Sequence

import torch

from ..errors import UsageError
from ..features.spec import Features, PairSpec
from ..losses import l2_normalize, match_grids
from ..utils.precision import in_full_precision
from ._base import DistillMethod, register_method
from ._stages import StageChoice, StagePairs, check_stage_choice, matched_stages, select_stages


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
class AT(DistillMethod):
    """Attention maps of intermediate features.

    Args:
        power: Exponent of the activations, more than 1.
        stages: Which matched stages: 'all', 'last', 'middle' or positions, shallow to deep.

    Raises:
        UsageError: If a value is not allowed.
    """
    paper = 'Zagoruyko and Komodakis, ICLR 2017, https://arxiv.org/abs/1612.03928'
    published_weight = 1000.
    weight_source = 'RepDistiller'
    student_outputs = frozenset({'stages'})
    teacher_outputs = frozenset({'stages'})

    def __init__(self, power: float = 2., stages: StageChoice = 'all'):
        super().__init__()
        if not 1 < power <= 16:
            raise UsageError(f'at.power={power!r} must be more than 1 and at most 16 (--kd-kwargs at.power=2).')
        self.power = float(power)
        self.stages = check_stage_choice(stages, 'at.stages')
        self.pairs: StagePairs = ()

    def build(self, pair: PairSpec) -> None:
        self.pairs = select_stages(pair, self.stages, 'at.stages', spatial=True)

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        students, teachers = zip(*matched_stages(student, teacher, self.pairs))
        return {'at_loss': attention_transfer_loss(students, teachers, self.power)}
