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
from ..utils.ranges import OneOf, Range
from ._base import register_method
from ._layers import HintRegressor
from ._stages import StageChoice, StageMethod


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


@register_method('fitnet')
class FitNet(StageMethod):
    """Intermediate features through a convolutional regressor.

    Args:
        stages: Which matched stages: 'middle', 'all', 'last' or positions, shallow to deep.
        relu: End the regressor with a ReLU, as published; None does where the teacher's stage has no negative number.
        largest_ratio: Up to which ratio of the student's grid to the teacher's the regressor's kernel covers the
            difference, with 1 + difference taps along each side as in the common implementation, which does so for
            any; beyond it the map is averaged down behind a 1x1 convolution.
    """
    paper = 'Romero et al., ICLR 2015, https://arxiv.org/abs/1412.6550'
    published_weight = 100.
    weight_source = 'RepDistiller'

    def __init__(
            self,
            stages: StageChoice = 'middle',
            relu: Annotated[Optional[bool], OneOf(None, True, False)] = None,
            largest_ratio: Annotated[float, Range(1, 1000)] = 3.,
    ):
        super().__init__(stages)
        self.relu, self.largest_ratio = relu, float(largest_ratio)

    def build_stages(self, stages: List[Tuple[Stage, Stage]]) -> None:
        self.regressors = nn.ModuleList([
            HintRegressor(s.shape, t.shape, t.nonnegative if self.relu is None else self.relu, self.largest_ratio)
            for s, t in stages])

    def compare(self, students: Sequence[torch.Tensor], teachers: Sequence[torch.Tensor]) -> Dict[str, torch.Tensor]:
        regressed = [regressor(s) for regressor, s in zip(self.regressors, students)]
        return {'fitnet_loss': hint_loss(regressed, teachers)}
