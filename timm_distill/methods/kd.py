"""Hinton's knowledge distillation.

Distilling the Knowledge in a Neural Network (Hinton et al., 2015), https://arxiv.org/abs/1503.02531.

`hard=False` is the paper's soft target: the divergence between softened distributions. `hard=True` is the hard-label
distillation of DeiT (Touvron et al., ICML 2021, https://arxiv.org/abs/2012.12877): cross-entropy with the teacher's
decision. Teacher and student see the same, possibly mixed, images, so mixup and cutmix are safe.
"""
from typing import Dict

import torch
import torch.nn.functional as F

from ..losses import kl_divergences, to_full_precision
from ._base import Temperature, register_method
from ._logits import LogitMethod


def hard_label_losses(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the student, [B, K], with the teacher's most likely class, for each sample: [B]."""
    return F.cross_entropy(to_full_precision(student_logits), teacher_logits.argmax(dim=-1), reduction='none')


@register_method('kd')
class KD(LogitMethod):
    """Soft-label (or hard-label) distillation of the logits.

    Args:
        temperature: Divides both logits; the loss is multiplied by its square.
        hard: Match the teacher's decision instead of its distribution; the temperature is not used.
    """
    paper = 'Hinton et al., 2015, https://arxiv.org/abs/1503.02531'
    reads_softmax = True
    weight_source = "timm's LogitDistillationTask"

    def __init__(self, temperature: Temperature = 4., hard: bool = False):
        super().__init__()
        self.temperature = float(temperature)
        self.hard = hard

    def sample_losses(
            self,
            student_logits: torch.Tensor,
            teacher_logits: torch.Tensor,
            target: torch.Tensor,
    ) -> Dict[str, torch.Tensor]:
        if self.hard:
            return {'kd_loss': hard_label_losses(student_logits, teacher_logits)}
        return {'kd_loss': kl_divergences(student_logits, teacher_logits, self.temperature)}
