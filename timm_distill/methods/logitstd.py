"""Distillation of standardised logits.

Logit Standardization in Knowledge Distillation (Sun et al., CVPR 2024), https://arxiv.org/abs/2403.01427.

Each sample's logits, of student and teacher, are brought to mean 0 and standard deviation 1 before the softened
divergence, so that the student need not copy the teacher's logit range. The paper's CIFAR-100 runs with plain KD have
temperature 2, weight 9 and 0.1 times the cross-entropy of the raw logits:
`--kd logitstd --task-loss-weight 0.1`.
"""
from typing import Annotated, Dict

import torch

from ..losses import is_constant, kl_divergences, to_full_precision
from ..utils.ranges import OneOf, Range
from ._base import Temperature, register_method
from ._logits import LogitMethod

EPS = 1e-7  # added to the standard deviation


def standardize(logits: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    """Z-score of each sample's logits, with the unbiased standard deviation: [B, K] -> [B, K].

    Logits that are all alike, as those of a classifier that starts at zero, are not scaled: by `1 / eps` their gradient
    would end the training in its first step.
    """
    logits = to_full_precision(logits)
    deviation = logits.std(dim=1, keepdim=True)
    scale = torch.where(is_constant(logits, deviation), torch.ones_like(deviation), deviation + eps)
    return (logits - logits.mean(dim=1, keepdim=True)) / scale


@register_method('logitstd')
class LogitStandardization(LogitMethod):
    """Soft-label distillation of standardised logits.

    Args:
        temperature: Divides both standardised logits; the loss is multiplied by its square.
        eps: Added to the standard deviation.
        reduction: 'batchmean' (sum over classes, mean over samples), 'mean' (mean over classes too) or 'sum'.
    """
    paper = 'Sun et al., CVPR 2024, https://arxiv.org/abs/2403.01427'
    published_weight = 9.
    weight_source = "the authors' code for CIFAR-100, beside 0.1 times the label loss"

    def __init__(
            self,
            temperature: Temperature = 2.,
            eps: Annotated[float, Range(0, 1, without_low=True)] = EPS,
            reduction: Annotated[str, OneOf('batchmean', 'mean', 'sum')] = 'batchmean',
    ):
        super().__init__()
        self.temperature, self.eps, self.reduction = float(temperature), float(eps), reduction

    def sample_losses(
            self,
            student_logits: torch.Tensor,
            teacher_logits: torch.Tensor,
            target: torch.Tensor,
    ) -> Dict[str, torch.Tensor]:
        student, teacher = (standardize(logits, self.eps) for logits in (student_logits, teacher_logits.detach()))
        losses = kl_divergences(student, teacher, self.temperature)
        samples, classes = student_logits.shape
        factor = {'batchmean': 1., 'mean': 1 / classes, 'sum': float(samples)}[self.reduction]
        return {'logitstd_loss': factor * losses}
