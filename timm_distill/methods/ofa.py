"""Distillation between different kinds of architectures in the space of logits.

One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation (Hao et al., NeurIPS 2023),
https://arxiv.org/abs/2310.19444.

Every stage of the student is projected to logits of its own, and each of these, like the final ones, is compared with
the teacher's final logits by a loss that enhances the target class. The official code has two kinds of projectors,
separable convolutions for convolutional students and transformer blocks for others; here every stage is a map, so that
the former serve all. All three official weights (label, final logits, stages) are 1, and the stage losses are summed.
"""
from typing import Annotated, Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import UsageError
from ..features.spec import Features, PairSpec, Stage
from ..losses import among_classes, to_full_precision
from ..utils.ranges import Range
from ._base import Count, DistillMethod, Temperature, register_method
from ._layers import BatchNorm2d

EXPONENTS = Range(0, 100, without_low=True)


class StageExponents:
    """None, a number, or a list of one for each stage."""

    def __contains__(self, value: Any) -> bool:
        return value is None or all(v in EXPONENTS for v in (value if isinstance(value, (tuple, list)) else [value]))

    def __str__(self) -> str:
        return f'None or {EXPONENTS}, for all stages or a list of one for each'


def ofa_loss(
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        target: torch.Tensor,
        eps: float = 1.,
        temperature: float = 1.,
        known: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Cross-entropy with the teacher's distribution, its target class enhanced.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K], treated as constant.
        target: Class indices [B], or soft targets [B, K] of which the largest counts.
        eps: Exponent, gamma in the paper: the weight of a class is p^eps, of the target (1 + p)^eps - 1.
        temperature: Divides both logits.
        known: The classes that the logits are of, [K], where the labels have others too: of these none is enhanced.

    Returns:
        Scalar.
    """
    log_student = F.log_softmax(to_full_precision(student_logits) / temperature, dim=1)
    teacher = F.softmax(to_full_precision(teacher_logits.detach()) / temperature, dim=1)
    target = target if target.ndim == 1 else target.argmax(1)
    target, share = (target, torch.ones_like(teacher[:, 0])) if known is None else among_classes(target, known)
    mask = torch.zeros_like(teacher).scatter_(1, target[:, None], share[:, None].to(teacher.dtype))
    weight = (teacher + mask) ** eps - mask
    return -(weight * log_student).sum(1).mean()


def separable_conv(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Return two depthwise separable convolutions, the first with the stride."""
    layers: List[nn.Module] = []
    for own, other, step in ((in_channels, in_channels, stride), (in_channels, out_channels, 1)):
        layers += [
            nn.Conv2d(own, own, 3, step, 1, groups=own, bias=False), nn.Conv2d(own, other, 1, bias=False),
            BatchNorm2d(other), nn.ReLU()]
    return nn.Sequential(*layers)


def create_projector(stages: Sequence[Stage], width: int, num_classes: int) -> nn.Sequential:
    """Return a projector from a stage to logits.

    Args:
        stages: The stage and all deeper ones of the student: each of these adds a separable convolution to its
            channels, with stride 2 where its grid is smaller.
        width: Channels before the pooling.
        num_classes: K.
    """
    if len(stages) == 1:
        body: List[nn.Module] = [nn.Conv2d(stages[0].shape[0], width, 1)]
    else:
        channels = [stage.shape[0] for stage in stages[:-1]] + [width]
        strides = [2 if b.shape[1] < a.shape[1] else 1 for a, b in zip(stages, stages[1:])]
        body = [separable_conv(*step) for step in zip(channels, channels[1:], strides)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


@register_method('ofa')
class OFA(DistillMethod):
    """Matching of logits, of the student's head and of a projector on every stage.

    Args:
        eps: Exponent of the loss on the final logits; 1 to 1.5 in the paper.
        stage_eps: That of the stages: a number or a list of one for each, shallow to deep; as `eps` by default.
        temperature: Divides all logits.
        stages: How many of the student's stages get a projector, the deepest.
    """
    paper = 'Hao et al., NeurIPS 2023, https://arxiv.org/abs/2310.19444'
    reads_softmax = True
    weight_source = "the authors' code"
    student_outputs = frozenset({'logits', 'stages'})
    teacher_outputs = frozenset({'logits'})
    reads_labels = True

    def __init__(
            self,
            eps: Annotated[float, EXPONENTS] = 1.,
            stage_eps: Annotated[Any, StageExponents()] = None,
            temperature: Temperature = 1.,
            stages: Count = 4,
    ):
        super().__init__()
        self.eps = float(eps)
        self.stage_eps = stage_eps
        self.temperature = float(temperature)
        self.stages = stages

    def build(self, pair: PairSpec) -> None:
        stages = pair.student.stages[-self.stages:]
        width = max(pair.student.feature[0], pair.teacher.feature[0])
        self.projectors = nn.ModuleList(
            create_projector(stages[i:], width, pair.student.num_classes) for i in range(len(stages)))
        self.stage_exponents = self._resolve_stage_eps(len(stages))

    def _resolve_stage_eps(self, count: int) -> Tuple[float, ...]:
        given = self.eps if self.stage_eps is None else self.stage_eps
        values = tuple(given) if isinstance(given, (tuple, list)) else (given,) * count
        if len(values) != count:
            raise UsageError(
                f'ofa.stage_eps={self.stage_eps!r} has {len(values)} values for {count} stages: give one '
                'number, or one for each.')
        return tuple(map(float, values))

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        assert student.logits is not None and teacher.logits is not None
        losses = []
        stages = student.stages[-len(self.projectors):]
        for projector, stage, eps in zip(self.projectors, stages, self.stage_exponents):
            logits = student.transform_logits(projector(stage))
            losses.append(ofa_loss(logits, teacher.logits, target, eps, self.temperature, teacher.classes))
        final = ofa_loss(student.logits, teacher.logits, target, self.eps, self.temperature, teacher.classes)
        return {'ofa_logits_loss': final, 'ofa_stages_loss': torch.stack(losses).sum()}
