"""Classifier of a timm model: its linear layer, found by structure and measured."""
from typing import Any, List, Optional

import torch
import torch.nn as nn

from ..errors import UsageError
from .inputs import CANNOT_RUN, RawFeature
from .tracing import Head, call_head, random_like, random_tensors, trace


def classifier_heads(model: nn.Module) -> List[Any]:
    """Return what a model names as its classifier or classifiers, which may be no module; [None] for nothing."""
    classifier = model.get_classifier() if hasattr(model, 'get_classifier') else None
    return list(classifier) if isinstance(classifier, (tuple, list)) else [classifier]


def classifier_parameters(model: nn.Module) -> List[nn.Parameter]:
    """Return the parameters of a model's classifier or classifiers; none where it does not name them."""
    return [p for head in classifier_heads(model) if isinstance(head, nn.Module) for p in head.parameters()]


TAP_TOLERANCE = 1e-9  # relative to the logits' spread, in float64


def is_headless(model: nn.Module) -> bool:
    """Whether a model is an encoder, or was built without its classifier: what it gives is its feature."""
    return getattr(model, 'num_classes', 1) == 0 or isinstance(classifier_heads(model)[0], nn.Identity)


def check_classifier(model: nn.Module) -> None:
    """Raise a UsageError for an encoder, or a model that was built without its classifier."""
    if is_headless(model):
        raise UsageError(
            f'{type(model).__name__} has no classifier: give --num-classes N, or distil without labels (--no-labels), '
            'as an encoder that takes none has to be.')


def classifier_reads_pre_logits(model: nn.Module, feature: RawFeature) -> bool:
    """Measure whether `get_classifier()` maps `forward_head(f, pre_logits=True)` to `forward_head(f)`.

    Args:
        model: Model in eval mode.
        feature: Output of its `forward_features`.
    """
    classifier = model.get_classifier() if hasattr(model, 'get_classifier') else None
    if not isinstance(classifier, nn.Module) or not hasattr(model, 'forward_head'):
        return False
    heads = {part: Head(model, part) for part in ('features', 'to_pre_logits', 'pre_logits')}
    tensors = random_tensors(model, trace(heads['features'], feature))
    probe = random_like(feature)
    try:
        expected = call_head(heads['features'], tensors, probe)
        logits = call_head(heads['pre_logits'], tensors, call_head(heads['to_pre_logits'], tensors, probe))
    except CANNOT_RUN:
        return False
    return logits.shape == expected.shape and torch.allclose(logits, expected, rtol=TAP_TOLERANCE, atol=TAP_TOLERANCE)


def classifier_linear(model: nn.Module) -> Optional[nn.Module]:
    """Return the one linear layer that the classifier is, for methods that reuse its weight; None for other heads."""
    classifier = classifier_heads(model)[0]
    if isinstance(classifier, nn.Module):
        linears = [m for m in classifier.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        if len(linears) == 1:
            return linears[0]
    return None


def last_linear(model: nn.Module, images: torch.Tensor) -> Optional[nn.Module]:
    """Return the linear layer that a model runs last."""
    calls: List[nn.Module] = []
    handles = [
        m.register_forward_hook(lambda module, args, out: calls.append(module))
        for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return calls[-1] if calls else None
