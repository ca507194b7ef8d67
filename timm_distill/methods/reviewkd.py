"""Distillation of each stage from the teacher's, reviewed with what deeper stages of the student know.

ReviewKD: Distilling Knowledge via Knowledge Review (Chen et al., CVPR 2021), https://arxiv.org/abs/2104.09044.

From the deepest stage to the shallowest the student's feature is fused with the result of the stage below it (attention
based fusion) and compared with the teacher's over a pyramid of grids (hierarchical context loss). The stages are those
of equal reduction in both models, and the pre-logits as a map of one position. The official code trains with the first
20 epochs as a linear warmup (`--kd-schedule reviewkd=warmup:20`; 5 in ReviewKD++ on ImageNet) and compares features
before the last activation of a stage; timm's stages end behind it.
"""
from typing import Dict, FrozenSet, List, Optional, Tuple, cast

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..features.spec import Features, PairSpec
from ..losses import pool_to_grid, to_full_precision
from ._base import Count, DistillMethod, WidthOrAuto, register_method
from ._layers import conv_norm
from ._stages import StagePairs, match_stages, stages_of_pairs

LEVELS = (4, 2, 1)  # grids of the pyramid


def hierarchical_context_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Weighted mean over a pyramid of grids of the mean squared error of two maps, [B, C, H, W] each.

    The full grid has weight 1 and every smaller level that fits into it half of the level before.
    """
    student, teacher = to_full_precision(student), to_full_precision(teacher.detach())
    height, width = student.shape[-2:]
    loss, weight, total = F.mse_loss(student, teacher), 1., 1.
    for level in LEVELS:
        if level >= max(height, width):
            continue
        weight /= 2
        total += weight
        grid = (min(level, height), min(level, width))
        loss = loss + weight * F.mse_loss(pool_to_grid(student, grid), pool_to_grid(teacher, grid))
    return loss / total


class AttentionFusion(nn.Module):
    """Fuses a stage with the fused map of the deeper stages.

    Args:
        in_channels: Channels of the student's stage.
        mid_channels: Channels of all fused maps.
        out_channels: Channels of the teacher's stage.
        fuse: Whether there is a deeper stage.
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, fuse: bool):
        super().__init__()
        self.conv1 = conv_norm(in_channels, mid_channels, 1)
        self.conv2 = conv_norm(mid_channels, out_channels, 3)
        self.att_conv = nn.Sequential(nn.Conv2d(2 * mid_channels, 2, 1), nn.Sigmoid()) if fuse else None
        for conv in (self.conv1[0], self.conv2[0]):
            nn.init.kaiming_uniform_(cast(torch.Tensor, conv.weight), a=1)  # as the official code

    def forward(
            self,
            x: torch.Tensor,
            deeper: Optional[torch.Tensor],
            grid: Tuple[int, int],
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return the map to compare, [B, out, *grid], and the fused one for the next stage, [B, mid, *grid]."""
        x = self.conv1(x)
        if self.att_conv is not None:
            assert deeper is not None
            deeper = F.interpolate(deeper, x.shape[-2:], mode='nearest')
            attention = self.att_conv(torch.cat([x, deeper], 1))  # [B, 2, H, W]
            x = x * attention[:, :1] + deeper * attention[:, 1:]
        if x.shape[-2:] != grid:
            x = F.interpolate(x, grid, mode='nearest')
        return self.conv2(x), x


@register_method('reviewkd')
class ReviewKD(DistillMethod):
    """Stage-wise feature matching, each stage fused with the deeper ones of the student.

    Args:
        stages: How many of the matched stages to use, the deepest; the pre-logits come on top.
        mid_channels: Channels of the fused maps; 0 for those of the student's pre-logits, at most 512.
    """
    paper = 'Chen et al., CVPR 2021, https://arxiv.org/abs/2104.09044'
    weight_source = "the authors' code for ImageNet"
    student_outputs = frozenset({'stages', 'pre_logits'})
    teacher_outputs = frozenset({'stages', 'pre_logits'})

    def __init__(self, stages: Count = 4, mid_channels: WidthOrAuto = 0):
        super().__init__()
        self.stages = stages
        self.mid_channels = mid_channels
        self.pairs: StagePairs = ()

    def build(self, pair: PairSpec) -> None:
        self.pairs = match_stages(pair.student, pair.teacher)[-self.stages:]
        matched = stages_of_pairs(pair.student, pair.teacher, self.pairs)
        channels = [(student.shape[0], teacher.shape[0]) for student, teacher in matched]
        self.build_fusions([*channels, (pair.student.pre_logits, pair.teacher.pre_logits)])

    def build_fusions(self, channels: List[Tuple[int, int]]) -> None:
        """Create the fusions, deep to shallow, for pairs (student's channels, teacher's), shallow to deep."""
        mid = self.mid_channels or min(512, channels[-1][0])
        self.abfs = nn.ModuleList(
            AttentionFusion(own, mid, other, fuse=i > 0) for i, (own, other) in enumerate(reversed(channels)))

    def teacher_stages(self) -> Optional[FrozenSet[int]]:
        return frozenset(j for _, j in self.pairs)

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        assert student.pre_logits is not None and teacher.pre_logits is not None
        own = [student.stages[i] for i, _ in self.pairs] + [student.pre_logits[:, :, None, None]]
        other = [teacher.stages[j] for _, j in self.pairs] + [teacher.pre_logits[:, :, None, None]]
        outputs, _ = self.review(own, [feature.shape[-2:] for feature in other])  # type: ignore[misc]
        losses = [hierarchical_context_loss(output, feature) for output, feature in zip(outputs, other)]
        return {'reviewkd_loss': torch.stack(losses).sum()}

    def review(
            self,
            features: List[torch.Tensor],
            grids: List[Tuple[int, int]],
    ) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
        """Fuse the student's features, shallow to deep, on the teacher's grids; return outputs and fused maps."""
        outputs: List[torch.Tensor] = []
        fused: List[torch.Tensor] = []
        for fusion, feature, grid in zip(self.abfs, reversed(features), reversed(grids)):
            output, residual = fusion(feature, fused[0] if fused else None, tuple(grid))
            outputs.insert(0, output)
            fused.insert(0, residual)
        return outputs, fused
