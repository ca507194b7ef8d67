"""Search for the tap of a student: where an adapter folds away, measured.

Nothing is looked up by architecture name. A tap is found by structure (which layers the head runs, in which order) and
then measured: a random affine map is put in front of the head and folded into the layer(s) found, with the head's
parameters randomised, and both logits are compared in float64. What does not agree is not used.
"""
import copy
import logging
from dataclasses import replace
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from ..errors import UsageError
from ..features.classifier import (
    TAP_TOLERANCE,
    classifier_linear,
    classifier_reads_pre_logits,
    is_headless,
    last_linear,
)
from ..features.grids import candidate_layouts
from ..features.inputs import (
    CANNOT_RUN,
    RawFeature,
    evaluation_mode,
    logits_of,
    private_generator,
    random_images,
)
from ..features.layouts import FeatureLayout
from ..features.stages import (
    drops_positions,
    has_head,
    intermediate_maps,
    last_stage_feature,
    resolve_feature_layout,
)
from ..features.tracing import Call, Head, call_head, inputs_of, mapped_input, random_like, random_tensors, trace
from ..utils.affine import AffineMap
from ..utils.batch_norm import is_batch_norm
from .dropout import count_dropouts, find_dropout_before, find_dropout_of
from .folding import Consumer, fold_affine, named_tensors, shared_names
from .tap import TAP_POINTS, StudentTap, TapSite

_logger = logging.getLogger(__name__)
_AUTOMATIC_POINTS = ('features', 'pre_logits')
_HEADLESS_POINTS = ('features', 'side')  # of a model whose output is its feature


class _NoTap(Exception):
    """An insertion point does not fit; the message says why."""


def resolve_student_tap(student: nn.Module, input_size: Sequence[int], point: str = 'auto') -> StudentTap:
    """Find where an adapter can sit in a student and measure that it folds away.

    Args:
        student: timm model. Not changed, and neither is the global random state.
        input_size: Input as (channels, height, width).
        point: 'auto' tries features, then pre-logits, without a classifier features, then the side; the name of a point
            forces it.

    Raises:
        UsageError: If no point fits, with the reason for each.
    """
    if point != 'auto' and point not in TAP_POINTS:
        raise UsageError(f"Unknown tap '{point}'. --kd-tap takes: auto, {', '.join(TAP_POINTS)}.")
    points = _HEADLESS_POINTS if is_headless(student) else _AUTOMATIC_POINTS
    rejected: List[str] = []
    with evaluation_mode(student):
        for candidate in points if point == 'auto' else (point,):
            try:
                tap = _measure_point(student, input_size, candidate)
            except _NoTap as e:
                rejected.append(f'not at {candidate}: {e}')
                continue
            return replace(tap, rejected='; '.join(rejected))
    raise UsageError(
        f'No adapter fits the student {type(student).__name__}: {"; ".join(rejected)}. '
        'Choose another --student, --kd-tap side, or a --kd method without an adapter.')


def _measure_point(student: nn.Module, input_size: Sequence[int], point: str) -> StudentTap:
    images = random_images(student, input_size)
    if point == 'pre_logits' and is_headless(student):
        raise _NoTap('the model has no classifier')
    if not has_head(student):
        if point != 'pre_logits':
            raise _NoTap('the model has no forward_features() and forward_head()')
        return _measure_inside(student, images)
    if point != 'pre_logits' and drops_positions(student, images):
        raise _NoTap('the student drops positions in training (patch_drop_rate), and those left are not told apart')
    raw = student.forward_features(images)
    if point == 'side':
        layout = resolve_feature_layout(student, input_size)
        feature = last_stage_feature(raw, student)
        return StudentTap(point, (TapSite(_last_index(raw), layout, tuple(feature.shape[1:])),))
    if point == 'features':
        layouts = _feature_layouts(student, raw, images)
        tap = StudentTap(point, _measure_sites(student, Head(student, point), raw, layouts))
        _check_shared_weights(student, images, tap)
        return tap
    if not classifier_reads_pre_logits(student, raw) or _drops_in_between(student, raw):
        return _measure_inside(student, images)
    pre_logits = student.forward_head(raw, pre_logits=True)
    try:
        tap = StudentTap(point, _measure_sites(student, Head(student, point), pre_logits, _vector_layouts(pre_logits)))
        _check_shared_weights(student, images, tap)
        return replace(tap, dropout=find_dropout_of(lambda: student.forward_head(raw, pre_logits=True)))
    except _NoTap:  # something other than a linear layer comes first in the classifier
        return _measure_inside(student, images)


def _drops_in_between(student: nn.Module, raw: RawFeature) -> bool:
    """Whether a model runs a dropout between its pre-logits and its classifier, which the two alone would not."""
    to_pre_logits, classifier = Head(student, 'to_pre_logits'), Head(student, 'pre_logits')
    return count_dropouts(lambda: classifier(to_pre_logits(raw))) < count_dropouts(lambda: student.forward_head(raw))


def _feature_layouts(student: nn.Module, raw: RawFeature, images: torch.Tensor) -> List[List[FeatureLayout]]:
    """Return the layouts that each tensor of what `forward_features` returned may have."""
    size = int(images.shape[2]), int(images.shape[3])
    parts = [raw] if isinstance(raw, torch.Tensor) else raw
    if not all(isinstance(part, torch.Tensor) for part in parts):
        raise _NoTap(f'forward_features() returns {type(raw).__name__} of other things than tensors')
    maps = intermediate_maps(student, images) if any(part.ndim == 3 for part in parts) else []
    return [candidate_layouts(student, part, size, maps) for part in parts]


def _vector_layouts(pre_logits: torch.Tensor) -> List[List[FeatureLayout]]:
    """Return the layouts of pre-logits, which are matched with a vector: no position of theirs has a place."""
    if pre_logits.ndim == 3:
        return [[FeatureLayout('NLC', pre_logits.shape[2], ordered=False)]]
    formats = {2: ['NC'], 4: ['NCHW', 'NHWC']}.get(pre_logits.ndim, [])
    return [[FeatureLayout(fmt, pre_logits.shape[fmt.index('C')]) for fmt in formats]]


def _last_index(raw: RawFeature) -> Optional[int]:
    return None if isinstance(raw, torch.Tensor) else len(raw) - 1


def _measure_sites(
        student: nn.Module,
        head: Head,
        raw: RawFeature,
        layouts: Sequence[Sequence[FeatureLayout]],
) -> Tuple[TapSite, ...]:
    """Return a site for every tensor of the feature whose map folds away and whose positions have their place."""
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
        raise _NoTap(f'the model does not tell on which grid its {without_place[0].shape[0]} tokens lie')
    if best == float('inf'):
        raise _NoTap('no linear layer that can take the map reads this feature')
    raise _NoTap(f'an affine map does not fold into the next linear layer (measured error {best:.1e})')


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
    affine = _random_affine(site.layout.channels, site.offset)
    tap = StudentTap('features', (site,))
    mapped = [site.layout.from_positions(affine(site.layout.to_positions(tap.read(probe)[0])))]
    try:
        unmerged = call_head(head, tensors, tap.write(probe, mapped))
        merged = call_head(head, {**tensors, **fold_affine(head.model, tensors, site.consumers, affine)}, probe)
        unmapped = call_head(head, tensors, probe)
    except CANNOT_RUN as e:
        _logger.debug(f'{site} cannot be measured: {e}')
        return float('inf')
    return _logit_error(merged, unmerged, unmapped)


def _logit_error(merged: torch.Tensor, unmerged: torch.Tensor, unmapped: torch.Tensor) -> float:
    spread = (unmerged - unmerged.mean()).abs().max().item()
    changed = (unmerged - unmapped).abs().max().item()
    if not spread > 0 or not changed > TAP_TOLERANCE * spread:
        return float('inf')  # logits that do not depend on the feature would agree with everything
    return (merged - unmerged).abs().max().item() / spread


def _random_affine(channels: int, offset: bool = True) -> AffineMap:
    generator = private_generator()
    weight = torch.randn(channels, channels, generator=generator, dtype=torch.float64) / channels ** 0.5
    bias = torch.randn(channels, generator=generator, dtype=torch.float64)
    return AffineMap(weight, bias if offset else torch.zeros_like(bias))


def _measure_inside(student: nn.Module, images: torch.Tensor) -> StudentTap:
    """Tap the input of a classifier that only the model's own forward reaches."""
    name = _linear_classifier(student, images)
    with inputs_of([student.get_submodule(name)]) as (inputs,):
        student(images)
    if len(inputs) != 1 or inputs[0].ndim not in (2, 3):
        raise _NoTap(f'the classifier {name} is not run once on vectors or tokens')
    layout = _vector_layouts(inputs[0])[0][0]
    site = TapSite(None, layout, tuple(inputs[0].shape[1:]), (Consumer(name),))
    try:
        error = _inside_error(student, images, site)
    except CANNOT_RUN as e:
        raise _NoTap(f'the classifier {name} cannot be measured: {" ".join(str(e).split())[:200]}') from e
    if not error < TAP_TOLERANCE:
        raise _NoTap(f'an affine map does not fold into the classifier {name} (measured error {error:.1e})')
    dropout = find_dropout_before(student.get_submodule(name), lambda: student(images))
    return StudentTap('pre_logits', (replace(site, error=error),), inside=name, dropout=dropout)


def _linear_classifier(student: nn.Module, images: torch.Tensor) -> str:
    """Return the name of the one linear layer that gives the logits.

    Raises:
        _NoTap: If there is none.
    """
    classifier = classifier_linear(student) or last_linear(student, images)
    if not isinstance(classifier, nn.Linear) or classifier.bias is None:
        raise _NoTap('the classifier is not a linear layer with bias')
    return next(name for name, module in student.named_modules() if module is classifier)


def _inside_error(student: nn.Module, images: torch.Tensor, site: TapSite) -> float:
    """Compare a random map in front of the classifier with the map folded into it, in a float64 copy."""
    model, images, affine = _exact_copy(student, images, site)
    layout = site.layout
    unmapped = logits_of(model(images))
    with mapped_input(
            model.get_submodule(site.consumers[0].linear),
            lambda x: layout.from_positions(affine(layout.to_positions(x)))):
        unmerged = logits_of(model(images))
    model.load_state_dict(fold_affine(model, named_tensors(model), site.consumers, affine), strict=False)
    return _logit_error(logits_of(model(images)), unmerged, unmapped)


def _exact_copy(
        student: nn.Module,
        images: torch.Tensor,
        site: TapSite,
) -> Tuple[nn.Module, torch.Tensor, AffineMap]:
    """Return a float64 copy of a student with random consumers, the images and a random map for the site's channels."""
    model = copy.deepcopy(student).double()
    for consumer in site.consumers:
        for parameter in model.get_submodule(consumer.linear).parameters():
            # a classifier that starts at zero would agree with everything
            parameter.copy_(torch.randn(parameter.shape, generator=private_generator()))
    affine = _random_affine(site.layout.channels, site.offset)
    return model, images.double(), AffineMap(affine.weight.to(images.device), affine.bias.to(images.device))


def _check_shared_weights(student: nn.Module, images: torch.Tensor, tap: StudentTap) -> None:
    """Measure that the map folds where a consumer's tensors have other names, which other layers may read, too.

    Raises:
        _NoTap: If it does not.
    """
    shared = shared_names(student)
    for site in tap.sites:
        names = [
            name for c in site.consumers for layer in (c.linear, c.pre_norm, c.post_norm) if layer
            for name in shared if name.startswith(f'{layer}.')]
        if names and not (error := _whole_error(student, images, tap, site)) < TAP_TOLERANCE:
            raise _NoTap(
                f'{names[0]} is also {shared[names[0]][0]}, where the map does not belong '
                f'(measured error {error:.1e})')


def _whole_error(student: nn.Module, images: torch.Tensor, tap: StudentTap, site: TapSite) -> float:
    """Compare a random map at a site with the map folded into all of the model, in a float64 copy."""
    model, images, affine = _exact_copy(student, images, site)
    head = Head(model, tap.point)
    one = StudentTap(tap.point, (site,))
    raw = model.forward_features(images)
    if tap.point == 'pre_logits':
        raw = model.forward_head(raw, pre_logits=True)
    mapped = [site.layout.from_positions(affine(site.layout.to_positions(one.read(raw)[0])))]
    unmapped, unmerged = head(raw), head(one.write(raw, mapped))
    model.load_state_dict(fold_affine(model, named_tensors(model), site.consumers, affine), strict=False)
    return _logit_error(logits_of(model(images)), unmerged, unmapped)
