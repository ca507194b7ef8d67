"""Distillation through a token of its own.

Training data-efficient image transformers & distillation through attention (Touvron et al., ICML 2021),
https://arxiv.org/abs/2012.12877.

The student has a distillation token beside its class token, each with a classifier. The class token learns from the
labels, the distillation token from the teacher: from its decision (`hard=True`, the paper's choice) or its softened
distribution. DeiT gives both losses the weight 1/2: `--task-loss-weight 0.5 --kd-weight token=0.5`. In evaluation the
student's logits are the average of both classifiers, as timm computes them.
"""
from typing import Dict

import torch
import torch.nn.functional as F

from ..features.spec import Features
from ..losses import kl_divergence, to_full_precision
from ._base import DistillMethod, Temperature, register_method


@register_method('token')
class TokenDistillation(DistillMethod):
    """Hard-label (or soft-label) distillation of the distillation token's logits; needs a student with that token.

    Args:
        hard: Match the teacher's decision instead of its distribution; the temperature is not used.
        temperature: Divides both logits; the loss is multiplied by its square.
    """
    paper = 'Touvron et al., ICML 2021, https://arxiv.org/abs/2012.12877'
    reads_softmax = True
    weight_source = 'the paper, where label loss and term weigh 1/2 each'
    student_outputs = frozenset({'token_logits'})

    def __init__(self, hard: bool = True, temperature: Temperature = 1.):
        super().__init__()
        self.hard = hard
        self.temperature = float(temperature)

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        assert student.token_logits is not None and teacher.logits is not None
        if self.hard:
            logits = to_full_precision(student.token_logits)
            return {'token_loss': F.cross_entropy(logits, teacher.logits.argmax(dim=1))}
        return {'token_loss': kl_divergence(student.token_logits, teacher.logits, self.temperature)}
