"""DIST: correlation instead of divergence.

Knowledge Distillation from A Stronger Teacher (Huang et al., NeurIPS 2022), https://arxiv.org/abs/2205.10536.

Softened probabilities of student and teacher are compared by Pearson's correlation, which leaves scale and offset free:
over the classes of each sample (inter-class relation) and over the samples of each class (intra-class relation). The
defaults are the official code's.

With one sample the relation over samples is undefined; its term is then the constant temperature squared, as in the
official code. Probabilities that are all alike, as those of a classifier that starts at zero, have no correlation
either: their term has the official value and the gradient towards the teacher's direction, not divided by a deviation
that is rounding alone.
"""
from typing import Dict, Tuple

import torch
import torch.nn.functional as F

from ..features.spec import Features
from ..losses import is_constant, to_full_precision
from ._base import DistillMethod, Temperature, Weight, check_weights, register_method

EPS = 1e-8  # added to the product of the norms


def pearson_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean over rows of 1 minus the correlation of the two tensors' rows, [N, D] each; a scalar."""
    (x, x_length), (y, y_length) = _centre(x), _centre(y)
    correlation = (x * y).sum(dim=1) / (x_length * y_length + EPS)
    return 1 - correlation.mean()


def _centre(x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return rows minus their means, [N, D], and what to divide them by, [N]: their lengths, 1 for constant rows."""
    centred = x - x.mean(dim=1, keepdim=True)
    length = centred.norm(dim=1)
    constant = is_constant(x, length[:, None] / x.shape[1] ** 0.5)[:, 0]
    return centred, torch.where(constant, torch.ones_like(length), length)


def dist_losses(
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        temperature: float = 1.,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return the inter-class and the intra-class term, both times temperature squared.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K], treated as constant.
        temperature: Divides both logits.

    Returns:
        Two scalars.
    """
    student = F.softmax(to_full_precision(student_logits) / temperature, dim=1)
    teacher = F.softmax(to_full_precision(teacher_logits.detach()) / temperature, dim=1)
    scale = temperature ** 2
    return scale * pearson_distance(student, teacher), scale * pearson_distance(student.t(), teacher.t())


@register_method('dist')
class DIST(DistillMethod):
    """Correlation of the softened probabilities, over classes and over the samples of the batch.

    Args:
        beta: Weight of the relation between classes; 0 leaves it out.
        gamma: Weight of the relation within classes, between samples; 0 leaves it out.
        temperature: Divides both logits; the terms are multiplied by its square.

    Raises:
        UsageError: If both weights are 0.
    """
    paper = 'Huang et al., NeurIPS 2022, https://arxiv.org/abs/2205.10536'
    weight_source = "the authors' code for ImageNet"

    def __init__(self, beta: Weight = 1., gamma: Weight = 1., temperature: Temperature = 1.):
        super().__init__()
        check_weights('dist', beta=beta, gamma=gamma)
        self.beta, self.gamma, self.temperature = float(beta), float(gamma), float(temperature)

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        assert student.logits is not None and teacher.logits is not None
        inter, intra = dist_losses(student.logits, teacher.logits, self.temperature)
        terms = (('dist_inter_loss', self.beta, inter), ('dist_intra_loss', self.gamma, intra))
        return {name: weight * term for name, weight, term in terms if weight}
