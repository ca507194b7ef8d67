"""ND: norm and direction of the feature.

Improving Knowledge Distillation via Regularizing Feature Norm and Direction (Wang et al., 2023),
https://arxiv.org/abs/2305.17007.

The student's pre-logits are drawn towards the direction of the teacher's class mean and towards a norm not below the
teacher's: with e the unit vector of the class mean, 1 - <s, e> / max(|s|, |t|). Where the student is the longer one
this is the cosine distance to the class mean; where it is the shorter one, a longer projection lowers it. Where the
widths differ an embedding head (batch norm, dropout, linear layer) brings the student's pre-logits to the teacher's.

The class means come from a pass of the teacher over the training set. Soft labels mix them. (The authors' DeiT script
spreads label smoothing over the other samples of the batch; here it mixes in the means of all classes.)

The loss complements others: `kd++`, `dkd++`, `dist++`, `reviewkd++` and `deit++` are the paper's combinations.
"""
from typing import Annotated, Dict

import torch
import torch.nn as nn

from ..errors import UsageError
from ..features.spec import Features, PairSpec
from ..losses import l2_normalize, to_full_precision
from ..utils.ranges import Range
from ._base import DistillMethod, register_method
from ._layers import BatchNorm2d

EPS = 1e-12  # below it a vector has no direction


def nd_loss(student: torch.Tensor, teacher: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """Norm-and-direction loss, mean over samples.

    Args:
        student: Embeddings, [B, D].
        teacher: Embeddings, [B, D], treated as constant.
        centers: The teacher's class mean of each sample, [B, D]; only its direction counts.

    Returns:
        Scalar.
    """
    student, teacher = to_full_precision(student), to_full_precision(teacher.detach())
    direction = l2_normalize(to_full_precision(centers.detach()), dim=1, eps=EPS)
    largest = torch.maximum(student.norm(dim=1), teacher.norm(dim=1))
    largest = largest.masked_fill(largest <= EPS, 1.)
    return (1 - (student * direction).sum(dim=1) / largest).mean()


def class_centers(class_means: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the class mean of each sample, [B, D]; mixed by the weights of its classes where these are soft.

    Args:
        class_means: [K, D].
        target: Class indices [B] or soft targets [B, K].
    """
    return class_means[target] if target.ndim == 1 else target.to(class_means.dtype) @ class_means


class EmbeddingHead(nn.Module):
    """Batch norm, dropout and a linear layer from the student's width to the teacher's.

    Args:
        in_features: Width of the student's pre-logits.
        out_features: Width of the teacher's.
        dropout: Probability of dropping an input of the linear layer.
    """

    def __init__(self, in_features: int, out_features: int, dropout: float = 0.5):
        super().__init__()
        self.bn = BatchNorm2d(in_features)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(in_features, out_features)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.normal_(self.linear.bias, std=0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, in_features] to [B, out_features]."""
        return self.linear(self.dropout(self.bn(x[:, :, None, None]).flatten(1)))


@register_method('nd')
class ND(DistillMethod):
    """Norm and direction of the pre-logits, towards the teacher's class means.

    Args:
        dropout: Of the embedding head, which there is where the widths of the pre-logits differ.
    """
    paper = 'Wang et al., 2023, https://arxiv.org/abs/2305.17007'
    weight_source = "the authors' code"
    student_outputs = frozenset({'pre_logits'})
    teacher_outputs = frozenset({'pre_logits'})
    needs_class_means = True
    reads_labels = True
    class_means: torch.Tensor

    def __init__(self, dropout: Annotated[float, Range(0, 1, without_high=True)] = 0.5):
        super().__init__()
        self.dropout = float(dropout)
        self._is_ready = False

    def build(self, pair: PairSpec) -> None:
        widths = pair.student.pre_logits, pair.teacher.pre_logits
        self.embed = EmbeddingHead(*widths, self.dropout) if widths[0] != widths[1] else nn.Identity()
        means = torch.full((pair.student.num_classes, pair.teacher.pre_logits), float('nan'))
        self.register_buffer('class_means', means, persistent=False)  # kept for resume, not averaged by the EMA

    def set_class_means(self, means: torch.Tensor) -> None:
        if means.shape != self.class_means.shape:
            raise UsageError(
                f'The class means have the shape {list(means.shape)}, --kd nd needs '
                f"{list(self.class_means.shape)}: the student's classes x the teacher's pre-logits.")
        if not torch.isfinite(means).all():
            raise UsageError('The class means hold values that are not finite: compute them again.')
        self.class_means.copy_(means)

    def check_ready(self) -> None:
        # a checkpoint fills the buffer too, so it is asked itself; not again once filled, as that waits for the device
        if not self._is_ready and torch.isnan(self.class_means).any():
            raise UsageError(
                "--kd nd needs the teacher's class means: train_distill.py computes them; in Python give "
                'create_distill_task(..., class_means=compute_class_means(teacher, loader, num_classes)) '
                'or call task.set_class_means().')
        self._is_ready = True

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        assert student.pre_logits is not None and teacher.pre_logits is not None
        self.check_ready()
        embedding = self.embed(student.pre_logits)
        return {'nd_loss': nd_loss(embedding, teacher.pre_logits, class_centers(self.class_means, target))}
