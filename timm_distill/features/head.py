"""A model's head as a function of a feature: what it takes is found by structure and measured.

Holds names and layouts, never modules.
"""
from dataclasses import dataclass
from typing import Callable, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..utils.batch_norm import is_batch_norm
from .inputs import CANNOT_RUN, RawFeature, logits_of, private_generator
from .layouts import FeatureLayout
from .tracing import Head, call_head, random_like, random_tensors, trace

_TOLERANCE = 1e-9  # in float64


@dataclass(frozen=True)
class HeadInput:
    """Input of a head, and the head's run on it.

    Attributes:
        output: 'feature' (a map that takes the last-stage feature's place) or 'pre_logits' (the classifier's input).
        layout: Layout that a map is put back into; None for pre-logits.
        grid: Grid (height, width) that a map is pooled to first; None where the head takes any.
        shape: Shape of the pre-logits for one image; () for a map.
        averages: Whether the logits of a map were measured to be the mean of those of its positions.
        classifier: Name of the classifier where `get_classifier` does not give it.
    """
    output: str
    layout: Optional[FeatureLayout] = None
    grid: Optional[Tuple[int, int]] = None
    shape: Tuple[int, ...] = ()
    averages: bool = False
    classifier: str = ''

    def run(self, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Return the logits, [B, K], for maps [B, C, H, W] or vectors [B, D, 1, 1]."""
        if self.layout is None:
            classifier = model.get_submodule(self.classifier) if self.classifier else model.get_classifier()
            return classifier(x.reshape(x.shape[0], *self.shape))
        if self.grid is not None:
            x = F.adaptive_avg_pool2d(x, self.grid)
        return logits_of(model.forward_head(_put_back(self.layout, x)))


def find_head_input(
        model: nn.Module,
        raw: RawFeature,
        layout: FeatureLayout,
        pre_logits: torch.Tensor,
        reads_pre_logits: bool,
) -> Optional[HeadInput]:
    """Return what a model's head can be run on: a map where one can be put back, else pre-logits; None for neither.

    Args:
        model: timm model in eval mode.
        raw: Output of its `forward_features`.
        layout: Layout of the last-stage feature.
        pre_logits: Its pre-logits for the same images, as `forward_head` gives them.
        reads_pre_logits: Whether its classifier maps them to the logits.
    """
    if isinstance(raw, torch.Tensor) and layout.is_map:
        feature = layout.to_map(layout.to_positions(raw))
        if _restores(layout, feature, raw):
            grid = (int(feature.shape[2]), int(feature.shape[3]))
            any_grid = _takes_any_grid(model, raw, layout)
            averages = any_grid and _averages(model, raw, layout)
            return HeadInput('feature', layout, None if any_grid else grid, averages=averages)
    if reads_pre_logits:
        return HeadInput('pre_logits', shape=tuple(pre_logits.shape[1:]))
    return None


def _put_back(layout: FeatureLayout, x: torch.Tensor) -> torch.Tensor:
    return layout.from_positions(layout.from_map(x))


def _restores(layout: FeatureLayout, feature: torch.Tensor, raw: torch.Tensor) -> bool:
    """Whether a map is the whole feature: without class tokens or others that a map does not hold."""
    restored = _put_back(layout, feature)
    return restored.shape == raw.shape and torch.equal(restored, raw)


def _takes_any_grid(model: nn.Module, raw: torch.Tensor, layout: FeatureLayout) -> bool:
    """Measure whether a map with every position repeated gives the same logits, as pooling over all positions does."""
    feature = layout.to_map(layout.to_positions(_random_like(raw)))
    repeated = feature.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return _gives_equal(model, raw, layout, feature, repeated, lambda logits: logits)


def _averages(model: nn.Module, raw: torch.Tensor, layout: FeatureLayout) -> bool:
    """Measure whether the logits of a map are the mean of those of its positions, as behind a linear classifier."""
    images, channels = layout.to_positions(raw).shape[:2]
    feature = torch.randn(images, channels, 2, 2, generator=private_generator(), dtype=torch.float64)
    positions = feature.permute(2, 3, 0, 1).flatten(0, 2)[:, :, None, None]  # [4 * B, C, 1, 1]
    return _gives_equal(model, raw, layout, feature, positions, lambda logits: logits.unflatten(0, (4, images)).mean(0))


def _gives_equal(
        model: nn.Module,
        raw: torch.Tensor,
        layout: FeatureLayout,
        feature: torch.Tensor,
        other: torch.Tensor,
        reduce: Callable[[torch.Tensor], torch.Tensor],
) -> bool:
    """Whether a head with random values gives a map the logits that are made of those of another."""
    head = Head(model, 'features')
    tensors = random_tensors(model, trace(head, raw))
    try:
        expected, actual = (call_head(head, tensors, _put_back(layout, x)) for x in (feature, other))
        return torch.allclose(reduce(actual), expected, rtol=_TOLERANCE, atol=_TOLERANCE)
    except CANNOT_RUN:
        return False


def _random_like(raw: torch.Tensor) -> torch.Tensor:
    probe = random_like(raw)
    assert isinstance(probe, torch.Tensor)
    return probe


def head_keeps_statistics(model: nn.Module, raw: RawFeature) -> bool:
    """Whether a head holds a batch norm: whatever it runs on in training moves the statistics of that."""
    return any(is_batch_norm(call.module) for call in trace(Head(model, 'features'), raw))
