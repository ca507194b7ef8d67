"""Binary distillation: every class a yes-or-no question.

Revisit the Power of Vanilla Knowledge Distillation: from Small Scale to Large Scale (Hao et al., NeurIPS 2023),
https://arxiv.org/abs/2305.15781, with students that train on binary cross-entropy (`--bce-loss`), as ResNet strikes
back (Wightman et al., 2021) does.

`target='softmax'` is that published form: the teacher's softmax gives each class's probability. `target='sigmoid'` asks
the teacher each question too; it is for teachers whose own training was binary (timm's `a1` to `a3` weights), as the
logits of a softmax teacher have no scale of their own. Both are means over samples and classes, as timm's binary
cross-entropy is; `reduction='sum'` sums over classes (`--bce-sum`).
"""
from typing import Annotated, Dict

import torch
import torch.nn.functional as F

from ..losses import to_full_precision
from ..utils.ranges import OneOf
from ._base import Temperature, register_method
from ._logits import LogitMethod


def binary_kd_losses(
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        target: str = 'softmax',
        temperature: float = 1.,
        reduction: str = 'mean',
) -> torch.Tensor:
    """Binary cross-entropy of the student's sigmoids with the teacher's probabilities, times temperature squared.

    Each sample has its own.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K], treated as constant.
        target: 'softmax' or 'sigmoid', what turns the teacher's logits into probabilities.
        temperature: Divides both logits.
        reduction: 'mean' or 'sum' over classes.

    Returns:
        [B].
    """
    student = to_full_precision(student_logits) / temperature
    teacher = to_full_precision(teacher_logits.detach()) / temperature
    probabilities = teacher.softmax(dim=1) if target == 'softmax' else teacher.sigmoid()
    losses = F.binary_cross_entropy_with_logits(student, probabilities, reduction='none') * temperature ** 2
    return losses.sum(dim=1) if reduction == 'sum' else losses.mean(dim=1)


@register_method('bce_kd')
class BinaryKD(LogitMethod):
    """Binary cross-entropy of each class with the teacher's probability, for students that train on --bce-loss.

    Args:
        target: What turns the teacher's logits into probabilities, 'softmax' or 'sigmoid' (teachers that were trained
            on binary cross-entropy themselves).
        temperature: Divides both logits; the loss is multiplied by its square.
        reduction: 'mean' over samples and classes, or 'sum' over classes and mean over samples.
    """
    paper = 'Hao et al., NeurIPS 2023, https://arxiv.org/abs/2305.15781'
    weight_source = "the authors' code"

    def __init__(
            self,
            target: Annotated[str, OneOf('softmax', 'sigmoid')] = 'softmax',
            temperature: Temperature = 1.,
            reduction: Annotated[str, OneOf('mean', 'sum')] = 'mean',
    ):
        super().__init__()
        self.target, self.temperature, self.reduction = target, float(temperature), reduction

    def sample_losses(
            self,
            student_logits: torch.Tensor,
            teacher_logits: torch.Tensor,
            target: torch.Tensor,
    ) -> Dict[str, torch.Tensor]:
        losses = binary_kd_losses(student_logits, teacher_logits, self.target, self.temperature, self.reduction)
        return {'bce_kd_loss': losses}
