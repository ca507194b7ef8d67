"""Pooled-feature distillation, as timm's own.

The student's pre-logits, projected by a linear layer where the widths differ, are compared with the teacher's.
`loss='mse'` is `timm.task.FeatureDistillationTask` (timm 1.0.31), with the same numbers; `loss='cosine'` compares
directions alone.
"""
from typing import Annotated, Dict, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..features.spec import Features, PairSpec
from ..losses import l2_normalize, to_full_precision
from ..utils.ranges import OneOf
from ._base import DistillMethod, register_method


def cosine_distance(student: torch.Tensor, teacher: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Mean over the batch of 1 - cosine of two features, [B, D] each; below eps a feature has no direction."""
    similarity = l2_normalize(student, dim=1, eps=eps) * l2_normalize(teacher, dim=1, eps=eps)
    return 1 - similarity.sum(1).mean()


LOSSES = {'mse': F.mse_loss, 'cosine': cosine_distance}


@register_method('feature')
class PooledFeature(DistillMethod):
    """Matching of the pre-logits, projected to the teacher's width where it differs.

    Args:
        loss: 'mse' (timm's) or 'cosine'.
    """
    paper = 'timm 1.0.31, https://github.com/huggingface/pytorch-image-models (FeatureDistillationTask)'
    weight_source = "timm's FeatureDistillationTask"
    student_outputs = frozenset({'pre_logits'})
    teacher_outputs = frozenset({'pre_logits'})

    def __init__(self, loss: Annotated[str, OneOf(*LOSSES)] = 'mse'):
        super().__init__()
        self.loss = loss
        self.projection: Optional[nn.Module] = None

    def build(self, pair: PairSpec) -> None:
        if pair.student.pre_logits != pair.teacher.pre_logits:
            self.projection = nn.Linear(pair.student.pre_logits, pair.teacher.pre_logits)

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        assert student.pre_logits is not None and teacher.pre_logits is not None
        feature = student.pre_logits if self.projection is None else self.projection(student.pre_logits)
        loss = LOSSES[self.loss](to_full_precision(feature), to_full_precision(teacher.pre_logits.detach()))
        return {'feature_loss': loss}
