"""Knowledge distillation by singular value decomposition.

Self-supervised Knowledge Distillation Using Singular Value Decomposition (Lee et al., ECCV 2018),
https://arxiv.org/abs/1807.06819.

Each stage is compressed to its k leading right singular vectors (positions x channels); a Gaussian kernel between the
vectors of neighbouring stages is matched with the teacher's. The student's vectors are those most aligned with the
teacher's, with the sign of that alignment, and carry the teacher's singular values. `k=1` is the published value.

What an SVD leaves open is settled here: the teacher's vectors point to where most of the data lies (Bro et al., 2008),
so that the loss does not depend on the library, and the student's gradient stays finite where singular values coincide
or vanish, by a smoothed 1 / (difference of squares). Stages of different width get a trained linear map of the
student's channels; the original needs equal widths.
"""
import math
from typing import Dict, List, Sequence, Tuple

import torch
import torch.nn as nn

from ..errors import UsageError
from ..features.spec import Stage
from ..losses import l2_normalize, pool_to_grid, squared_norm_of_product
from ..utils.precision import in_full_precision
from ._base import Count, CountOrNone, register_method
from ._layers import equal_channels
from ._stages import StageChoice, StageMethod

_EXTRA_VECTORS = 3  # of the student's, among which the best aligned are chosen
_KERNEL_TERMS = 12  # of the Gaussian kernel's series; arguments are at most 1/4, the rest is below 1e-15
_SMOOTHING = 1e-6  # of eigenvalue differences, relative to the largest eigenvalue


def singular_vectors(matrix: torch.Tensor, count: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Leading right singular vectors, differentiable, and singular values, constant.

    Args:
        matrix: [B, P, C].
        count: How many, at most min(P, C).

    Returns:
        Vectors [B, C, count] of either sign, values [B, count], from the largest.
    """
    tall = matrix.shape[1] > matrix.shape[2]
    x = matrix.mT if tall else matrix  # eigenvectors of the smaller Gram matrix, x x^T
    vectors, values = _leading_eigenvectors(x, count)
    return (vectors if tall else l2_normalize(x.mT @ vectors, dim=1)), values.clamp(min=0.).sqrt()


def _leading_eigenvectors(x: torch.Tensor, count: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Leading eigenvectors of x x^T with gradient, [B, n, count], and eigenvalues without, [B, count]."""
    with torch.no_grad():
        values, basis = torch.linalg.eigh(torch.nan_to_num(x @ x.mT, 0., 0., 0.))
        values, basis = values.flip(-1), basis.flip(-1)
        vectors = basis[..., :count]
        largest = values[:, :1, None].clamp(min=torch.finfo(values.dtype).tiny ** 0.5)
        gaps = (values[:, None, :count] - values[:, :, None]) / largest  # 0 for a vector with itself
        inverse_gaps = gaps / (gaps.square() + _SMOOTHING ** 2) / largest
    # first-order perturbation of the vectors: its value is zero, its derivative that of the decomposition
    product = x @ (x.mT @ vectors)
    change = product - product.detach()
    return vectors + basis @ (inverse_gaps * (basis.mT @ change)), values[:, :count]


def fix_signs(vectors: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Turn right singular vectors, [B, C, k], to the side on which most of the rows of `matrix`, [B, P, C], lie."""
    projections = matrix @ vectors
    return torch.where((projections * projections.abs()).sum(1, keepdim=True) < 0, -vectors, vectors)


def align_vectors(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Choose for each teacher vector, [B, C, k], the most aligned student vector of [B, C, m], with the same sign."""
    cosines = student.detach().mT @ teacher  # [B, m, k]
    best = cosines.abs().argmax(1, keepdim=True)
    chosen = student.gather(2, best.expand(-1, student.shape[1], -1))
    return chosen * cosines.gather(1, best).sign()


@in_full_precision
def singular_vector_loss(
        students: Sequence[torch.Tensor],
        teachers: Sequence[torch.Tensor],
        teacher_values: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Sum over neighbouring stages of the squared distance of kernels, mean over samples.

    Args:
        students: Aligned vectors of each stage, shallow to deep, [B, C, k].
        teachers: Likewise the teacher's, treated as constant.
        teacher_values: Its singular values of each stage, [B, k].

    Returns:
        Scalar.
    """
    scales = [l2_normalize(values.detach())[:, None] for values in teacher_values]
    student = [_kernel_features(v * scale) for v, scale in zip(students, scales)]
    teacher = [_kernel_features(v.detach() * scale) for v, scale in zip(teachers, scales)]
    losses = []
    for s_bottom, t_bottom, s_top, t_top in zip(student, teacher, student[1:], teacher[1:]):
        # s s' - t t' = (s - t) s' + t (s' - t'): differences first, they are small
        top, bottom = torch.cat([s_top - t_top, t_top], -1), torch.cat([s_bottom, s_bottom - t_bottom], -1)
        losses.append(squared_norm_of_product(top, bottom).sum(-1).mean())
    return torch.stack(losses).sum()


def _kernel_features(vectors: torch.Tensor) -> torch.Tensor:
    """Return f, [B, k, C, terms], with <f(x), f(y)> = exp(-(x - y)^2 / 8) for entries in [-1, 1] of [B, C, k]."""
    x = vectors.mT[..., None]
    order = torch.arange(_KERNEL_TERMS, device=x.device)
    norms = torch.tensor([math.factorial(n) ** 0.5 for n in range(_KERNEL_TERMS)], device=x.device, dtype=x.dtype)
    return (-x.square() / 8).exp() * (x / 2) ** order / norms


@in_full_precision
def compare_stages(students: Sequence[torch.Tensor], teachers: Sequence[torch.Tensor], k: int) -> torch.Tensor:
    """Loss of feature maps of equal channels, [B, C, H, W] each, shallow to deep; the teacher's constant."""
    aligned: List[torch.Tensor] = []
    vectors: List[torch.Tensor] = []
    values: List[torch.Tensor] = []
    for student, teacher in zip(students, teachers):
        x, y = student.flatten(2).mT, teacher.detach().flatten(2).mT  # [B, H * W, C]
        of_teacher, scale = singular_vectors(y, k)
        vectors.append(fix_signs(of_teacher, y))
        values.append(scale)
        of_student, _ = singular_vectors(x, min(k + _EXTRA_VECTORS, *x.shape[1:]))
        aligned.append(align_vectors(of_student, vectors[-1]))
    return singular_vector_loss(aligned, vectors, values)


@register_method('kdsvd')
class KDSVD(StageMethod):
    """Kernels between the singular vectors of neighbouring stages.

    Args:
        k: Singular vectors of each stage.
        grid: Pool larger maps to at most this many positions a side, for speed; 0 for no pooling, as published.
        stages: Which matched stages, two or more: 'all' or positions, shallow to deep.
    """
    paper = 'Lee et al., ECCV 2018, https://arxiv.org/abs/1807.06819'
    weight_source = 'none: no weight is published'
    neighbours = 'kernels between'

    def __init__(self, k: Count = 1, grid: CountOrNone = 0, stages: StageChoice = 'all'):
        super().__init__(stages)
        self.k = k
        self.grid = grid

    def build_stages(self, stages: List[Tuple[Stage, Stage]]) -> None:
        possible = min(
            min(shape[0], self._side(shape[1]) * self._side(shape[2]))
            for s, t in stages for shape in (s.shape, t.shape))
        if self.k > possible:
            raise UsageError(
                f'kdsvd.k={self.k} is more than the {possible} singular vectors of the smallest matched '
                'stage: lower it, or leave that stage out (kdsvd.stages).')
        self.connectors = nn.ModuleList([equal_channels(s.shape[0], t.shape[0]) for s, t in stages])

    def compare(self, students: Sequence[torch.Tensor], teachers: Sequence[torch.Tensor]) -> Dict[str, torch.Tensor]:
        connected = [connector(self._pool(s)) for connector, s in zip(self.connectors, students)]
        return {'kdsvd_loss': compare_stages(connected, [self._pool(t) for t in teachers], self.k)}

    def _side(self, size: int) -> int:
        return min(size, self.grid) if self.grid else size

    def _pool(self, feature: torch.Tensor) -> torch.Tensor:
        return pool_to_grid(feature, (self._side(feature.shape[-2]), self._side(feature.shape[-1])))
