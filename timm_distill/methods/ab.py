"""Activation boundaries.

Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons (Heo et al., AAAI 2019),
https://arxiv.org/abs/1811.03233.

Which neurons of the teacher fire is matched, not how strongly: a hinge with a margin on the student's responses,
through a connector of 1x1 convolution and batch norm. A ReLU leaves the sign, so the teacher may be read before or
behind it.

Published is a first phase of this loss alone, then training on labels; here it is one term beside the others, and
`--kd-schedule ab=initialize` keeps it to the first 30 epochs. The scale is that of the common implementation: summed
over neurons, mean over samples, times 0.003, halved for each stage up from the deepest.
"""
from typing import Annotated, Dict, List, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..features.spec import Stage
from ..losses import pool_to_grid
from ..utils.precision import in_full_precision
from ..utils.ranges import Range
from ._base import register_method
from ._layers import conv_norm
from ._stages import StageChoice, StageMethod

_SCALE = 3e-3


@in_full_precision
def activation_boundary_loss(
        students: Sequence[torch.Tensor],
        teachers: Sequence[torch.Tensor],
        margin: float = 1.,
) -> torch.Tensor:
    """Squared hinge on responses that are on the other side of zero than the teacher's, or within the margin.

    Args:
        students: Responses of each stage, shallow to deep, [B, C, H, W].
        teachers: Likewise; only their sign counts.
        margin: Distance from zero that is asked for.

    Returns:
        Scalar.
    """
    losses = []
    for depth, (student, teacher) in enumerate(zip(reversed(students), reversed(teachers))):
        side = torch.where(teacher > 0, 1., -1.).to(student.dtype)
        losses.append(F.relu(margin - side * student).square().sum() / student.shape[0] * _SCALE / 2 ** depth)
    return torch.stack(losses).sum()


def match_responses(student: torch.Tensor, teacher: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Bring two maps to the smaller grid: the student's by averages, the teacher's by picking, which keeps signs."""
    grid = (min(student.shape[-2], teacher.shape[-2]), min(student.shape[-1], teacher.shape[-1]))
    if teacher.shape[-2:] != grid:
        teacher = F.interpolate(teacher, grid, mode='nearest')
    return pool_to_grid(student, grid), teacher


@register_method('ab')
class AB(StageMethod):
    """Activation boundaries: which of the teacher's neurons fire in intermediate features.

    Args:
        margin: Distance from zero that is asked of the student's responses.
        stages: Which matched stages: 'all', 'last', 'middle' or positions, shallow to deep.
    """
    paper = 'Heo et al., AAAI 2019, https://arxiv.org/abs/1811.03233'
    weight_source = 'RepDistiller'
    schedules = {'initialize': ((0, 1.), (30, 0.))}

    def __init__(
            self,
            margin: Annotated[float, Range(0, 1000, without_low=True)] = 1.,
            stages: StageChoice = 'all',
    ):
        super().__init__(stages)
        self.margin = float(margin)

    def build_stages(self, stages: List[Tuple[Stage, Stage]]) -> None:
        self.connectors = nn.ModuleList([conv_norm(s.shape[0], t.shape[0], 1) for s, t in stages])

    def compare(self, students: Sequence[torch.Tensor], teachers: Sequence[torch.Tensor]) -> Dict[str, torch.Tensor]:
        matched = [match_responses(*pair) for pair in zip(students, teachers)]
        responses = [connector(s) for connector, (s, _) in zip(self.connectors, matched)]
        return {'ab_loss': activation_boundary_loss(responses, [t for _, t in matched], self.margin)}
