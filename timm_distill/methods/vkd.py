"""Orthogonal projector towards the teacher's normalised feature.

VkD: Improving Knowledge Distillation using Orthogonal Projections (Miles et al., CVPR 2024),
https://arxiv.org/abs/2403.06213.

The student's last feature, averaged over positions, is mapped by a matrix with orthonormal columns (or rows, where the
teacher is narrower) and compared with the teacher's, which alone is layer-normalised. The published recipe for DeiT
adds the divergence of the distillation token's logits with weight 1: `--kd vkd+token --kd-kwargs token.hard=False
token.temperature=1`.

The matrix is the orthonormal factor of a free one, so that it is orthogonal whatever is done to that. The published
parametrisation stores signs in the diagonal of its parameter, cut to integers: one step of AdamW with weight decay, and
the projector is zero from then on.
"""
from typing import Dict, Optional, Set

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..features.spec import Features, PairSpec, Pooling
from ..losses import to_full_precision
from ..utils.precision import in_full_precision
from ._base import DistillMethod, register_method

EPS = 1e-5  # of the layer norm


@in_full_precision
def orthonormal_factor(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns of a tall matrix, or rows of a wide one, [M, N] -> [M, N], which scaling does not change.

    The triangular factor has a positive diagonal, which makes the result unique and smooth.
    """
    tall = x if x.shape[0] >= x.shape[1] else x.mT
    q, r = torch.linalg.qr(tall)
    q = q * torch.where(r.diagonal() < 0, -1., 1.).to(q.dtype)
    return q if tall is x else q.mT


class OrthogonalProjector(nn.Module):
    """Linear map by a matrix with orthonormal columns or rows, without offset.

    Args:
        in_features: Width of the student.
        out_features: Width of the teacher.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.free = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.orthogonal_(self.free)

    @property
    def weight(self) -> torch.Tensor:
        """The matrix, [out_features, in_features]."""
        return orthonormal_factor(self.free)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, in_features] to [B, out_features]."""
        return project(x, self.weight)


@in_full_precision
def project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Map [B, D] by a matrix, [E, D], to [B, E]."""
    return x @ weight.to(x.dtype).mT


def representation_loss(projected: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Smooth L1 distance to the layer-normalised teacher, mean over entries.

    Args:
        projected: Student's projected feature, [B, Dt].
        teacher: Teacher's feature, [B, Dt], treated as constant.

    Returns:
        Scalar.
    """
    return F.smooth_l1_loss(to_full_precision(projected), normalize_teacher(teacher))


def normalize_teacher(teacher: torch.Tensor) -> torch.Tensor:
    """Layer norm of each sample's feature without scale and shift: [B, D] -> [B, D]."""
    teacher = to_full_precision(teacher.detach())
    return F.layer_norm(teacher, teacher.shape[1:], eps=EPS)


@register_method('vkd')
class VkD(DistillMethod):
    """The pooled last feature through an orthogonal projector, towards the teacher's layer-normalised one."""
    paper = 'Miles et al., CVPR 2024, https://arxiv.org/abs/2403.06213'
    weight_source = "the authors' code for DeiT"
    student_outputs = frozenset({'feature'})
    teacher_outputs = frozenset({'feature'})

    def build(self, pair: PairSpec) -> None:
        self.projector = OrthogonalProjector(pair.student.feature[0], pair.teacher.feature[0])

    def no_weight_decay(self) -> Set[str]:
        return {'projector.free'}

    def teacher_pooling(self) -> Optional[Pooling]:
        return Pooling((1, 1))

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        assert student.feature is not None and teacher.feature is not None
        projected = self.projector(to_full_precision(student.feature).mean((2, 3)))
        return {'vkd_loss': representation_loss(projected, to_full_precision(teacher.feature).mean((2, 3)))}
