"""Transformed teacher matching, and its weighted form.

Knowledge Distillation Based on Transformed Teacher Matching (Zheng and Yang, ICLR 2024),
https://arxiv.org/abs/2402.11148.

The teacher's probabilities are raised to a power below 1 and normalised again, which is a temperature on the teacher
alone: the student has none, and there is no factor of its square. `wttm` weighs each sample by the sum of the powers,
from 1 (a certain teacher) to K^(1 - power) (one without an idea). The published values for CIFAR-100 are the defaults:
power 0.1 and weight 45 for `ttm`, 0.2 and 4 for `wttm`, where it stands beside CRD. The published code has no settings
for ImageNet.
"""
from typing import Annotated, Dict

import torch

from ..losses import kl_divergences, to_full_precision
from ..utils.ranges import Range
from ._base import register_method
from ._logits import LogitMethod

Power = Annotated[float, Range(0, 100, without_low=True)]


def ttm_losses(student_logits: torch.Tensor, teacher_logits: torch.Tensor, power: float = 0.1) -> torch.Tensor:
    """Divergence of the student from the power-transformed teacher, for every sample.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K], treated as constant.
        power: Exponent of the teacher's probabilities.

    Returns:
        [B].
    """
    return kl_divergences(student_logits, power * to_full_precision(teacher_logits))


def power_sums(teacher_logits: torch.Tensor, power: float) -> torch.Tensor:
    """Sum of the powers of each sample's probabilities, [B, K] -> [B], from logarithms: it holds for any logits."""
    logits = to_full_precision(teacher_logits.detach())
    return (torch.logsumexp(power * logits, dim=1) - power * torch.logsumexp(logits, dim=1)).exp()


@register_method('ttm')
class TTM(LogitMethod):
    """The student's distribution against a power of the teacher's; no temperature on the student.

    Args:
        power: Exponent of the teacher's probabilities, 1 for the teacher as it is.
    """
    paper = 'Zheng and Yang, ICLR 2024, https://arxiv.org/abs/2402.11148'
    published_weight = 45.
    weight_source = "the authors' code for CIFAR-100"

    def __init__(self, power: Power = 0.1):
        super().__init__()
        self.power = float(power)

    def sample_losses(
            self,
            student_logits: torch.Tensor,
            teacher_logits: torch.Tensor,
            target: torch.Tensor,
    ) -> Dict[str, torch.Tensor]:
        return {'ttm_loss': ttm_losses(student_logits, teacher_logits, self.power)}


@register_method('wttm')
class WTTM(TTM):
    """Transformed teacher matching in which samples that the teacher is uncertain of weigh more.

    Args:
        power: Exponent of the teacher's probabilities, in the weight of each sample too.
    """
    paper = 'Zheng and Yang, ICLR 2024, https://arxiv.org/abs/2402.11148'
    published_weight = 4.
    weight_source = "the authors' code for CIFAR-100, beside CRD"

    def __init__(self, power: Power = 0.2):
        super().__init__(power)

    def sample_losses(
            self,
            student_logits: torch.Tensor,
            teacher_logits: torch.Tensor,
            target: torch.Tensor,
    ) -> Dict[str, torch.Tensor]:
        losses = ttm_losses(student_logits, teacher_logits, self.power)
        return {'wttm_loss': power_sums(teacher_logits, self.power) * losses}
