"""Relational knowledge distillation.

Relational Knowledge Distillation (Park et al., CVPR 2019), https://arxiv.org/abs/1904.05068.

Distances between the samples of a batch, in units of their mean, and the angles of all triples, compared by the Huber
loss on pre-logits. The inner weights 25 and 50 are the published ones; the method's weight beside them is 1.

The angles come from inner products: <x_j - x_i, x_k - x_i> is a sum of four entries of the Gram matrix of centred
features, so that B x B difference vectors are never kept.
"""
from typing import Dict

import torch
import torch.nn.functional as F

from ..features.spec import Features
from ..utils.precision import in_full_precision
from ._base import DistillMethod, Weight, check_weights, register_method

_EPS = 1e-12  # smallest squared distance


def _gram(x: torch.Tensor) -> torch.Tensor:
    """Inner products of centred features, [B, ...] -> [B, B]: distances and angles do not depend on the mean."""
    x = x.flatten(1)
    x = x - x.mean(0)
    return x @ x.mT


def _squared_distances(gram: torch.Tensor) -> torch.Tensor:
    return gram.diagonal()[:, None] + gram.diagonal() - 2 * gram


def relative_distances(gram: torch.Tensor) -> torch.Tensor:
    """Distances of all pairs in units of the mean distance; from the Gram matrix, [B, B] -> [B, B]."""
    distances = _squared_distances(gram).clamp(min=_EPS).sqrt()
    distances = distances - torch.diag(distances.diagonal())
    return distances / (distances.sum() / max(distances.shape[0] * (distances.shape[0] - 1), 1)).clamp(min=_EPS)


def angle_cosines(gram: torch.Tensor) -> torch.Tensor:
    """Cosine of the angle at sample i between samples j and k; from the Gram matrix, [B, B] -> [B, B, B].

    It is 0 where two of the samples coincide, up to the rounding of the Gram matrix.
    """
    squared, norms = _squared_distances(gram), gram.diagonal()
    same = squared <= (8 * torch.finfo(gram.dtype).eps * (norms[:, None] + norms)).clamp(min=_EPS ** 2)
    inverse = squared.masked_fill(same, 1.).rsqrt().masked_fill(same, 0.)
    products = gram - gram[:, :, None] - gram[:, None, :] + norms[:, None, None]  # [i, j, k]
    return products * inverse[:, :, None] * inverse[:, None, :]


@in_full_precision
def distance_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Huber loss of the relative distances; features [B, ...], the teacher's constant."""
    return F.smooth_l1_loss(relative_distances(_gram(student)), relative_distances(_gram(teacher.detach())))


@in_full_precision
def angle_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Huber loss of the angles of all triples; features [B, ...], the teacher's constant."""
    return F.smooth_l1_loss(angle_cosines(_gram(student)), angle_cosines(_gram(teacher.detach())))


@register_method('rkd')
class RKD(DistillMethod):
    """Distances and angles between the samples of a batch.

    Args:
        distance_weight: Weight of the distances.
        angle_weight: Weight of the angles; 0 leaves them out, whose cost grows with the cube of the batch.

    Raises:
        UsageError: If both weights are 0.
    """
    paper = 'Park et al., CVPR 2019, https://arxiv.org/abs/1904.05068'
    weight_source = "RepDistiller; the paper's 25 and 50 are options"
    student_outputs = frozenset({'pre_logits'})
    teacher_outputs = frozenset({'pre_logits'})

    def __init__(self, distance_weight: Weight = 25., angle_weight: Weight = 50.):
        super().__init__()
        check_weights('rkd', distance_weight=distance_weight, angle_weight=angle_weight)
        self.distance_weight = float(distance_weight)
        self.angle_weight = float(angle_weight)

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        assert student.pre_logits is not None and teacher.pre_logits is not None
        features = student.pre_logits, teacher.pre_logits
        terms = {}
        if self.distance_weight:
            terms['rkd_distance_loss'] = self.distance_weight * distance_loss(*features)
        if self.angle_weight:
            terms['rkd_angle_loss'] = self.angle_weight * angle_loss(*features)
        return terms
