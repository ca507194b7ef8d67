"""Decoupled knowledge distillation.

Decoupled Knowledge Distillation (Zhao et al., CVPR 2022), https://arxiv.org/abs/2203.08679.

Hinton's divergence splits into a part on the target class against all others (TCKD) and a part on the distribution over
the others (NCKD), each with a weight of its own. The defaults are the official code's for CIFAR-100 (beta is 2, 6 or 8
by pair there); its ImageNet runs have alpha 1, beta 0.5 and temperature 1. On CIFAR-100 it multiplies both parts by a
linear warm-up over 20 epochs: `--kd-schedule dkd=warmup:20`.

All probabilities stay logarithms, so that a confident student has a finite loss and gradient. A soft label counts as
the mixture of its two largest classes, which is exact for mixup and cutmix with or without label smoothing.
"""
from typing import Dict, Tuple

import torch
import torch.nn.functional as F

from ..losses import other_logits, to_full_precision
from ._base import Temperature, Weight, check_weights, register_method
from ._logits import LogitMethod


def decoupled_divergences(
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        classes: torch.Tensor,
        temperature: float = 4.,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return TCKD and NCKD of every sample, both times temperature squared.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K], treated as constant.
        classes: Target class of each sample, [B].
        temperature: Divides both logits.

    Returns:
        Two tensors [B]. With two classes the second is 0.
    """
    student = _split_target(to_full_precision(student_logits) / temperature, classes)
    teacher = _split_target(to_full_precision(teacher_logits.detach()) / temperature, classes)
    target_part, other_part = (
        F.kl_div(s, t, reduction='none', log_target=True).sum(dim=1) * temperature ** 2
        for s, t in zip(student, teacher)
    )
    return target_part, other_part


def _split_target(logits: torch.Tensor, classes: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities of target against the rest, [B, 2], and of the other classes alone, [B, K - 1]."""
    others = other_logits(logits, classes)
    target = logits.gather(1, classes[:, None])
    two_way = torch.cat([target, others.logsumexp(dim=1, keepdim=True)], dim=1)
    return F.log_softmax(two_way, dim=1), F.log_softmax(others, dim=1)


def label_mixture(target: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return classes and weights of the labels, [C, B] each: one class of hard labels, the two largest of soft ones.

    What all classes share (label smoothing) counts for none of them; the weights of a sample sum to 1, or are 0 where
    all its classes are alike.
    """
    if target.ndim == 1:
        return target[None], torch.ones_like(target[None], dtype=torch.float32)
    weights, classes = (target - target.amin(dim=1, keepdim=True)).float().topk(2, dim=1)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return classes.t(), weights.t()


def dkd_losses(
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        target: torch.Tensor,
        alpha: float = 1.,
        beta: float = 8.,
        temperature: float = 4.,
) -> torch.Tensor:
    """Weighted sum of TCKD and NCKD of every sample.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K], treated as constant.
        target: Class indices [B] or soft targets [B, K].
        alpha: Weight of TCKD.
        beta: Weight of NCKD.
        temperature: Divides both logits.

    Returns:
        [B].
    """
    losses = []
    for classes, weights in zip(*label_mixture(target)):
        parts = zip((alpha, beta), decoupled_divergences(student_logits, teacher_logits, classes, temperature))
        losses.append(weights * sum(factor * part for factor, part in parts if factor))
    return torch.stack(losses).sum(0)


@register_method('dkd')
class DKD(LogitMethod):
    """Decoupled distillation of the logits: target class and other classes with weights of their own.

    Args:
        alpha: Weight of the part on the target class; 0 leaves it out.
        beta: Weight of the part on the other classes; 0 leaves it out.
        temperature: Divides both logits; the loss is multiplied by its square.

    Raises:
        UsageError: If both weights are 0.
    """
    reads_labels = True
    paper = 'Zhao et al., CVPR 2022, https://arxiv.org/abs/2203.08679'
    weight_source = "the authors' code"

    def __init__(self, alpha: Weight = 1., beta: Weight = 8., temperature: Temperature = 4.):
        super().__init__()
        check_weights('dkd', alpha=alpha, beta=beta)
        self.alpha, self.beta, self.temperature = float(alpha), float(beta), float(temperature)

    def sample_losses(
            self,
            student_logits: torch.Tensor,
            teacher_logits: torch.Tensor,
            target: torch.Tensor,
    ) -> Dict[str, torch.Tensor]:
        losses = dkd_losses(student_logits, teacher_logits, target, self.alpha, self.beta, self.temperature)
        return {'dkd_loss': losses}
