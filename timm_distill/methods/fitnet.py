"""FitNets: hints from a teacher's intermediate feature.

FitNets: Hints for Thin Deep Nets (Romero et al., ICLR 2015), https://arxiv.org/abs/1412.6550.

A convolutional regressor maps the student's middle stage to the teacher's; their mean squared distance is the loss, on
through the whole training as in the common implementation (weight 100), where the paper has a first phase for it
(`--kd-schedule fitnet=stop:30`). The regressor ends in batch norm and ReLU where the teacher's stage does, measured.
"""
from typing import Annotated, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..features.spec import Stage
from ..losses import match_grids
from ..utils.precision import in_full_precision
from ..utils.ranges import OneOf
from ._base import register_method
from ._layers import BatchNorm2d
from ._stages import StageChoice, StageMethod

Shape = Tuple[int, int, int]  # (C, H, W)


@in_full_precision
def hint_loss(regressed: Sequence[torch.Tensor], teachers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum over stages of the mean squared distance.

    Args:
        regressed: Regressor's output of each stage, [B, Ct, H, W].
        teachers: Likewise the teacher's feature, treated as constant. The larger of two grids is pooled to the smaller.

    Returns:
        Scalar.
    """
    pairs = [match_grids(student, teacher.detach()) for student, teacher in zip(regressed, teachers)]
    return torch.stack([F.mse_loss(student, teacher) for student, teacher in pairs]).sum()


class HintRegressor(nn.Module):
    """Convolution and batch norm from the student's stage to the teacher's, in the published form for their grids.

    Args:
        student: Shape of the student's stage.
        teacher: Shape of the teacher's stage.
        relu: End with a ReLU.
    """

    def __init__(self, student: Shape, teacher: Shape, relu: bool = True):
        super().__init__()
        self.conv = _create_convolution(student, teacher)
        self.bn = BatchNorm2d(teacher[0])
        self.relu = relu

    def forward(self, student: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.conv(student))
        return F.relu(x) if self.relu else x


def _create_convolution(student: Shape, teacher: Shape) -> nn.Module:
    """Halve or double the grid, or cover a small difference; for other grids a 1x1 convolution, the loss pools."""
    channels, grid, target = (student[0], teacher[0]), student[1:], teacher[1:]
    if grid == (2 * target[0], 2 * target[1]):
        return nn.Conv2d(*channels, 3, stride=2, padding=1)
    if target == (2 * grid[0], 2 * grid[1]):
        return nn.ConvTranspose2d(*channels, 4, stride=2, padding=1)
    if all(t <= s < 2 * t for s, t in zip(grid, target)):
        return nn.Conv2d(*channels, (1 + grid[0] - target[0], 1 + grid[1] - target[1]))
    return nn.Conv2d(*channels, 1)


@register_method('fitnet')
class FitNet(StageMethod):
    """Intermediate features through a convolutional regressor.

    Args:
        stages: Which matched stages: 'middle', 'all', 'last' or positions, shallow to deep.
        relu: End the regressor with a ReLU, as published; None does where the teacher's stage has no negative number.
    """
    paper = 'Romero et al., ICLR 2015, https://arxiv.org/abs/1412.6550'
    published_weight = 100.
    weight_source = 'RepDistiller'

    def __init__(
            self,
            stages: StageChoice = 'middle',
            relu: Annotated[Optional[bool], OneOf(None, True, False)] = None,
    ):
        super().__init__(stages)
        self.relu = relu

    def build_stages(self, stages: List[Tuple[Stage, Stage]]) -> None:
        self.regressors = nn.ModuleList([
            HintRegressor(s.shape, t.shape, t.nonnegative if self.relu is None else self.relu) for s, t in stages])

    def compare(self, students: Sequence[torch.Tensor], teachers: Sequence[torch.Tensor]) -> Dict[str, torch.Tensor]:
        regressed = [regressor(s) for regressor, s in zip(self.regressors, students)]
        return {'fitnet_loss': hint_loss(regressed, teachers)}
