"""Scale-decoupled distillation: a logit method on regions of the image.

Scale Decoupled Distillation (Luo, CVPR 2024), https://arxiv.org/abs/2403.13512.

The last map is averaged to a 4 x 4 grid, and that to 2 x 2 and to one region; each of the 21 regions goes through the
model's own classifier, the student's with gradients, and the logit method that follows the colon compares the logits of
student and teacher in every region. Regions in which the teacher is right about the label although it is wrong about
the whole image, or the other way round, are complementary and count double. Published are `sdd:kd`, `sdd:dkd` and
`sdd:nkd`, the latter with `sdd.nkd.mask_target=False`; of a soft label the largest class counts.

Where the side of a map is no multiple of 4, cells of the 4 x 4 grid overlap, as in the official code, and the region of
the whole is not quite what the model averages.
"""
import logging
from typing import Annotated, Any, Dict, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F

from ..errors import UsageError
from ..features.spec import Features, FeatureSpec, PairSpec, Pooling
from ..losses import among_classes, target_classes, to_full_precision
from ._base import Weight, register_method
from ._logits import LogitMethod
from ._wrapper import WrapperMethod

_logger = logging.getLogger(__name__)

FINEST = 4  # grid that all regions are made of


class _Scales:
    """Grids of regions, coarse to fine: from the whole to at most 4 x 4, as a sequence or as text ('1,2,4')."""

    def __contains__(self, value: Any) -> bool:
        try:
            return parse_scales(value) in ((1, 2), (1, 2, 4))
        except (TypeError, ValueError):
            return False

    def __str__(self) -> str:
        return '1,2 or 1,2,4'


def parse_scales(value: Union[str, Sequence[int]]) -> Tuple[int, ...]:
    """Return grids of regions as numbers.

    Raises:
        TypeError, ValueError: If they are none.
    """
    return tuple(int(item) for item in (value.split(',') if isinstance(value, str) else value))


def region_means(feature: torch.Tensor, scales: Sequence[int] = (1, 2, 4)) -> torch.Tensor:
    """Return the mean of each region: the whole, then finer grids row by row.

    Args:
        feature: [B, C, H, W].
        scales: Grids, 1 for the whole.

    Returns:
        [N, B, C] in the feature's precision, N the sum of the squared scales.
    """
    finest = F.adaptive_avg_pool2d(to_full_precision(feature), FINEST)
    pooled = [F.adaptive_avg_pool2d(finest, scale).flatten(2) for scale in scales]
    return torch.cat(pooled, dim=2).permute(2, 0, 1).to(feature.dtype)


def region_weights(teacher_logits: torch.Tensor, classes: torch.Tensor, complementary: float = 2.) -> torch.Tensor:
    """Return the weight of each region.

    Args:
        teacher_logits: Logits of the regions, [N, B, K], the whole first.
        classes: Target class of each sample, [B].
        complementary: Weight of regions that differ from the whole in being right; that of the others is 1.

    Returns:
        [N, B].
    """
    right = teacher_logits.argmax(dim=2) == classes
    weights = torch.ones(right.shape, device=right.device)
    return weights.masked_fill(right != right[:1], complementary)


@register_method('sdd')
class SDD(WrapperMethod):
    """A logit method on regions of the last map, each through the models' own classifiers.

    Args:
        inner: A method that compares the logits of each sample.
        scales: Grids of regions: 1,2,4 for 21 of them, 1,2 for 5.
        complementary_weight: Weight of regions that the teacher knows better, or worse, than the whole image.
    """
    paper = 'Luo, CVPR 2024, https://arxiv.org/abs/2403.13512'
    weight_source = "the inner method's"
    reads_labels = True
    inner_type = LogitMethod
    inner: LogitMethod
    student_outputs = frozenset({'logits', 'feature', 'head'})
    teacher_outputs = frozenset({'logits', 'feature', 'head'})

    def __init__(
            self,
            inner: LogitMethod,
            scales: Annotated[Union[str, Sequence[int]], _Scales()] = '1,2,4',
            complementary_weight: Weight = 2.,
    ):
        super().__init__(inner)
        self.scales, self.complementary_weight = parse_scales(scales), float(complementary_weight)

    @classmethod
    def needs_equal_classes(cls) -> bool:
        return True

    def build(self, pair: PairSpec) -> None:
        super().build(pair)
        models = {'student': pair.student, 'teacher': pair.teacher}
        for name, spec in models.items():
            self._check(name, spec)
        uneven = [name for name, spec in models.items() if not spec.head_averages]
        if uneven:
            _logger.warning(
                f'--kd sdd: the head of the {" and of the ".join(uneven)} is not linear (a norm or another layer '
                'stands behind its pooling), so that the logits of the regions do not average to those of the image '
                'as in the paper; each region is read as if it were an image.')

    def _check(self, name: str, spec: FeatureSpec) -> None:
        if spec.head != 'feature':
            raise UsageError(
                f'--kd sdd: the head of the {name} cannot be run on a region of its last feature map alone (it reads a '
                'class token or several features, or its batch norms keep statistics of what they see). Use the inner '
                f'method by itself, or another --{name}.')
        height, width = spec.feature[1:]
        if min(height, width) < max(self.scales):
            raise UsageError(
                f'sdd.scales={",".join(map(str, self.scales))}: the last map of the {name} is {height}x{width} and has '
                f'no {max(self.scales)}x{max(self.scales)} regions. Use a larger --img-size'
                + (', or --kd-kwargs sdd.scales=1,2.' if max(self.scales) > 2 and min(height, width) > 1 else '.'))

    def teacher_pooling(self) -> Optional[Pooling]:
        return Pooling((FINEST, FINEST))

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        own, other = self.region_logits(student), self.region_logits(teacher).detach()  # [N, B, K]
        share = None
        if teacher.classes is not None:
            target, share = among_classes(target, teacher.classes)
        weights = region_weights(other, target_classes(target), self.complementary_weight)
        if share is not None:  # no region of an image of an unknown class is right
            weights = torch.where(share > 0, weights, 1.) * (share if self.inner.reads_labels else 1.)
        targets = target.repeat(len(own), *[1] * (target.ndim - 1))
        losses = self.inner.sample_losses(own.flatten(0, 1), other.flatten(0, 1), targets)
        weights = weights.flatten()
        return self.rename({name: (weights * loss).mean() for name, loss in losses.items()})

    def region_logits(self, features: Features) -> torch.Tensor:
        """Return the logits of each region through the model's own head, [N, B, K]."""
        assert features.feature is not None and features.head is not None
        regions = region_means(features.feature, self.scales)
        return features.head(regions.flatten(0, 1)[:, :, None, None]).unflatten(0, regions.shape[:2])
