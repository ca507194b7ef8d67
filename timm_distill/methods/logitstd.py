"""Distillation of standardised logits.

Logit Standardization in Knowledge Distillation (Sun et al., CVPR 2024), https://arxiv.org/abs/2403.01427.

Each sample's logits, of student and teacher, are brought to mean 0 and standard deviation 1 before the softened
divergence, so that the student need not copy the teacher's logit range. The paper's CIFAR-100 runs with plain KD have
temperature 2, weight 9 and 0.1 times the cross-entropy of the raw logits:
`--kd logitstd --task-loss-weight 0.1`.
"""
from typing import Annotated, Dict

import torch

from ..features.spec import Features
from ..losses import is_constant, kl_divergence, to_full_precision
from ..utils.ranges import Range
from ._base import DistillMethod, Temperature, register_method

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
class LogitStandardization(DistillMethod):
    """Soft-label distillation of standardised logits.

    Args:
        temperature: Divides both standardised logits; the loss is multiplied by its square.
        eps: Added to the standard deviation.
    """
    paper = 'Sun et al., CVPR 2024, https://arxiv.org/abs/2403.01427'
    published_weight = 9.
    weight_source = "the authors' code for CIFAR-100, beside 0.1 times the label loss"

    def __init__(
            self,
            temperature: Temperature = 2.,
            eps: Annotated[float, Range(0, 1, without_low=True)] = EPS,
    ):
        super().__init__()
        self.temperature, self.eps = float(temperature), float(eps)

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        assert student.logits is not None and teacher.logits is not None
        loss = kl_divergence(
            standardize(student.logits, self.eps), standardize(teacher.logits, self.eps), self.temperature)
        return {'logitstd_loss': loss}
