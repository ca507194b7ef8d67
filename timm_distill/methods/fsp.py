"""Flow of solution procedure.

A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning (Yim et al., CVPR
2017), https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html.

The flow between two neighbouring stages is the matrix of inner products of their channels, averaged over positions.
Stages of different width get a trained linear map of the student's channels, which the original, made for equal
widths, does not have. Published is a first phase of this loss alone (`--kd-schedule fsp=initialize` keeps it to the
first 30 epochs); the common weight is 50.

Flow matrices of wide stages are large (2048 x 1024 numbers for each image in the last of a ResNet-50) but of low rank:
their distance is computed from Gram matrices of positions where that is cheaper, which is exact.
"""
from typing import Dict, List, Sequence, Tuple

import torch
import torch.nn as nn

from ..features.spec import Stage
from ..losses import match_grids, squared_norm_of_product
from ..utils.precision import in_full_precision
from ._base import register_method
from ._layers import equal_channels
from ._stages import StageChoice, StageMethod


@in_full_precision
def flow_loss(students: Sequence[torch.Tensor], teachers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum over neighbouring stages of the mean squared difference of flow matrices.

    Args:
        students: Feature map of each stage, shallow to deep, [B, C, H, W]; grids may differ from the teacher's.
        teachers: Likewise, treated as constant, with the same channels.

    Returns:
        Scalar.
    """
    student, teacher = _neighbours(students), _neighbours([t.detach() for t in teachers])
    losses = []
    for (s_bottom, s_top), (t_bottom, t_top) in zip(student, teacher):
        top, bottom = torch.cat([s_top, t_top], -1), torch.cat([s_bottom, -t_bottom], -1)
        losses.append(squared_norm_of_product(top, bottom).mean() / (top.shape[1] * bottom.shape[1]))
    return torch.stack(losses).sum()


def _neighbours(stages: Sequence[torch.Tensor]) -> List[List[torch.Tensor]]:
    """Return neighbouring maps on one grid as [B, C, H * W], scaled so that their product is the flow matrix."""
    pairs = [match_grids(bottom, top) for bottom, top in zip(stages, stages[1:])]
    return [[x.flatten(2) / (x.shape[-2] * x.shape[-1]) ** 0.5 for x in pair] for pair in pairs]


@register_method('fsp')
class FSP(StageMethod):
    """Flows between neighbouring stages: inner products of their channels.

    Args:
        stages: Which matched stages, two or more: 'all' or positions, shallow to deep.
    """
    paper = 'Yim et al., CVPR 2017'
    published_weight = 50.
    weight_source = 'RepDistiller'
    neighbours = 'flows between'
    schedules = {'initialize': ((0, 1.), (30, 0.))}

    def __init__(self, stages: StageChoice = 'all'):
        super().__init__(stages)

    def build_stages(self, stages: List[Tuple[Stage, Stage]]) -> None:
        self.connectors = nn.ModuleList([equal_channels(s.shape[0], t.shape[0]) for s, t in stages])

    def compare(self, students: Sequence[torch.Tensor], teachers: Sequence[torch.Tensor]) -> Dict[str, torch.Tensor]:
        connected = [connector(s) for connector, s in zip(self.connectors, students)]
        return {'fsp_loss': flow_loss(connected, teachers)}
