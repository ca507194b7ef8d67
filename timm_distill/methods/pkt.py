"""Probabilistic knowledge transfer.

Learning Deep Representations with Probabilistic Knowledge Transfer (Passalis and Tefas, ECCV 2018),
https://arxiv.org/abs/1803.10837.

The conditional probability that two samples of the batch are neighbours, from the cosine similarity of their
pre-logits (the published kernel for classification). The mean runs over all pairs, as in the authors' code; the common
weight is 30000.
"""
from typing import Dict

import torch

from ..features.spec import Features
from ..utils.precision import in_full_precision
from ._base import DistillMethod, register_method


def neighbour_probabilities(feature: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
    """Cosine similarities moved to [0, 1], rows scaled to sum to one: [B, D] -> [B, B]."""
    norm = torch.linalg.vector_norm(feature, dim=1, keepdim=True)
    zero = norm == 0  # without a direction; divided by eps it would have a gradient of 1 / eps
    unit = feature.masked_fill(zero, 0.) / (norm + eps).masked_fill(zero, 1.)
    similarity = ((unit @ unit.mT + 1) / 2).clamp(min=0.)  # rounding takes opposite features below
    return similarity / similarity.sum(1, keepdim=True)


@in_full_precision
def probabilistic_transfer_loss(student: torch.Tensor, teacher: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
    """Divergence of the neighbour probabilities, mean over all pairs of samples.

    Args:
        student: [B, Ds].
        teacher: [B, Dt], treated as constant.
        eps: Added to norms and probabilities.

    Returns:
        Scalar; 0 for a batch of one.
    """
    p, q = neighbour_probabilities(student, eps), neighbour_probabilities(teacher.detach(), eps)
    return (q * ((q + eps) / (p + eps)).log()).mean()


@register_method('pkt')
class PKT(DistillMethod):
    """Probabilities that samples of a batch are neighbours."""
    paper = 'Passalis and Tefas, ECCV 2018, https://arxiv.org/abs/1803.10837'
    published_weight = 30000.
    weight_source = 'RepDistiller'
    student_outputs = frozenset({'pre_logits'})
    teacher_outputs = frozenset({'pre_logits'})

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        assert student.pre_logits is not None and teacher.pre_logits is not None
        return {'pkt_loss': probabilistic_transfer_loss(student.pre_logits, teacher.pre_logits)}
