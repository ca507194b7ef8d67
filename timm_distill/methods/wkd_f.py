"""Wasserstein distance between Gaussians of the last feature's cells.

Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation (Lv et al., NeurIPS 2024),
https://arxiv.org/abs/2412.08139.

The student's last feature, projected to the teacher's channels, and the teacher's are cut into cells as adaptive
pooling does; each channel of a cell is a Gaussian, and the distance of two has a term of the means and one of the
deviations. The defaults are the published ones for ResNet-34 to ResNet-18 on ImageNet (weight 0.02, cells of a 4 x 4
grid); ResNet-50 to MobileNetV1 has 0.005, and `--kd wkd_l+wkd_f` weights of its own. The published weight falls over
the run on half a cosine: `--kd-schedule wkd_f=decay:0`.

A cell of one position has no deviation: there the means alone are compared, where the official code has nan. The maps
need not have the same grid.
"""
import logging
from typing import Annotated, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..features.spec import Features, PairSpec
from ..losses import to_full_precision
from ..utils.ranges import OneOf, Range
from ._base import DistillMethod, Weight, Width, check_weights, register_method
from ._layers import BatchNorm2d, HintRegressor

_logger = logging.getLogger(__name__)


def cells(size: int, grid: int) -> List[slice]:
    """Return the cells along one side, which overlap where the grid does not divide it."""
    return [slice(i * size // grid, -(-(i + 1) * size // grid)) for i in range(grid)]


def cell_moments(feature: torch.Tensor, grid: int, eps: float = 1e-5) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return means and standard deviations of each channel in each cell.

    Args:
        feature: [B, C, H, W].
        grid: Cells along each side.
        eps: Added to the variance, which is the unbiased one, 0 for a cell of one position.

    Returns:
        Two tensors [B, C, grid, grid].
    """
    feature = to_full_precision(feature)
    means, deviations = [], []
    for rows in cells(feature.shape[2], grid):
        for columns in cells(feature.shape[3], grid):
            values = feature[:, :, rows, columns].flatten(2)
            means.append(values.mean(2))
            deviations.append((values.var(2, correction=min(1, values.shape[2] - 1)) + eps).sqrt())
    means_map, deviations_map = (torch.stack(x, 2).unflatten(2, (grid, grid)) for x in (means, deviations))
    return means_map, deviations_map


def gaussian_distances(
        student: torch.Tensor,
        teacher: torch.Tensor,
        grid: int = 4,
        eps: float = 1e-5,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Squared distances of means and of deviations, summed over channels, mean over cells and samples.

    Args:
        student: [B, C, Hs, Ws].
        teacher: [B, C, Ht, Wt], treated as constant.
        grid: Cells along each side.
        eps: Added to the variances.

    Returns:
        Two scalars.
    """
    moments = zip(cell_moments(student, grid, eps), cell_moments(teacher.detach(), grid, eps))
    means, deviations = ((s - t).square().sum() / (grid ** 2 * student.shape[0]) for s, t in moments)
    return means, deviations


class Bottleneck(nn.Module):
    """Three convolutions with nothing in between, batch norm and, where the teacher ends in one, ReLU.

    Args:
        in_channels: Channels of the student.
        out_channels: Channels of the teacher.
        width: Channels in between.
        relu: End in a ReLU.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int = 256, relu: bool = True):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, out_channels, 1)
        self.bn = BatchNorm2d(out_channels)
        self.relu = relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, in_channels, H, W] to [B, out_channels, H, W]."""
        x = self.bn(self.conv3(self.conv2(self.conv1(x))))
        return F.relu(x) if self.relu else x


@register_method('wkd_f')
class WKDFeatures(DistillMethod):
    """Wasserstein distance of Gaussians, one for each channel of each cell of the last feature.

    Args:
        grid: Cells along each side.
        mean_weight: Weight of the means' distance; 0 leaves it out.
        std_weight: Weight of the deviations' distance; 0 leaves it out.
        projector: 'bottleneck' (three convolutions) or 'conv' (one, as in fitnet).
        width: Channels inside the bottleneck.
        relu: End the projector with a ReLU, as published; None does where the teacher's feature has no negative number.
        eps: Added to the variances.

    Raises:
        UsageError: If both weights are 0.
    """
    paper = 'Lv et al., NeurIPS 2024, https://arxiv.org/abs/2412.08139'
    published_weight = 0.02
    weight_source = "the authors' code for ResNet-34 to ResNet-18 on ImageNet"
    student_outputs = frozenset({'feature'})
    teacher_outputs = frozenset({'feature'})

    def __init__(
            self,
            grid: Annotated[int, Range(1, 64, whole=True)] = 4,
            mean_weight: Weight = 2.,
            std_weight: Weight = 1.,
            projector: Annotated[str, OneOf('bottleneck', 'conv')] = 'bottleneck',
            width: Width = 256,
            relu: Annotated[Optional[bool], OneOf(None, True, False)] = None,
            eps: Annotated[float, Range(0, 1, without_low=True)] = 1e-5,
    ):
        super().__init__()
        check_weights('wkd_f', mean_weight=mean_weight, std_weight=std_weight)
        self.grid, self.mean_weight, self.std_weight = grid, float(mean_weight), float(std_weight)
        self.kind, self.width, self.relu, self.eps = projector, width, relu, float(eps)

    def build(self, pair: PairSpec) -> None:
        student, teacher = pair.student.feature, pair.teacher.feature
        relu = 'feature' in pair.teacher.non_negative if self.relu is None else self.relu
        self.projector: nn.Module
        if self.kind == 'conv':
            self.projector = HintRegressor(student, teacher, relu)
        else:
            self.projector = Bottleneck(student[0], teacher[0], self.width, relu)
        smallest = min(
            min(cell.stop - cell.start for cell in cells(shape[1], self.grid)) *
            min(cell.stop - cell.start for cell in cells(shape[2], self.grid)) for shape in (student, teacher))
        if smallest == 1 and self.std_weight:
            _logger.warning(
                f'wkd_f.grid={self.grid}: on maps of {student[1]}x{student[2]} and {teacher[1]}x{teacher[2]} some '
                'cells are a single position, which has no deviation: only their means are compared. Choose a smaller '
                'wkd_f.grid or a larger --img-size.')

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        assert student.feature is not None and teacher.feature is not None
        means, deviations = gaussian_distances(self.projector(student.feature), teacher.feature, self.grid, self.eps)
        terms = (('wkd_f_mean_loss', self.mean_weight, means), ('wkd_f_std_loss', self.std_weight, deviations))
        return {name: weight * term for name, weight, term in terms if weight}
