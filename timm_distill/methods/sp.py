"""Similarity-preserving distillation.

Similarity-Preserving Knowledge Distillation (Tung and Mori, ICCV 2019), https://arxiv.org/abs/1907.09682.

Which samples of a batch activate a network alike: the B x B matrix of inner products, rows of unit length. Features of
any shape can be compared. The paper's weight is 3000, and its stage the last (`stages='last'`).
"""
from typing import Dict, Sequence

import torch

from ..losses import l2_normalize
from ..utils.precision import in_full_precision
from ._base import register_method
from ._stages import StageChoice, StageMethod


def similarity_matrix(feature: torch.Tensor) -> torch.Tensor:
    """Inner products of the samples, rows scaled to unit length: [B, ...] -> [B, B]."""
    flat = feature.flatten(1)
    return l2_normalize(flat @ flat.mT)


@in_full_precision
def similarity_preserving_loss(students: Sequence[torch.Tensor], teachers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum over stages of the mean squared difference of similarity matrices.

    Args:
        students: Feature of each stage, [B, ...].
        teachers: Likewise, treated as constant; shapes may differ.

    Returns:
        Scalar.
    """
    losses = [
        (similarity_matrix(student) - similarity_matrix(teacher.detach())).square().mean()
        for student, teacher in zip(students, teachers)
    ]
    return torch.stack(losses).sum()


@register_method('sp')
class SP(StageMethod):
    """Similarities between the samples of a batch.

    Args:
        stages: Which matched stages: 'all', 'last', 'middle' or positions, shallow to deep.
    """
    paper = 'Tung and Mori, ICCV 2019, https://arxiv.org/abs/1907.09682'
    published_weight = 3000.
    weight_source = 'the paper'

    def __init__(self, stages: StageChoice = 'last'):
        super().__init__(stages)

    def compare(self, students: Sequence[torch.Tensor], teachers: Sequence[torch.Tensor]) -> Dict[str, torch.Tensor]:
        return {'sp_loss': similarity_preserving_loss(students, teachers)}
