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
from typing import Dict, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import UsageError
from ..features.spec import Features, PairSpec
from ..losses import pool_to_grid
from ..utils.precision import in_full_precision
from ._base import DistillMethod, register_method
from ._layers import conv_norm
from ._stages import (
    StageChoice,
    StagePairs,
    check_stage_choice,
    matched_stages,
    select_stages,
    stages_of_pairs,
)

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
class AB(DistillMethod):
    """Which of the teacher's neurons fire in intermediate features.

    Args:
        margin: Distance from zero that is asked of the student's responses.
        stages: Which matched stages: 'all', 'last', 'middle' or positions, shallow to deep.

    Raises:
        UsageError: If a value is not allowed.
    """
    paper = 'Heo et al., AAAI 2019, https://arxiv.org/abs/1811.03233'
    weight_source = 'RepDistiller'
    student_outputs = frozenset({'stages'})
    teacher_outputs = frozenset({'stages'})
    schedules = {'initialize': ((0, 1.), (30, 0.))}

    def __init__(self, margin: float = 1., stages: StageChoice = 'all'):
        super().__init__()
        if not 0 < margin <= 1000:
            raise UsageError(f'ab.margin={margin!r} must be above 0 and at most 1000 (--kd-kwargs ab.margin=1).')
        self.margin = float(margin)
        self.stages = check_stage_choice(stages, 'ab.stages')
        self.pairs: StagePairs = ()

    def build(self, pair: PairSpec) -> None:
        self.pairs = select_stages(pair, self.stages, 'ab.stages')
        self.connectors = nn.ModuleList([
            conv_norm(s.shape[0], t.shape[0], 1)
            for s, t in stages_of_pairs(pair.student, pair.teacher, self.pairs)])

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        matched = [match_responses(*stages) for stages in matched_stages(student, teacher, self.pairs)]
        responses = [connector(s) for connector, (s, _) in zip(self.connectors, matched)]
        return {'ab_loss': activation_boundary_loss(responses, [t for _, t in matched], self.margin)}
