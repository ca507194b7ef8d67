"""Tokens: the class token and the patch tokens of a foundation model, each through a small head.

`loss='unic'` is the loss of UNIC: Universal Classification Models via Multi-teacher Distillation (Sariyildiz et al.,
ECCV 2024), https://arxiv.org/abs/2408.05088, with one teacher, which DUNE (CVPR 2025) took over: for both kinds of
tokens half of 1 - cosine plus half of the smooth L1 distance (mean over channels), and the mean of the two kinds. Its
projectors read several blocks of the student; here each kind has the head of Proteus.

`loss='proteus'` is the token and the feature objective of Accessing Vision Foundation Models via ImageNet-1K (Zhang et
al., ICLR 2025), https://arxiv.org/abs/2407.10366: the mean squared error of the class token, and that of all tokens,
the class token among them. Its third objective masks patches of the student's input, for which a network needs a mask
token and a second forward; it is left out.

What stands for the class token is a model's own vector, its pre-logits: the class token where it pools by that, the
average of the patches where it averages, whatever else its head does before the classifier. The patch tokens are its
last feature map, without class and register tokens, so that models of all kinds can teach and learn.
"""
from typing import Annotated, Dict, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..features.spec import Features, PairSpec
from ..losses import l2_normalize, match_grids
from ..utils.precision import in_full_precision
from ..utils.ranges import OneOf
from ._base import DistillMethod, Weight, check_weights, register_method

EPS = 1e-8  # below it a token has no direction


@in_full_precision
def token_distance(
        student: torch.Tensor,
        teacher: torch.Tensor,
        cosine_weight: float = 0.5,
        smooth_l1_weight: float = 0.5,
) -> torch.Tensor:
    """Weighted sum of 1 - cosine and the smooth L1 distance (beta 1) of tokens, mean over all of them.

    Args:
        student: [..., D].
        teacher: [..., D], treated as constant.
        cosine_weight: Of the former.
        smooth_l1_weight: Of the latter, a mean over channels too.

    Returns:
        Scalar.
    """
    teacher = teacher.detach()
    cosine = (l2_normalize(student, eps=EPS) * l2_normalize(teacher, eps=EPS)).sum(-1)
    return cosine_weight * (1 - cosine.mean()) + smooth_l1_weight * F.smooth_l1_loss(student, teacher)


@in_full_precision
def squared_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared error of tokens, [..., D], the teacher's treated as constant; a scalar."""
    return F.mse_loss(student, teacher.detach())


class TokenHead(nn.Module):
    """Layer norm and linear layer, from the student's width to the teacher's.

    Args:
        in_features: Channels of the student.
        out_features: Channels of the teacher.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.norm = nn.LayerNorm(in_features, eps=1e-5)
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in_features] to [..., out_features]."""
        return self.linear(self.norm(x))


@register_method('tokens')
class Tokens(DistillMethod):
    """Class (or pooled) token and patch tokens, each through a small head, on standardised targets.

    Args:
        loss: 'unic' (cosine and smooth L1) or 'proteus' (squared errors).
        cosine_weight: Weight of 1 - cosine in 'unic'; 0 leaves it out.
        smooth_l1_weight: Weight of the smooth L1 distance in 'unic'; 0 leaves it out.
        class_weight: Weight of the class token's term; 0 leaves it out.
        patch_weight: Weight of the patch tokens' term, with 'proteus' of all tokens; 0 leaves it out.

    Raises:
        UsageError: If both weights of the tokens, or both of the distances, are 0.
    """
    paper = 'Sariyildiz et al., ECCV 2024, https://arxiv.org/abs/2408.05088'
    weight_source = "the authors' code, with one teacher"
    student_outputs = frozenset({'pre_logits', 'feature'})
    teacher_outputs = frozenset({'pre_logits', 'feature'})
    standardized_targets = True

    def __init__(
            self,
            loss: Annotated[str, OneOf('unic', 'proteus')] = 'unic',
            cosine_weight: Weight = 0.5,
            smooth_l1_weight: Weight = 0.5,
            class_weight: Weight = 1.,
            patch_weight: Weight = 1.,
    ):
        super().__init__()
        check_weights('tokens', class_weight=class_weight, patch_weight=patch_weight)
        check_weights('tokens', cosine_weight=cosine_weight, smooth_l1_weight=smooth_l1_weight)
        self.loss = loss
        self.distance_weights = float(cosine_weight), float(smooth_l1_weight)
        self.class_weight, self.patch_weight = float(class_weight), float(patch_weight)

    def build(self, pair: PairSpec) -> None:
        if self.class_weight or self.loss == 'proteus':  # whose patch term is of all tokens
            self.class_head = TokenHead(pair.student.pre_logits, pair.teacher.pre_logits)
        if self.patch_weight:
            self.patch_head = TokenHead(pair.student.feature[0], pair.teacher.feature[0])

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        terms = {}
        if self.class_weight:
            terms['tokens_class_loss'] = self.class_weight * self._compare(*self._class_tokens(student, teacher))
        if self.patch_weight:
            terms['tokens_patch_loss'] = self.patch_weight * self._compare_patches(student, teacher)
        return terms

    def _class_tokens(self, student: Features, teacher: Features) -> Tuple[torch.Tensor, torch.Tensor]:
        assert student.pre_logits is not None and teacher.pre_logits is not None
        return self.class_head(student.pre_logits), teacher.pre_logits

    def _compare_patches(self, student: Features, teacher: Features) -> torch.Tensor:
        assert student.feature is not None and teacher.feature is not None
        own, other = (x.flatten(2).mT for x in match_grids(student.feature, teacher.feature))  # [B, N, C]
        patches = self._compare(self.patch_head(own), other)
        if self.loss == 'unic':
            return patches
        return (self._compare(*self._class_tokens(student, teacher)) + own.shape[1] * patches) / (own.shape[1] + 1)

    def _compare(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Return the term of one kind of tokens, [..., D] each."""
        if self.loss == 'proteus':
            return squared_error(student, teacher)
        return 0.5 * token_distance(student, teacher, *self.distance_weights)  # the mean of both kinds
