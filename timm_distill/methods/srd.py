"""Simple recipe distillation: a linear projector, batch norms and the logarithm of a sum of fourth powers.

Understanding the Role of the Projector in Knowledge Distillation (Miles and Mikolajczyk, AAAI 2024),
https://arxiv.org/abs/2303.11098.

The spatial means of both models' last features meet behind batch norms without scale and shift, the student's behind a
linear projector. `match='difference'` is the published ImageNet code, whose logarithm is of the sum over batch and
channels of |a - b|^4: its gradient does not depend on the scale of the difference, its value depends on the batch size.
`match='correlation'` is that of the code for DeiT: the fourth powers of 1 minus each channel's correlation. Both
batch norms take the statistics of the batch in training; of a single sample, which has none, the running ones.

The sum of powers is taken in units of the largest difference, so that it neither overflows nor vanishes. Differences
far below `FLOOR`, of features that are already equal, lose their gradient instead of having an endless one.
"""
from typing import Annotated, Dict, Optional

import torch
import torch.nn as nn

from ..features.spec import Features, PairSpec, Pooling
from ..losses import kl_divergence, to_full_precision
from ..utils.precision import in_full_precision
from ..utils.ranges import OneOf, Range
from ._base import DistillMethod, Temperature, Weight, check_weights, register_method
from ._layers import BatchNorm2d

FLOOR = 1e-3  # root mean power of the difference that is added inside of the logarithm
CORRELATION_EPS = 1e-5  # added inside of the logarithm by the official code


@in_full_precision
def log_power_sum(difference: torch.Tensor, exponent: float = 4.) -> torch.Tensor:
    """Logarithm of the sum of |difference|^exponent over all entries.

    Args:
        difference: [B, C].
        exponent: Power.

    Returns:
        Scalar; at least that of differences of `FLOOR`, which is 1e-12 of the sum at differences of 1.
    """
    size = difference.abs()
    scale = size.detach().amax().clamp_min(FLOOR)
    total = (size / scale).pow(exponent).sum() + size.numel() * (FLOOR / scale) ** exponent
    return total.log() + exponent * scale.log()


@in_full_precision
def log_correlation_loss(student: torch.Tensor, teacher: torch.Tensor, exponent: float = 4.) -> torch.Tensor:
    """Logarithm of the sum over channels of |1 - correlation|^exponent, for standardised [B, C] each; a scalar."""
    correlation = (student * teacher.detach()).mean(dim=0)
    return ((correlation - 1).abs().pow(exponent).sum() + CORRELATION_EPS).log()


def _create_norm(channels: int, eps: float) -> BatchNorm2d:
    return BatchNorm2d(channels, eps=eps, affine=False)


def _standardize(norm: BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    assert norm.running_mean is not None
    return to_full_precision(norm(x.to(norm.running_mean.dtype))).flatten(1)


@register_method('srd')
class SRD(DistillMethod):
    """Standardised pooled features behind a linear projector, and the logits.

    Args:
        match: 'difference' (ImageNet) or 'correlation' of the features (DeiT).
        exponent: Power of the differences.
        rep_weight: Weight of the features' term; 0 leaves it out. The authors' DeiT code has 1.
        logit_weight: Weight of the logits' divergence; 0 leaves it out.
        temperature: Divides both logits; the divergence is multiplied by its square.
        eps: Of the batch norms.

    Raises:
        UsageError: If both weights are 0.
    """
    paper = 'Miles and Mikolajczyk, AAAI 2024, https://arxiv.org/abs/2303.11098'
    weight_source = "the authors' code for ImageNet, whose 2 is srd.rep_weight"
    student_outputs = frozenset({'logits', 'feature'})
    teacher_outputs = frozenset({'logits', 'feature'})

    def __init__(
            self,
            match: Annotated[str, OneOf('difference', 'correlation')] = 'difference',
            exponent: Annotated[float, Range(1, 16)] = 4.,
            rep_weight: Weight = 2.,
            logit_weight: Weight = 1.,
            temperature: Temperature = 1.,
            eps: Annotated[float, Range(0, 1, without_low=True)] = 1e-4,
    ):
        super().__init__()
        check_weights('srd', rep_weight=rep_weight, logit_weight=logit_weight)
        self.match, self.exponent, self.temperature = match, float(exponent), float(temperature)
        self.rep_weight, self.logit_weight, self.eps = float(rep_weight), float(logit_weight), float(eps)

    def build(self, pair: PairSpec) -> None:
        if self.rep_weight:
            channels = pair.teacher.feature[0]
            self.projector = nn.Linear(pair.student.feature[0], channels)
            self.student_norm, self.teacher_norm = (_create_norm(channels, self.eps) for _ in range(2))

    def teacher_pooling(self) -> Optional[Pooling]:
        return Pooling((1, 1))

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        assert student.feature is not None and teacher.feature is not None
        assert student.logits is not None and teacher.logits is not None
        terms = {}
        if self.rep_weight:
            terms['srd_loss'] = self.rep_weight * self.compare(student.feature, teacher.feature.detach())
        if self.logit_weight:
            divergence = kl_divergence(student.logits, teacher.logits, self.temperature)
            terms['srd_logit_loss'] = self.logit_weight * divergence
        return terms

    def compare(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Return the term of two feature maps, [B, Cs, H, W] and [B, Ct, H', W'], unweighted."""
        pooled = [to_full_precision(x).mean((2, 3), keepdim=True) for x in (student, teacher)]
        projected = self.projector(pooled[0].flatten(1).to(self.projector.weight.dtype))
        a = _standardize(self.student_norm, projected[:, :, None, None])
        b = _standardize(self.teacher_norm, pooled[1])
        if self.match == 'correlation':
            return log_correlation_loss(a, b, self.exponent)
        return log_power_sum(a - b, self.exponent)
