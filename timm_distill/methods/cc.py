"""Correlation congruence.

Correlation Congruence for Knowledge Distillation (Peng et al., ICCV 2019), https://arxiv.org/abs/1904.01802.

Computes what the common implementation does: both models' pre-logits are embedded by a trained linear layer, and the
products of neighbouring samples' embedding errors are summed. Its weight there is 0.02 and the embedding has
128 dimensions. The paper itself compares the batch's correlation matrices under a Gaussian kernel.
"""
from typing import Dict

import torch
import torch.nn as nn

from ..features.spec import Features, PairSpec
from ..utils.precision import in_full_precision
from ._base import DistillMethod, Width, register_method


@in_full_precision
def correlation_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Sum over dimensions of the products of neighbouring samples' absolute differences, mean over neighbours.

    Args:
        student: Embeddings, [B, D].
        teacher: Likewise. Their embedding trains too, so they are no constants.

    Returns:
        Scalar; 0 for a batch of one, which has no neighbours.
    """
    difference = (student - teacher).abs()
    return (difference[:-1] * difference[1:]).sum() / max(difference.shape[0] - 1, 1)


@register_method('cc')
class CC(DistillMethod):
    """Correlations between neighbouring samples in a trained embedding.

    Args:
        width: Dimensions of the embedding.
    """
    paper = 'Peng et al., ICCV 2019, https://arxiv.org/abs/1904.01802'
    published_weight = 0.02
    weight_source = 'RepDistiller'
    student_outputs = frozenset({'pre_logits'})
    teacher_outputs = frozenset({'pre_logits'})

    def __init__(self, width: Width = 128):
        super().__init__()
        self.width = width

    def build(self, pair: PairSpec) -> None:
        self.student_embedding = nn.Linear(pair.student.pre_logits, self.width)
        self.teacher_embedding = nn.Linear(pair.teacher.pre_logits, self.width)

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        assert student.pre_logits is not None and teacher.pre_logits is not None
        of_teacher = teacher.pre_logits.detach().to(self.teacher_embedding.weight.dtype)
        embeddings = self.student_embedding(student.pre_logits), self.teacher_embedding(of_teacher)
        return {'cc_loss': correlation_loss(*embeddings)}
