"""Wasserstein distance between the distributions over the other classes.

Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation (Lv et al., NeurIPS 2024),
https://arxiv.org/abs/2412.08139.

On the target class a cross-entropy weighted by the teacher's probability; on the others a transport between both
softened distributions, whose cost is what two classes differ by: 1 minus the cosine of their rows in the teacher's
classifier, sharpened to 1 - exp(-sharpen * cost). A few Sinkhorn iterations end with the student's marginal. The
defaults are the published ones for ResNet-34 to ResNet-18 on ImageNet (weight 30 of the distance, temperature 2),
where the cost came from the CKA of the classes' features; ResNet-50 to MobileNetV1 has `wkd_l.sharpen=2` and
`wkd_l.distance_weight=25`. The weight of the distance falls over the run on half a cosine there:
`--kd-schedule wkd_l=decay:0`, which leaves the term on the target class alone, as the official code does.

All classes share one kernel, since a class that has no mass moves none: what the official code computes with a matrix
for every sample needs B x K numbers here, not B x K x K.
"""
from typing import Annotated, Dict, FrozenSet, Optional, Tuple

import torch
import torch.nn.functional as F

from ..errors import UsageError
from ..losses import target_classes, target_cross_entropies
from ..utils.precision import in_full_precision
from ..utils.ranges import Range
from ._base import Temperature, Weight, register_method
from ._logits import LogitMethod

EPS = 1e-8  # of the cost and of the iterations' divisions


@in_full_precision
def classifier_cost(weight: torch.Tensor, sharpen: float = 1.) -> torch.Tensor:
    """Cost of moving mass between classes: 1 minus the cosine of their rows, sharpened where `sharpen` is not 0.

    Args:
        weight: Weight of a classifier, [K, D].
        sharpen: Factor in the exponent.

    Returns:
        [K, K].
    """
    rows = F.normalize(weight.detach(), dim=1)
    cost = 1 - rows @ rows.mT
    return 1 - torch.exp(-sharpen * cost) if sharpen else cost


@in_full_precision
def transport(
        student: torch.Tensor,
        teacher: torch.Tensor,
        cost: torch.Tensor,
        classes: torch.Tensor,
        regularization: float = 0.05,
        iterations: int = 10,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run Sinkhorn's iterations between distributions over classes.

    Args:
        student: [B, K], with gradients.
        teacher: [B, K].
        cost: [K, K].
        classes: One class of each sample that takes no part, [B]: both distributions are 0 there.
        regularization: Weight of the entropy.
        iterations: Updates of both scalings.

    Returns:
        Distance of each sample, [B], and the scalings of the kernel exp(-cost / regularization) that give the plan, of
        the student's classes and of the teacher's, [B, K] each.
    """
    cost = F.relu(cost) + EPS
    kernel = torch.exp(-cost / regularization)
    u = torch.full_like(teacher, 1 / (teacher.shape[1] - 1)).scatter(1, classes[:, None], 0.)
    v = torch.zeros_like(u)
    for _ in range(iterations):
        v = teacher / (u @ kernel + EPS)
        u = student / (v @ kernel.mT + EPS)
    return ((u @ (kernel * cost)) * v).sum(dim=1), u, v


@in_full_precision
def others_distribution(logits: torch.Tensor, classes: torch.Tensor, temperature: float) -> torch.Tensor:
    """Softened distribution over all classes but one of each sample, which gets 0: [B, K] and [B] -> [B, K]."""
    return F.softmax((logits / temperature).scatter(1, classes[:, None], -torch.inf), dim=1)


@register_method('wkd_l')
class WKDLogits(LogitMethod):
    """Wasserstein distance of the softened logits, with a cost between classes from the teacher's classifier.

    Args:
        distance_weight: Weight of the distance beside the term on the target class; schedules act on it alone.
        temperature: Divides both logits in the distance.
        regularization: Weight of the plan's entropy.
        iterations: Sinkhorn iterations.
        sharpen: Of the cost, 1 - exp(-sharpen * cost); 0 takes it as it is.
    """
    paper = 'Lv et al., NeurIPS 2024, https://arxiv.org/abs/2412.08139'
    weight_source = "the authors' code, whose 30 is wkd_l.distance_weight"
    reads_labels = True
    needs_classifier = True
    cost: torch.Tensor

    def __init__(
            self,
            distance_weight: Weight = 30.,
            temperature: Temperature = 2.,
            regularization: Annotated[float, Range(0.01, 1000)] = 0.05,
            iterations: Annotated[int, Range(1, 1000, whole=True)] = 10,
            sharpen: Annotated[float, Range(0, 1000)] = 1.,
    ):
        super().__init__()
        self.distance_weight, self.temperature = float(distance_weight), float(temperature)
        self.regularization, self.iterations = float(regularization), iterations
        self.sharpen = float(sharpen)

    def set_classifier(self, weight: Optional[torch.Tensor]) -> None:
        if weight is None or len(weight) < 2:
            raise UsageError(
                "--kd wkd_l takes the cost between classes from the teacher's classifier, but this teacher has not one "
                'linear layer with a row for each of two classes or more. Use --kd wkd_f or nkd, or another --teacher.')
        self.register_buffer('cost', classifier_cost(weight, self.sharpen), persistent=False)

    def unscheduled_terms(self) -> FrozenSet[str]:
        return frozenset({'wkd_l_target_loss'})

    def sample_losses(
            self,
            student_logits: torch.Tensor,
            teacher_logits: torch.Tensor,
            target: torch.Tensor,
    ) -> Dict[str, torch.Tensor]:
        classes = target_classes(target)
        losses = {'wkd_l_target_loss': target_cross_entropies(student_logits, teacher_logits, classes)}
        if self.distance_weight:
            distributions = [
                others_distribution(logits, classes, self.temperature)
                for logits in (student_logits, teacher_logits.detach())]
            distances, *_ = transport(
                distributions[0], distributions[1], self.cost, classes, self.regularization, self.iterations)
            losses['wkd_l_loss'] = self.distance_weight * distances
        return losses
