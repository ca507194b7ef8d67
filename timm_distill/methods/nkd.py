"""Normalised knowledge distillation.

From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and Customized Soft
Labels (Yang et al., ICCV 2023), https://arxiv.org/abs/2303.13005.

Two cross-entropies beside that of the labels: on the target class, weighted by the teacher's probability of it, and on
the other classes, where both distributions are normalised to sum to one. The entropy of the teacher stays in the value.
The defaults (gamma 1.5, temperature 1) are the published ones for ImageNet; DeiT pairs have gamma 1.

Of a soft label (mixup, cutmix, smoothing) the largest class is the target, as in the official code. `mask_target=False`
keeps the target class in the second term: so do the codes of SDD and of mdistiller, by mistake, with which the figures
of SDD-NKD were made.
"""
from typing import Dict

import torch
import torch.nn.functional as F

from ..losses import other_logits, target_classes, target_cross_entropies, to_full_precision
from ._base import Temperature, Weight, register_method
from ._logits import LogitMethod


def soft_cross_entropies(
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        temperature: float = 1.,
) -> torch.Tensor:
    """Cross-entropy with the teacher's softened distribution times temperature squared: [B, K] each -> [B]."""
    teacher = F.softmax(teacher_logits.detach() / temperature, dim=1)
    student = F.log_softmax(student_logits / temperature, dim=1)
    return -temperature ** 2 * (teacher * student).sum(dim=1)


@register_method('nkd')
class NKD(LogitMethod):
    """Cross-entropies on the target class and, normalised, on the other classes.

    Args:
        gamma: Weight of the term on the other classes; 0 leaves it out.
        temperature: Divides both logits in that term, which is multiplied by its square.
        mask_target: Leave the target class out of it, as the paper does.
    """
    reads_labels = True
    paper = 'Yang et al., ICCV 2023, https://arxiv.org/abs/2303.13005'
    weight_source = "the authors' code"

    def __init__(self, gamma: Weight = 1.5, temperature: Temperature = 1., mask_target: bool = True):
        super().__init__()
        self.gamma, self.temperature, self.mask_target = float(gamma), float(temperature), mask_target

    def sample_losses(
            self,
            student_logits: torch.Tensor,
            teacher_logits: torch.Tensor,
            target: torch.Tensor,
    ) -> Dict[str, torch.Tensor]:
        classes = target_classes(target)
        losses = {'nkd_target_loss': target_cross_entropies(student_logits, teacher_logits, classes)}
        if self.gamma:
            logits = [to_full_precision(x) for x in (student_logits, teacher_logits)]
            if self.mask_target:
                logits = [other_logits(x, classes) for x in logits]
            losses['nkd_others_loss'] = self.gamma * soft_cross_entropies(logits[0], logits[1], self.temperature)
        return losses
