"""Softmax regression representation learning, and feature matching, its first approach.

Knowledge distillation via softmax regression representation learning (Yang et al., ICLR 2021),
https://openreview.net/forum?id=ZzwDy_wiWv.

A connector (1x1 convolution, batch norm, ReLU) brings the student's feature to the teacher's width. `srrl` matches its
spatial mean with the teacher's, and what the teacher's own frozen head makes of it with the teacher's logits: the
student's representation shall be one that the teacher's classifier reads as its own. `fm` is the former term alone and
works with every teacher. The paper gives both terms, and the cross-entropy, the weight 1.

The paper's teachers end in a ReLU, which the connector copies. Where the teacher's feature is measured to have negative
values (ViT, ConvNeXt), the connector ends in its batch norm. Where the teacher's head takes no map (a class token), its
pre-logits and the student's take the place of the features.
"""
from typing import Dict, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import UsageError
from ..features.spec import Features, PairSpec, Pooling
from ..losses import to_full_precision
from ._base import DistillMethod, Weight, register_method
from ._layers import BatchNorm2d


def statistics_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the spatial means of two maps, [B, C, H, W] each, on any grids; a scalar."""
    student, teacher = to_full_precision(student), to_full_precision(teacher.detach())
    return F.mse_loss(student.mean((2, 3)), teacher.mean((2, 3)))


def regression_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the logits, [B, K], that one head gives for both models' features; a scalar."""
    return F.mse_loss(to_full_precision(student_logits), to_full_precision(teacher_logits.detach()))


class Connector(nn.Module):
    """1x1 convolution without bias, batch norm and, where the teacher's feature is never negative, ReLU.

    Args:
        in_channels: Channels of the student.
        out_channels: Channels of the teacher.
        relu: End in a ReLU.
    """

    def __init__(self, in_channels: int, out_channels: int, relu: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn = BatchNorm2d(out_channels)
        self.relu = relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, in_channels, H, W] to [B, out_channels, H, W]."""
        x = self.bn(self.conv(x))
        return F.relu(x) if self.relu else x


class _Matching(DistillMethod):
    """Base of both methods: a connector between the penultimate features."""
    paper = 'Yang et al., ICLR 2021, https://openreview.net/forum?id=ZzwDy_wiWv'
    weight_source = "the authors' code"
    student_outputs = frozenset({'feature', 'pre_logits'})
    connector: Connector

    def build(self, pair: PairSpec) -> None:
        self.matched = 'feature' if pair.teacher.head == 'feature' else 'pre_logits'
        in_channels, out_channels = (
            spec.feature[0] if self.matched == 'feature' else spec.pre_logits
            for spec in (pair.student, pair.teacher))
        self.connector = Connector(in_channels, out_channels, relu=self.matched in pair.teacher.non_negative)

    def teacher_pooling(self) -> Optional[Pooling]:
        return Pooling((1, 1))

    def penultimate(self, features: Features) -> torch.Tensor:
        """Return the feature that is matched as a map, [B, C, H, W] or [B, D, 1, 1]."""
        feature: Optional[torch.Tensor] = getattr(features, self.matched)
        assert feature is not None
        return feature if feature.ndim == 4 else feature[:, :, None, None]


@register_method('srrl')
class SRRL(_Matching):
    """The student's feature read by the teacher's own frozen head, and its spatial mean.

    Args:
        logit_weight: Weight of the term on the logits beside the one on the feature; 0 leaves it out.
    """
    teacher_outputs = frozenset({'logits', 'feature', 'pre_logits', 'head'})

    def __init__(self, logit_weight: Weight = 1.):
        super().__init__()
        self.logit_weight = float(logit_weight)

    def build(self, pair: PairSpec) -> None:
        if not pair.teacher.num_classes:
            raise UsageError(
                "--kd srrl matches logits of the teacher's classifier, but this teacher has none: what "
                'its head makes of a feature is that feature again. Use --kd fm, which matches the '
                'feature alone, or a --teacher that classifies.')
        if not pair.teacher.head:
            raise UsageError(
                "--kd srrl runs the teacher's head on the student's feature, but this head takes neither "
                "the teacher's last feature map nor its pre-logits alone. Use --kd fm, which matches the "
                'feature without the head, or another --teacher.')
        super().build(pair)

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        assert teacher.head is not None and teacher.logits is not None
        connected = self.connector(self.penultimate(student))
        terms = {'srrl_stat_loss': statistics_loss(connected, self.penultimate(teacher))}
        if self.logit_weight:
            terms['srrl_logit_loss'] = self.logit_weight * regression_loss(teacher.head(connected), teacher.logits)
        return terms


@register_method('fm')
class FeatureMatching(_Matching):
    """The spatial mean of the penultimate feature through a connector; SRRL without the teacher's head."""
    teacher_outputs = frozenset({'feature', 'pre_logits'})

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        return {'fm_loss': statistics_loss(self.connector(self.penultimate(student)), self.penultimate(teacher))}
