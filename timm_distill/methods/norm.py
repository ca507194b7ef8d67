"""N-to-one representation matching.

NORM: Knowledge Distillation via N-to-One Representation Matching (Liu et al., ICLR 2023),
https://openreview.net/forum?id=CRNwGauQpb6.

The student's last feature is expanded by the adapter to N segments of the teacher's width; each segment is matched with
the teacher's last feature. Scale of the official code: the mean squared error against N copies of the teacher's
feature, times N, so that this term with weight w is the paper's with alpha = N * w.

`schedule='imagenet'` and `'cifar'` are the weights over 100 and 240 epochs of the official recipes.
`logit_scale=2.5` is the official logit standardisation (a layer norm of both models' logits, in the cross-entropy as
well as in KD). It is off by default because it trains logits whose scale the model's softmax never sees: the released
student's accuracy is kept but its confidence is not calibrated.
"""
from typing import Annotated, Any, Dict, Optional

import torch

from ..features.spec import Features, Pooling
from ..losses import standardize_logits
from ..utils.ranges import OneOf, Range
from ._base import DistillMethod, register_method
from ._schedules import ScheduleSpec, create_weight_schedule

SCHEDULES = {
    'imagenet': ((0, 0.1), (5, 0.5), (15, 0.9), (60, 0.5), (80, 0.1)),
    'cifar': ((0, 0.1), (10, 0.5), (20, 1.0), (180, 0.5), (210, 0.1)),
}


@register_method('norm')
class NORM(DistillMethod):
    """N-to-one matching of the last feature through a linear adapter that is merged away.

    Args:
        segments: N, how many segments of the expanded feature are matched with the teacher's.
        batch_norm: Batch norms in the adapter, as in the official code; else plain linear layers.
        residual: Residual connection around the adapter.
        pool: How the larger of two grids is pooled to the smaller, 'avg' or 'max' (the official code's).
        form: How the adapter computes: 'direct', 'moments' (as exact, without activations of N * Ct channels), or
            'auto' for the cheaper at the batch's size.
        schedule: Weight over epochs: 'const', 'imagenet', 'cifar' or a list of epoch:weight.
        init: How the adapter starts: 'identity' leaves the student's logits as they are, 'official' is the published
            code's random start, 'auto' the former where the adapter can be the identity and the latter where not.
        logit_scale: Standardise both models' logits times this (2.5 in the official recipe); 0 is off. Costs calibrated
            confidence.

    Raises:
        UsageError: If the schedule is none.
    """
    paper = 'Liu et al., ICLR 2023, https://openreview.net/forum?id=CRNwGauQpb6'
    weight_source = "the authors' code, where the term is a mean times N"
    student_outputs = frozenset()
    teacher_outputs = frozenset({'tap'})
    adapter = 'norm'
    shares_adapter = True
    schedules = SCHEDULES

    def __init__(
            self,
            segments: Annotated[int, Range(1, 1024, whole=True)] = 8,
            batch_norm: bool = True,
            residual: bool = True,
            pool: Annotated[str, OneOf('avg', 'max')] = 'avg',
            schedule: ScheduleSpec = 'const',
            form: Annotated[str, OneOf('auto', 'direct', 'moments')] = 'auto',
            logit_scale: Annotated[float, Range(0, 1000)] = 0.,
            init: Annotated[str, OneOf('auto', 'identity', 'official')] = 'auto',
    ):
        super().__init__()
        self.schedule = create_weight_schedule(schedule, SCHEDULES, option='norm.schedule')
        self.logit_scale = float(logit_scale)
        self._adapter_options = dict(
            segments=segments, batch_norm=batch_norm, residual=residual, pool=pool, form=form, init=init)

    @property
    def adapter_options(self) -> Dict[str, Any]:
        return self._adapter_options

    def weight(self, epoch: int) -> float:
        return self.schedule(epoch)

    def teacher_pooling(self) -> Optional[Pooling]:
        return Pooling(mode=str(self._adapter_options['pool']))

    def transform_logits(self, logits: torch.Tensor) -> torch.Tensor:
        return standardize_logits(logits, self.logit_scale) if self.logit_scale else logits

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        if not student.matched:
            raise ValueError('NORM needs a student with its adapter.')
        # one for each adapter; several are summed, as the official code does with several stages
        return {'norm_loss': torch.stack(student.matched).sum()}
