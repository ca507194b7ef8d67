"""Search for the tap of a student: where an adapter folds away, measured.

Nothing is looked up by architecture name. A tap is found by structure (which layers the head runs, in which order) and
then measured: a random affine map is put in front of the head and folded into the layer(s) found, with the head's
parameters randomised, and both logits are compared in float64. What does not agree is not used.
"""
import copy
from dataclasses import replace
from typing import List, Optional, Sequence, Tuple

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
from ..features.tracing import Head, inputs_of, mapped_input
from ..utils.affine import AffineMap
from .dropout import count_dropouts, find_dropout_before, find_dropout_of
from .folding import Consumer, fold_affine, named_tensors, shared_names
from .tap import TAP_POINTS, StudentTap, TapSite
from .tap_sites import NoTap, logit_error, measure_sites, random_affine

_AUTOMATIC_POINTS = ('features', 'pre_logits')
_HEADLESS_POINTS = ('features', 'side')  # of a model whose output is its feature


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
            except NoTap as e:
                rejected.append(f'not at {candidate}: {e}')
                continue
            return replace(tap, rejected='; '.join(rejected))
    raise UsageError(
        f'No adapter fits the student {type(student).__name__}: {"; ".join(rejected)}. '
        'Choose another --student, --kd-tap side, or a --kd method without an adapter.')


def _measure_point(student: nn.Module, input_size: Sequence[int], point: str) -> StudentTap:
    images = random_images(student, input_size)
    if point == 'pre_logits' and is_headless(student):
        raise NoTap('the model has no classifier')
    if not has_head(student):
        if point != 'pre_logits':
            raise NoTap('the model has no forward_features() and forward_head()')
        return _measure_inside(student, images)
    if point != 'pre_logits' and drops_positions(student, images):
        raise NoTap('the student drops positions in training (patch_drop_rate), and those left are not told apart')
    raw = student.forward_features(images)
    if point == 'side':
        layout = resolve_feature_layout(student, input_size)
        feature = last_stage_feature(raw, student)
        return StudentTap(point, (TapSite(_last_index(raw), layout, tuple(feature.shape[1:])),))
    if point == 'features':
        layouts = _feature_layouts(student, raw, images)
        tap = StudentTap(point, measure_sites(student, Head(student, point), raw, layouts))
        _check_shared_weights(student, images, tap)
        return tap
    if not classifier_reads_pre_logits(student, raw) or _drops_in_between(student, raw):
        return _measure_inside(student, images)
    pre_logits = student.forward_head(raw, pre_logits=True)
    try:
        tap = StudentTap(point, measure_sites(student, Head(student, point), pre_logits, _vector_layouts(pre_logits)))
        _check_shared_weights(student, images, tap)
        return replace(tap, dropout=find_dropout_of(lambda: student.forward_head(raw, pre_logits=True)))
    except NoTap:  # something other than a linear layer comes first in the classifier
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
        raise NoTap(f'forward_features() returns {type(raw).__name__} of other things than tensors')
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


def _measure_inside(student: nn.Module, images: torch.Tensor) -> StudentTap:
    """Tap the input of a classifier that only the model's own forward reaches."""
    name = _linear_classifier(student, images)
    with inputs_of([student.get_submodule(name)]) as (inputs,):
        student(images)
    if len(inputs) != 1 or inputs[0].ndim not in (2, 3):
        raise NoTap(f'the classifier {name} is not run once on vectors or tokens')
    layout = _vector_layouts(inputs[0])[0][0]
    site = TapSite(None, layout, tuple(inputs[0].shape[1:]), (Consumer(name),))
    try:
        error = _inside_error(student, images, site)
    except CANNOT_RUN as e:
        raise NoTap(f'the classifier {name} cannot be measured: {" ".join(str(e).split())[:200]}') from e
    if not error < TAP_TOLERANCE:
        raise NoTap(f'an affine map does not fold into the classifier {name} (measured error {error:.1e})')
    dropout = find_dropout_before(student.get_submodule(name), lambda: student(images))
    return StudentTap('pre_logits', (replace(site, error=error),), inside=name, dropout=dropout)


def _linear_classifier(student: nn.Module, images: torch.Tensor) -> str:
    """Return the name of the one linear layer that gives the logits.

    Raises:
        NoTap: If there is none.
    """
    classifier = classifier_linear(student) or last_linear(student, images)
    if not isinstance(classifier, nn.Linear) or classifier.bias is None:
        raise NoTap('the classifier is not a linear layer with bias')
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
    return logit_error(logits_of(model(images)), unmerged, unmapped)


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
    affine = random_affine(site.layout.channels, site.offset)
    return model, images.double(), AffineMap(affine.weight.to(images.device), affine.bias.to(images.device))


def _check_shared_weights(student: nn.Module, images: torch.Tensor, tap: StudentTap) -> None:
    """Measure that the map folds where a consumer's tensors have other names, which other layers may read, too.

    Raises:
        NoTap: If it does not.
    """
    shared = shared_names(student)
    for site in tap.sites:
        names = [
            name for c in site.consumers for layer in (c.linear, c.pre_norm, c.post_norm) if layer
            for name in shared if name.startswith(f'{layer}.')]
        if names and not (error := _whole_error(student, images, tap, site)) < TAP_TOLERANCE:
            raise NoTap(
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
    return logit_error(logits_of(model(images)), unmerged, unmapped)
