"""Mimicking of a transformer's first blocks, and generation of its last one from tokens of which some are masked.

ViTKD: Practical Guidelines for ViT Feature Knowledge Distillation (Yang et al., CVPR workshops 2024),
https://arxiv.org/abs/2209.02432.

Deep layers of a small transformer cannot copy those of a large one, shallow ones can: each of the first two blocks is
compared with the teacher's through a linear layer. Of the last feature a random part of the tokens is replaced by a
learned one, two convolutions fill them in, and these alone are compared. Both terms are sums over tokens and channels,
hence the small weights. Published beside NKD (gamma 1, temperature 1) for pairs of DeiT.
"""
from typing import Annotated, Dict, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from ..errors import UsageError
from ..features.spec import Features, PairSpec, Pooling, first_blocks
from ..losses import match_grids, to_full_precision
from ..utils.ranges import Range
from ._base import DistillMethod, Weight, check_weights, register_method


def draw_mask(noise: torch.Tensor, ratio: float) -> torch.Tensor:
    """Return which tokens are masked: all but those of smallest noise, of which (1 - ratio) of them, rounded down.

    Args:
        noise: [B, L], uniform in [0, 1).
        ratio: Part of the tokens.

    Returns:
        Booleans, [B, L].
    """
    num_kept = int(noise.shape[1] * (1 - ratio))
    rank = noise.argsort(1).argsort(1)
    return rank >= num_kept


def summed_squares(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared distance of two maps, [B, C, H, W] each, summed over all but the batch, of which it is the mean."""
    return (to_full_precision(student) - to_full_precision(teacher.detach())).square().sum() / len(student)


def align(in_channels: int, out_channels: int) -> nn.Module:
    """Return a linear layer of channels with offset where their numbers differ, else the identity."""
    return nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)


@register_method('vitkd')
class ViTKD(DistillMethod):
    """First blocks mimicked, last feature generated from masked tokens.

    Args:
        alpha: Weight of the first blocks' term.
        beta: Weight of the generated tokens' term.
        ratio: Part of the tokens that is masked, lambda in the paper; the second term is divided by it.
    """
    paper = 'Yang et al., CVPR workshops 2024, https://arxiv.org/abs/2209.02432'
    weight_source = "the authors' code"
    student_outputs = frozenset({'feature', 'blocks'})
    teacher_outputs = frozenset({'feature', 'blocks'})

    def __init__(
            self,
            alpha: Weight = 3e-5,
            beta: Weight = 3e-6,
            ratio: Annotated[float, Range(0, 1, without_low=True)] = 0.5,
    ):
        super().__init__()
        check_weights('vitkd', alpha=alpha, beta=beta)
        self.alpha, self.beta, self.ratio = float(alpha), float(beta), float(ratio)

    def build(self, pair: PairSpec) -> None:
        student, teacher = pair.student, pair.teacher
        grid = [min(a, b) for a, b in zip(student.feature[1:], teacher.feature[1:])]
        self.generates = bool(self.beta) and grid[0] * grid[1] > 1
        blocks = list(zip(first_blocks(student.stages), first_blocks(teacher.stages))) if self.alpha else []
        self._check(pair, bool(blocks))
        self.align_blocks = nn.ModuleList(align(own.shape[0], other.shape[0]) for own, other in blocks)
        if not self.generates:
            return
        width = teacher.feature[0]
        self.align_feature = align(student.feature[0], width)
        self.mask_token = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.generation = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))

    def _check(self, pair: PairSpec, has_blocks: bool) -> None:
        if self.alpha and not has_blocks:
            without = [name for name in ('student', 'teacher') if not first_blocks(getattr(pair, name).stages)]
            raise UsageError(
                f'--kd vitkd compares the first blocks of both models, but this {" and ".join(without)} gives no '
                'intermediate features. --kd-kwargs vitkd.alpha=0 leaves that part out.')
        if not has_blocks and not self.generates:
            raise UsageError(
                '--kd vitkd masks positions of the last feature, of which this pair has a single one: use a larger '
                '--img-size, or leave vitkd.alpha above 0 (--kd-kwargs).')

    def teacher_pooling(self) -> Optional[Pooling]:
        return Pooling()

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        terms = {}
        if len(self.align_blocks):
            terms['vitkd_mimic_loss'] = self.alpha * self.mimic(student.blocks, teacher.blocks)
        if self.generates:
            assert student.feature is not None and teacher.feature is not None
            terms['vitkd_gen_loss'] = self.beta / self.ratio * self.generate(student.feature, teacher.feature)
        return terms

    def mimic(self, students: Sequence[torch.Tensor], teachers: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the distance of the first blocks, [B, Cs, H, W] and [B, Ct, H, W] each."""
        pairs = [match_grids(own, other) for own, other in zip(students, teachers)]
        return torch.stack([
            summed_squares(layer(own), other) for layer, (own, other) in zip(self.align_blocks, pairs)]).sum()

    def generate(
            self,
            student: torch.Tensor,
            teacher: torch.Tensor,
            noise: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Return the distance of the generated tokens from the teacher's last feature.

        Args:
            student: [B, Cs, H, W].
            teacher: [B, Ct, H, W].
            noise: Which tokens are masked, see `draw_mask`; drawn from the run's generator by default.
        """
        student, teacher = match_grids(student, teacher)
        generated, mask = self.fill_in(student, noise)
        return summed_squares(generated * mask, teacher * mask)

    def fill_in(
            self,
            student: torch.Tensor,
            noise: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return the generated map, [B, Ct, H, W], and its mask, [B, 1, H, W]."""
        aligned = self.align_feature(student)
        if noise is None:
            noise = torch.rand(len(aligned), aligned[0, 0].numel(), device=aligned.device)
        mask = draw_mask(noise, self.ratio).unflatten(1, tuple(aligned.shape[2:])).unsqueeze(1)
        return self.generation(torch.where(mask, self.mask_token.to(aligned.dtype), aligned)), mask
