"""Distillation of transformers into students of any kind, with the teacher's own last stage in the student's path.

ScaleKD: Strong Vision Transformers Could Be Excellent Teachers (Fan et al., NeurIPS 2024),
https://arxiv.org/abs/2411.06786.

A projector turns a map of the student into tokens of the teacher's width and grid: queries, one for every position of
the teacher, attend to the student's positions. One projector's tokens are compared with the teacher's last feature by
direction at every position (direct); those of another likewise after each channel's mean over positions is taken off
both (mean-free; what the paper calls frequency space, of which it removes the constant). The student's stage before the
last goes through two such projectors to the teacher's stage before the last, then through the teacher's own frozen last
stage, and is compared with the teacher's last feature. What comes out of that are the queries of the projectors on the
student's last feature. The published weights, the defaults, go with KD at temperature 1 (`--kd scalekd+kd`).
"""
from typing import Annotated, Any, Dict, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import UsageError
from ..features.spec import Features, PairSpec
from ..losses import l2_normalize, match_grids, to_full_precision
from ..utils.ranges import NOT_NEGATIVE, Range
from ._base import Count, CountOrNone, DistillMethod, register_method
from ._layers import BatchNorm2d

KINDS = ('direct', 'mean_free')
_HEAD_WIDTH = 64  # channels of a head, at least, where the number of heads is not given
Grid = Tuple[int, int]


class TwoWeights:
    """Two weights, of the direct and of the mean-free term."""

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, (tuple, list)) and len(value) == 2 and all(v in NOT_NEGATIVE for v in value)

    def __str__(self) -> str:
        return 'two weights, of the direct and of the mean-free term, 0 for none'


def direction_loss(student: torch.Tensor, teacher: torch.Tensor, mean_free: bool = False) -> torch.Tensor:
    """Squared distance of the directions at every position, summed over positions, mean over the batch.

    Args:
        student: [B, C, H, W].
        teacher: [B, C, H, W], treated as constant. The larger of two grids is pooled to the smaller.
        mean_free: Take each channel's mean over positions off both maps first.

    Returns:
        Scalar.
    """
    maps = match_grids(to_full_precision(student), to_full_precision(teacher.detach()))
    if mean_free:
        maps = tuple(x - x.mean((2, 3), keepdim=True) for x in maps)  # type: ignore[assignment]
    own, other = (l2_normalize(x, dim=1) for x in maps)
    return (own - other).square().sum() / len(own)


class CrossAttention(nn.Module):
    """Multi-head attention of queries to keys of another width.

    Args:
        width: Channels of queries and output.
        key_width: Channels of the keys.
        num_heads: Heads; divides `width`.
        scale: Factor on the logits of the softmax, beside the inverse root of a head's width.
        windows: Windows along each side of both grids, in which positions attend to those of the same window alone.
    """

    def __init__(self, width: int, key_width: int, num_heads: int, scale: float, windows: int = 1):
        super().__init__()
        self.num_heads = num_heads
        self.scale = scale * (width // num_heads) ** -0.5
        self.windows = windows
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(key_width, width)
        self.v = nn.Linear(key_width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Map [B, C, H, W] and [B, C', H', W'] to tokens in order of the queries' grid, [B, H * W, C].

        Queries for a batch of one hold for every image.
        """
        q, k, v = (
            self._split(layer(x.permute(0, 2, 3, 1))) for layer, x in (
                (self.q, queries), (self.k, keys), (self.v, keys)))
        x = F.scaled_dot_product_attention(q.expand(len(k), *q.shape[1:]), k, v, scale=self.scale)
        return self.proj(self._join(x, queries.shape[2:]))

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """Return a map, [B, H, W, C], as [B, windows ** 2 * heads, positions, channels of a head]."""
        n = self.windows
        x = x.unflatten(3, (self.num_heads, -1)).unflatten(2, (n, -1)).unflatten(1, (n, -1))
        return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(1, 3)

    def _join(self, x: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
        """Undo `_split` for a grid, and return tokens, [B, H * W, C]."""
        n = self.windows
        x = x.unflatten(1, (n, n, self.num_heads)).unflatten(4, (grid[0] // n, grid[1] // n))
        return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(1, 4)


class AttentionProjector(nn.Module):
    """Map of a student as a map of the teacher's width and grid, by attention of the teacher's positions to it.

    Args:
        in_shape: Shape of the student's map, (C, H, W).
        out_shape: Shape of the teacher's.
        num_heads: Heads of the attention.
        scale: Factor on the logits of its softmax.
        learn_queries: Keep a table of queries; else they are given to `forward`.
        ffn_ratio: Width of the feed-forward layers over the teacher's.
        windows: Windows of the attention along each side.
    """

    def __init__(
            self,
            in_shape: Tuple[int, int, int],
            out_shape: Tuple[int, int, int],
            num_heads: int,
            scale: float = 5.,
            learn_queries: bool = True,
            ffn_ratio: int = 4,
            windows: int = 1,
    ):
        super().__init__()
        width, key_width = out_shape[0], in_shape[0]
        self.grid: Grid = (out_shape[1], out_shape[2])
        self.proj_student = nn.Sequential(
            nn.Conv2d(key_width, key_width, 3, padding=1), BatchNorm2d(key_width), nn.ReLU())
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, *in_shape), std=0.02))
        self.query = nn.Parameter(torch.randn(self.grid[0] * self.grid[1], width)) if learn_queries else None
        self.proj_pos = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU())
        self.attention = CrossAttention(width, key_width, num_heads, scale, windows)
        self.norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, ffn_ratio * width), nn.ReLU(), nn.Linear(ffn_ratio * width, width))

    def forward(self, x: torch.Tensor, queries: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Map [B, C, H, W], and queries [B, Ct, Ht, Wt] unless they are learned, to [B, Ct, Ht, Wt]."""
        if queries is None:
            assert self.query is not None
            queries = self.query.t().unflatten(1, self.grid).unsqueeze(0)
        tokens = self.norm(self.attention(self.proj_pos(queries), self._keys(x)))
        return (tokens + self.ffn(tokens)).transpose(1, 2).unflatten(2, tuple(queries.shape[2:]))

    def _keys(self, x: torch.Tensor) -> torch.Tensor:
        position: torch.Tensor = self.pos_embed
        if position.shape[2:] != x.shape[2:]:  # images of another size than the first
            position = F.interpolate(position, x.shape[2:], mode='bilinear', align_corners=False)
        return self.proj_student(x) + position


def default_heads(width: int) -> int:
    """Return the largest number of heads of at least 64 channels each that divides a width; 1 below."""
    return max(heads for heads in range(1, max(1, width // _HEAD_WIDTH) + 1) if width % heads == 0)


@register_method('scalekd')
class ScaleKD(DistillMethod):
    """Directions of the last feature, from two stages of the student, one through the teacher's own last stage.

    Args:
        alpha_s3: Weights of the direct and of the mean-free term of the stage before the last; [0,0] leaves it out,
            and with it the teacher's last stage.
        alpha_s4: Those of the last feature.
        heads_s3: Heads of the attention to the stage before the last; 0 for one to every 64 channels of the teacher.
        heads_s4: Those of the attention to the last feature, likewise.
        softmax_scale: Factor on the logits of the attention's softmax.
        self_query: Learn the queries of the last feature too, instead of taking what comes out of the teacher's stage.
        ffn_ratio: Width of the projectors' feed-forward layers over the teacher's.
    """
    paper = 'Fan et al., NeurIPS 2024, https://arxiv.org/abs/2411.06786'
    weight_source = "the authors' code"
    student_outputs = frozenset({'feature', 'stages'})
    teacher_outputs = frozenset({'feature', 'tail'})

    def __init__(
            self,
            alpha_s3: Annotated[Any, TwoWeights()] = (0.08, 0.06),
            alpha_s4: Annotated[Any, TwoWeights()] = (0.08, 0.06),
            heads_s3: CountOrNone = 0,
            heads_s4: CountOrNone = 0,
            softmax_scale: Annotated[float, Range(0, 1000, without_low=True)] = 5.,
            self_query: bool = False,
            ffn_ratio: Count = 4,
    ):
        super().__init__()
        self.alphas = {
            's3': dict(zip(KINDS, map(float, alpha_s3))), 's4': dict(zip(KINDS, map(float, alpha_s4)))}
        if not any(alpha_s3) and not any(alpha_s4):
            raise UsageError(
                'scalekd.alpha_s3 and scalekd.alpha_s4 are all 0: scalekd has no other term (--kd-kwargs).')
        self.heads = {'s3': heads_s3, 's4': heads_s4}
        self.options: Dict[str, Any] = dict(scale=float(softmax_scale), ffn_ratio=ffn_ratio)
        self.self_query = self_query

    def build(self, pair: PairSpec) -> None:
        student, teacher = pair.student, pair.teacher
        stage = student.stages[-2 if len(student.stages) > 1 else -1]
        self.position = len(student.stages) - 2 if len(student.stages) > 1 else 0
        self.kinds = KINDS if teacher.feature[1] * teacher.feature[2] > 1 else KINDS[:1]  # one position is its mean
        self.s3 = nn.ModuleDict()
        if self._weighted('s3'):
            if teacher.tail is None:
                raise UsageError(
                    "--kd scalekd runs the teacher's own last stage on the student's feature, which cannot be done "
                    f'with this teacher: {teacher.no_tail or "it is read from a cache"}. --kd-kwargs '
                    'scalekd.alpha_s3=0,0 leaves that part out; another --teacher may have such a stage.')
            self.s3 = self._create('s3', stage.shape, teacher.tail.shape)
        self.s4 = self._create('s4', student.feature, teacher.feature)

    def _weighted(self, level: str) -> Tuple[str, ...]:
        return tuple(kind for kind in self.kinds if self.alphas[level][kind])

    def _create(
            self,
            level: str,
            in_shape: Tuple[int, int, int],
            out_shape: Tuple[int, int, int],
    ) -> nn.ModuleDict:
        heads = self.heads[level] or default_heads(out_shape[0])
        if out_shape[0] % heads:
            raise UsageError(
                f"scalekd.heads_{level}={heads} does not divide the {out_shape[0]} channels of the teacher's stage: "
                'take a divisor, or 0 (--kd-kwargs).')
        return nn.ModuleDict({
            kind: AttentionProjector(
                in_shape, out_shape, heads, learn_queries=level == 's3' or self._learns_queries(kind), **self.options)
            for kind in self._weighted(level)})

    def _learns_queries(self, kind: str) -> bool:
        return self.self_query or kind not in self.s3

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        assert student.feature is not None and teacher.feature is not None
        passed: Dict[str, torch.Tensor] = {}
        terms: Dict[str, torch.Tensor] = {}
        for kind, projector in self.s3.items():
            assert teacher.tail is not None
            passed[kind] = teacher.tail(projector(student.stages[self.position]))
            terms[f'scalekd_s3_{kind}_loss'] = self._compare('s3', kind, passed[kind], teacher.feature)
        for kind, projector in self.s4.items():
            queries = None if self._learns_queries(kind) else passed[kind]
            terms[f'scalekd_s4_{kind}_loss'] = self._compare(
                's4', kind, projector(student.feature, queries), teacher.feature)
        return terms

    def _compare(self, level: str, kind: str, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return self.alphas[level][kind] * direction_loss(student, teacher, kind == 'mean_free')
