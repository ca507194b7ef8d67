"""Neuron selectivity transfer.

Like What You Like: Knowledge Distill via Neuron Selectivity Transfer (Huang and Wang, 2017),
https://arxiv.org/abs/1707.01219.

Maximum mean discrepancy between the channels' activation maps, each of unit length, with the published polynomial
kernel of degree 2 without constant. Its weight in the common implementation is 50.

With K(a, b) the mean of <a_i, b_j>^2 over channel pairs, the discrepancy is || A^T A / Cs - B^T B / Ct ||^2, the
Frobenius norm of a matrix of positions. It is computed from that matrix or from Gram matrices of the channels,
whichever is cheaper for a stage; both are exact.
"""
from typing import Dict, Sequence

import torch

from ..losses import l2_normalize, match_grids, squared_norm_of_product
from ..utils.precision import in_full_precision
from ._base import register_method
from ._stages import StageChoice, StageMethod


@in_full_precision
def selectivity_loss(students: Sequence[torch.Tensor], teachers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum over stages of the squared maximum mean discrepancy between the channels' activation maps.

    Args:
        students: Feature map of each stage, [B, Cs, Hs, Ws].
        teachers: Likewise, [B, Ct, Ht, Wt], treated as constant. The larger of two grids is pooled to the smaller.

    Returns:
        Scalar.
    """
    return torch.stack([_stage_loss(s, t.detach()) for s, t in zip(students, teachers)]).sum()


def _stage_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    student, teacher = match_grids(student, teacher)
    a, b = l2_normalize(student.flatten(2)), l2_normalize(teacher.flatten(2))  # [B, C, H * W]
    weighted = torch.cat([a / a.shape[1], -b / b.shape[1]], 1)
    return squared_norm_of_product(torch.cat([a, b], 1).mT, weighted.mT).mean()


@register_method('nst')
class NST(StageMethod):
    """Distributions of the channels' activation maps.

    Args:
        stages: Which matched stages: 'all', 'last', 'middle' or positions, shallow to deep.
    """
    paper = 'Huang and Wang, 2017, https://arxiv.org/abs/1707.01219'
    published_weight = 50.
    weight_source = 'RepDistiller'
    spatial = True

    def __init__(self, stages: StageChoice = 'all'):
        super().__init__(stages)

    def compare(self, students: Sequence[torch.Tensor], teachers: Sequence[torch.Tensor]) -> Dict[str, torch.Tensor]:
        return {'nst_loss': selectivity_loss(students, teachers)}
