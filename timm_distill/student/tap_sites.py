"""Sites of a tap: which linear layers read a tensor of the feature, and into which a map of it folds, measured."""
import logging
from dataclasses import replace
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from ..features.classifier import TAP_TOLERANCE
from ..features.inputs import CANNOT_RUN, RawFeature, private_generator
from ..features.layouts import FeatureLayout
from ..features.tracing import Call, Head, call_head, random_like, random_tensors, trace
from ..utils.affine import AffineMap
from ..utils.batch_norm import is_batch_norm
from .folding import Consumer, fold_affine
from .tap import StudentTap, TapSite

_logger = logging.getLogger(__name__)


class NoTap(Exception):
    """An insertion point does not fit; the message says why."""


def measure_sites(
        student: nn.Module,
        head: Head,
        raw: RawFeature,
        layouts: Sequence[Sequence[FeatureLayout]],
) -> Tuple[TapSite, ...]:
    """Return a site for every tensor of the feature whose map folds away and whose positions have their place.

    Args:
        student: timm model.
        head: What runs on the feature.
        raw: The feature, as `forward_features` or the pre-logits return it.
        layouts: That each of its tensors may have.

    Raises:
        NoTap: If there is none.
    """
    calls = trace(head, raw)
    tensors = random_tensors(student, calls)
    probe = random_like(raw)
    sites: List[TapSite] = []
    without_place: List[TapSite] = []
    best = float('inf')
    for index, possible in zip([None] if isinstance(raw, torch.Tensor) else range(len(raw)), layouts):
        feature = raw if index is None else raw[index]
        for layout in possible:
            site = TapSite(index, layout, tuple(feature.shape[1:]))
            site, error = _best_site(site, head, calls, tensors, probe)
            best = min(best, error)
            if error < TAP_TOLERANCE:
                (sites if layout.is_map else without_place).append(site)
                break
    if sites:
        return tuple(sites)
    if without_place:
        raise NoTap(f'the model does not tell on which grid its {without_place[0].shape[0]} tokens lie')
    if best == float('inf'):
        raise NoTap('no linear layer that can take the map reads this feature')
    raise NoTap(f'an affine map does not fold into the next linear layer (measured error {best:.1e})')


def _best_site(
        site: TapSite,
        head: Head,
        calls: Sequence[Call],
        tensors: Dict[str, torch.Tensor],
        probe: RawFeature,
) -> Tuple[TapSite, float]:
    """Try the candidate consumers until one folds; return the site with it and the smallest error met."""
    best = float('inf')
    readers = _reading_layers(site, head, calls, tensors, probe)
    for consumers in _candidate_consumers(calls, readers, site.layout.channels):
        candidate = replace(site, consumers=consumers)
        error = _fold_error(head, tensors, candidate, probe)
        if error < TAP_TOLERANCE:
            return replace(candidate, error=error), error
        best = min(best, error)
    return site, best


def _reading_layers(
        site: TapSite,
        head: Head,
        calls: Sequence[Call],
        tensors: Mapping[str, torch.Tensor],
        probe: RawFeature,
) -> List[int]:
    """Return the positions in the trace of the linear layers of the site's width whose input depends on the site."""
    tap = StudentTap('features', (site,))
    try:
        before = trace(head, probe, tensors)
        after = trace(head, tap.write(probe, [tap.read(probe)[0] + 1]), tensors)
    except CANNOT_RUN as e:
        _logger.debug(f'{site} cannot be traced: {e}')
        return []
    return [
        i for i, (a, b) in enumerate(zip(before, after))
        if _has_width(calls[i].module, site.layout.channels) and not torch.equal(a.input, b.input)]


def _candidate_consumers(
        calls: Sequence[Call],
        readers: Sequence[int],
        channels: int,
) -> Iterator[Tuple[Consumer, ...]]:
    """Yield sets of layers that a map may fold into.

    The first layer that reads the feature, then all of them; each directly, then behind a batch norm, and with an
    offset where they can take one.
    """
    for group in (readers[:1], readers) if len(readers) > 1 else (readers,) if readers else ():
        for with_pre_norm in (False, True):
            consumers = [_create_consumer(calls, i, channels, with_pre_norm) for i in group]
            if all(consumers):
                yield tuple(c for c in consumers if c)
        if all(calls[i].module.bias is None for i in group):
            yield tuple(Consumer(calls[i].name, offset=False) for i in group)


def _has_width(module: nn.Module, channels: int) -> bool:
    if isinstance(module, nn.Linear):
        return module.in_features == channels
    return isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.in_channels == channels and module.groups == 1


def _create_consumer(calls: Sequence[Call], index: int, channels: int, with_pre_norm: bool) -> Optional[Consumer]:
    """Return the consumer at a position of the trace, None if it cannot take an offset or has no such norm."""
    linear = calls[index].module
    pre_norm = _nearest_norm(reversed(calls[:index]), channels) if with_pre_norm else None
    if with_pre_norm and pre_norm is None:
        return None
    post_norm = None
    if linear.bias is None:
        post_norm = _nearest_norm(iter(calls[index + 1:]), linear.weight.shape[0])
        if post_norm is None:
            return None
    return Consumer(calls[index].name, pre_norm, post_norm)


def _nearest_norm(calls: Iterator[Call], channels: int) -> Optional[str]:
    for call in calls:
        if is_batch_norm(call.module):
            return call.name if call.module.running_mean.numel() == channels else None
    return None


def _fold_error(head: Head, tensors: Dict[str, torch.Tensor], site: TapSite, probe: RawFeature) -> float:
    """Return the largest logit difference between a random map in front of the head and the map folded into it."""
    affine = random_affine(site.layout.channels, site.offset)
    tap = StudentTap('features', (site,))
    mapped = [site.layout.from_positions(affine(site.layout.to_positions(tap.read(probe)[0])))]
    try:
        unmerged = call_head(head, tensors, tap.write(probe, mapped))
        merged = call_head(head, {**tensors, **fold_affine(head.model, tensors, site.consumers, affine)}, probe)
        unmapped = call_head(head, tensors, probe)
    except CANNOT_RUN as e:
        _logger.debug(f'{site} cannot be measured: {e}')
        return float('inf')
    return logit_error(merged, unmerged, unmapped)


def logit_error(merged: torch.Tensor, unmerged: torch.Tensor, unmapped: torch.Tensor) -> float:
    """Return how far merged logits are from unmerged ones, in parts of these; infinite where the map did nothing."""
    spread = (unmerged - unmerged.mean()).abs().max().item()
    changed = (unmerged - unmapped).abs().max().item()
    if not spread > 0 or not changed > TAP_TOLERANCE * spread:
        return float('inf')  # logits that do not depend on the feature would agree with everything
    return (merged - unmerged).abs().max().item() / spread


def random_affine(channels: int, offset: bool = True) -> AffineMap:
    generator = private_generator()
    weight = torch.randn(channels, channels, generator=generator, dtype=torch.float64) / channels ** 0.5
    bias = torch.randn(channels, generator=generator, dtype=torch.float64)
    return AffineMap(weight, bias if offset else torch.zeros_like(bias))
