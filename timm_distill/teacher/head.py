"""A frozen model's head as a function of a feature: what it takes is found by structure and measured.

Holds names and layouts, never modules.
"""
from dataclasses import dataclass
from typing import Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..features.inputs import CANNOT_RUN, RawFeature
from ..features.layouts import FeatureLayout
from ..features.tracing import Head, call_head, random_like, random_tensors, trace

_TOLERANCE = 1e-9  # in float64


@dataclass(frozen=True)
class HeadInput:
    """Input of a frozen head, and the head's run on it.

    Attributes:
        output: 'feature' (a map that takes the last-stage feature's place) or 'pre_logits' (the classifier's input).
        layout: Layout that a map is put back into; None for pre-logits.
        grid: Grid (height, width) that a map is pooled to first; None where the head takes any.
        shape: Shape of the pre-logits for one image; () for a map.
        classifier: Name of the classifier where `get_classifier` does not give it.
    """
    output: str
    layout: Optional[FeatureLayout] = None
    grid: Optional[Tuple[int, int]] = None
    shape: Tuple[int, ...] = ()
    classifier: str = ''

    def run(self, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Return the logits, [B, K], for maps [B, C, H, W] or vectors [B, D, 1, 1]."""
        if self.layout is None:
            classifier = model.get_submodule(self.classifier) if self.classifier else model.get_classifier()
            return classifier(x.reshape(x.shape[0], *self.shape))
        if self.grid is not None:
            x = F.adaptive_avg_pool2d(x, self.grid)
        output = model.forward_head(_put_back(self.layout, x))
        return output[0] if isinstance(output, (tuple, list)) else output


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
            return HeadInput('feature', layout, None if _takes_any_grid(model, raw, layout) else grid)
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
    head = Head(model, 'features')
    tensors = random_tensors(model, trace(head, raw))
    probe = random_like(raw)
    assert isinstance(probe, torch.Tensor)
    feature = layout.to_map(layout.to_positions(probe))
    repeated = feature.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    try:
        expected, actual = (call_head(head, tensors, _put_back(layout, x)) for x in (feature, repeated))
    except CANNOT_RUN:
        return False
    return torch.allclose(actual, expected, rtol=_TOLERANCE, atol=_TOLERANCE)
