"""Variational information distillation.

Variational Information Distillation for Knowledge Transfer (Ahn et al., CVPR 2019), https://arxiv.org/abs/1904.05835.

A lower bound of the mutual information of both models' features: the student's feature predicts the teacher's mean,
each teacher channel has a trained variance. The published initial variance is 5; the method's weight is 1. The loss is
a negative log-likelihood without its constant and can be negative.
"""
import math
from typing import Annotated, Any, Dict, List, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..features.spec import Stage
from ..losses import match_grids
from ..utils.precision import in_full_precision
from ..utils.ranges import Range
from ._base import WidthOrAuto, register_method
from ._layers import conv1x1
from ._stages import StageChoice, StageMethod


@in_full_precision
def gaussian_nll(
        means: Sequence[torch.Tensor],
        log_scales: Sequence[torch.Tensor],
        teachers: Sequence[torch.Tensor],
        eps: float = 1e-5,
) -> torch.Tensor:
    """Sum over stages of the mean negative log-likelihood of the teacher's feature, without its constant.

    Args:
        means: Predicted feature of each stage, [B, Ct, H, W].
        log_scales: Each one's [Ct]; the variance of a channel is softplus(log_scale) + eps.
        teachers: Teacher's feature of each stage, [B, Ct, H, W], treated as constant.
        eps: Smallest variance.

    Returns:
        Scalar.
    """
    losses = []
    for mean, log_scale, teacher in zip(means, log_scales, teachers):
        variance = (F.softplus(log_scale) + eps)[:, None, None]
        losses.append(((mean - teacher.detach()).square() / variance + variance.log()).mean() / 2)
    return torch.stack(losses).sum()


class VariationalRegressor(nn.Module):
    """Predicts the teacher's feature with a variance for each of its channels.

    Args:
        student_channels: Cs.
        teacher_channels: Ct.
        width: Channels between the three 1x1 convolutions.
        initial_variance: Variance of every channel before training.
        eps: Smallest variance.
    """

    def __init__(
            self,
            student_channels: int,
            teacher_channels: int,
            width: int,
            initial_variance: float = 5.,
            eps: float = 1e-5,
    ):
        super().__init__()
        self.regressor = nn.Sequential(
            conv1x1(student_channels, width), nn.ReLU(), conv1x1(width, width), nn.ReLU(),
            conv1x1(width, teacher_channels))
        self.log_scale = nn.Parameter(torch.full((teacher_channels,), math.log(math.expm1(initial_variance - eps))))

    def forward(self, student: torch.Tensor) -> torch.Tensor:
        return self.regressor(student)


@register_method('vid')
class VID(StageMethod):
    """Mutual information of intermediate features, by a Gaussian with trained variances.

    Args:
        width: Channels inside the regressors; 0 for the teacher's.
        initial_variance: Variance of every channel before training.
        stages: Which matched stages: 'all', 'last', 'middle' or positions, shallow to deep.
    """
    paper = 'Ahn et al., CVPR 2019, https://arxiv.org/abs/1904.05835'
    weight_source = 'RepDistiller'

    def __init__(
            self,
            width: WidthOrAuto = 0,
            initial_variance: Annotated[float, Range(1e-3, 100)] = 5.,
            stages: StageChoice = 'all',
    ):
        super().__init__(stages)
        self.width = width
        self.initial_variance = float(initial_variance)

    def build_stages(self, stages: List[Tuple[Stage, Stage]]) -> None:
        self.regressors = nn.ModuleList([
            VariationalRegressor(s.shape[0], t.shape[0], self.width or t.shape[0], self.initial_variance)
            for s, t in stages])

    def compare(self, students: Sequence[torch.Tensor], teachers: Sequence[torch.Tensor]) -> Dict[str, torch.Tensor]:
        students, teachers = zip(*map(match_grids, students, teachers))
        means = [regressor(s) for regressor, s in zip(self.regressors, students)]
        regressors: Any = self.regressors
        log_scales = [regressor.log_scale for regressor in regressors]
        return {'vid_loss': gaussian_nll(means, log_scales, teachers)}
