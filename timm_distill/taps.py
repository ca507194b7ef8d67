"""Where things are in a timm model: the last-stage feature, the pre-logits, and where an adapter folds away.

Nothing is looked up by architecture name. A tap is found by structure (which layers the head runs, in which order) and
then measured: a random affine map is put in front of the head and folded into the layer(s) found, with the head's
parameters randomised, and both logits are compared in float64. What does not agree is not used.
"""
import logging
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import UsageError
from .layouts import FeatureLayout, candidate_layouts
from .linalg import AffineMap, batch_norm_affine, compose, fold_into_weight, to_float64

_logger = logging.getLogger(__name__)

TAP_POINTS = ('features', 'pre_logits')
_CANNOT_RUN = (RuntimeError, TypeError, AttributeError, NotImplementedError, IndexError, AssertionError)
TAP_TOLERANCE = 1e-9  # relative to the logits' spread, in float64


@dataclass
class Features:
    """What one forward of a model gives to the methods.

    Attributes:
        logits: [B, K].
        feature: Last-stage feature as a map, [B, C, H, W]; a vector as [B, C, 1, 1].
        pre_logits: The classifier's input, [B, D].
        tap: Teacher's counterpart of the student's insertion point, [B, C, H, W] or [B, D, 1, 1].
        expanded: Adapter's expanded feature as a map (student only), [B, N * Ct, H, W].
        segments: N, the number of segments in `expanded`.
    """
    logits: Optional[torch.Tensor] = None
    feature: Optional[torch.Tensor] = None
    pre_logits: Optional[torch.Tensor] = None
    tap: Optional[torch.Tensor] = None
    expanded: Optional[torch.Tensor] = None
    segments: int = 0


@dataclass(frozen=True)
class Consumer:
    """A linear layer that an affine map of the tapped feature folds into.

    Attributes:
        linear: Name of the layer in the model.
        pre_norm: Name of a batch norm between tap and layer: it folds into the layer too and becomes the identity.
        post_norm: Name of a batch norm behind a layer without bias: its running mean takes the offset.
    """
    linear: str
    pre_norm: Optional[str] = None
    post_norm: Optional[str] = None

    def __str__(self) -> str:
        before = f'{self.pre_norm} + ' if self.pre_norm else ''
        after = f' (offset in {self.post_norm})' if self.post_norm else ''
        return f'{before}{self.linear}{after}'


@dataclass(frozen=True)
class StudentTap:
    """A measured insertion point.

    Attributes:
        point: 'features' (output of `forward_features`) or 'pre_logits' (input of the classifier).
        layout: Layout of the tapped feature.
        consumers: Layers that the adapter folds into.
        error: Largest logit difference measured, relative to the logits' spread.
        shape: Shape of the tapped feature for one image, without the batch dimension.
        rejected: Why the points tried before do not fit.
    """
    point: str
    layout: FeatureLayout
    consumers: Tuple[Consumer, ...]
    error: float
    shape: Tuple[int, ...]
    rejected: str = ''

    def __str__(self) -> str:
        consumers = ', '.join(str(c) for c in self.consumers)
        rejected = f' ({self.rejected})' if self.rejected else ''
        return (f'{self.point} {list(self.shape)} {self.layout.fmt}, folds into {consumers}, '
                f'measured error {self.error:.1e}{rejected}')


class _NoTap(Exception):
    """An insertion point does not fit; the message says why."""


def resolve_student_tap(student: nn.Module, input_size: Sequence[int], point: str = 'auto') -> StudentTap:
    """Find where an adapter can sit in a student and measure that it folds away.

    Args:
        student: timm model with a classifier. Not changed, and neither is the global random state.
        input_size: Input as (channels, height, width).
        point: 'auto' tries `TAP_POINTS` in order; the name of one forces it.

    Raises:
        UsageError: If no point fits, with the reason for each.
    """
    if point != 'auto' and point not in TAP_POINTS:
        raise UsageError(f"Unknown tap '{point}'. --kd-tap takes: auto, {', '.join(TAP_POINTS)}.")
    rejected: List[str] = []
    with evaluation_mode(student):
        for candidate in TAP_POINTS if point == 'auto' else (point,):
            try:
                tap = _measure_point(student, input_size, candidate)
            except _NoTap as e:
                rejected.append(f'not at {candidate}: {e}')
                continue
            return replace(tap, rejected='; '.join(rejected))
    raise UsageError(f'No adapter fits the student {type(student).__name__}: {"; ".join(rejected)}. '
                     'Choose another --student, or a --kd method without an adapter.')


def resolve_feature_layout(model: nn.Module, input_size: Sequence[int]) -> FeatureLayout:
    """Return the layout of the last-stage feature (output of `forward_features`) of a model.

    Raises:
        UsageError: If the feature is not one tensor of 2 to 4 dimensions.
    """
    with evaluation_mode(model):
        feature = last_stage_feature(model, random_images(model, input_size))
    layouts = candidate_layouts(model, feature, input_size[1] / input_size[2])
    if not layouts:
        raise UsageError(f'{type(model).__name__} gives a last-stage feature of shape {list(feature.shape)}; '
                         'a map [B, C, H, W], tokens [B, L, C] or a vector [B, C] is needed.')
    return layouts[0]


def last_stage_feature(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the output of `forward_features` as the model lays it out.

    Raises:
        UsageError: If the model has no such method, or it does not return one tensor.
    """
    if not hasattr(model, 'forward_features'):
        raise UsageError(f'{type(model).__name__} has no forward_features(), so its last stage cannot be read.')
    feature = model.forward_features(images)
    if not isinstance(feature, torch.Tensor):
        raise UsageError(f'{type(model).__name__}.forward_features() returns {type(feature).__name__}, not one tensor.')
    return feature


def classifier_reads_pre_logits(model: nn.Module, feature: torch.Tensor) -> bool:
    """Measure whether `get_classifier()` maps `forward_head(f, pre_logits=True)` to `forward_head(f)`.

    Args:
        model: Model in eval mode.
        feature: Output of its `forward_features`.
    """
    classifier = model.get_classifier() if hasattr(model, 'get_classifier') else None
    if not isinstance(classifier, nn.Module) or not hasattr(model, 'forward_head'):
        return False
    heads = {point: _Head(model, point) for point in ('features', 'to_pre_logits', 'pre_logits')}
    tensors = _random_tensors(model, _trace(heads['features'], feature))
    probe = torch.randn(feature.shape, generator=_generator(), dtype=torch.float64)
    try:
        expected = _call_head(heads['features'], tensors, probe)
        logits = _call_head(heads['pre_logits'], tensors, _call_head(heads['to_pre_logits'], tensors, probe))
    except _CANNOT_RUN:
        return False
    return logits.shape == expected.shape and torch.allclose(logits, expected, rtol=TAP_TOLERANCE, atol=TAP_TOLERANCE)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run without gradients and with every module in eval mode; restore each module's own mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def random_images(model: nn.Module, input_size: Sequence[int], batch_size: int = 2) -> torch.Tensor:
    """Return normalised noise, [batch_size, *input_size], on the model's device and in its dtype."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    images = torch.randn(batch_size, *input_size, generator=_generator())
    return images.to(parameter.device, parameter.dtype)


def fold_affine(
        model: nn.Module,
        tensors: Mapping[str, torch.Tensor],
        consumers: Sequence[Consumer],
        affine: AffineMap,
) -> Dict[str, torch.Tensor]:
    """Fold an affine map in front of the consumers into them.

    Args:
        model: Model that the names belong to; only its structure is read.
        tensors: The model's parameters and buffers by name.
        consumers: Layers that read the mapped feature.
        affine: Map of the feature's channels, float64.

    Returns:
        The changed tensors by name, in float64; every other tensor stays as it is.
    """
    changed: Dict[str, torch.Tensor] = {}
    for consumer in consumers:
        inner = affine
        if consumer.pre_norm:
            inner = compose(_norm_as_map(model, tensors, consumer.pre_norm), affine)
            changed.update(_identity_norm(model, tensors, consumer.pre_norm))
        weight, offset = fold_into_weight(tensors[f'{consumer.linear}.weight'], inner)
        changed[f'{consumer.linear}.weight'] = weight
        if consumer.post_norm:
            mean = f'{consumer.post_norm}.running_mean'
            changed[mean] = to_float64(tensors[mean]) - offset
        else:
            changed[f'{consumer.linear}.bias'] = to_float64(tensors[f'{consumer.linear}.bias']) + offset
    return changed


def _norm_as_map(model: nn.Module, tensors: Mapping[str, torch.Tensor], name: str) -> AffineMap:
    scale, shift = batch_norm_affine(
        tensors[f'{name}.running_mean'],
        tensors[f'{name}.running_var'],
        tensors.get(f'{name}.weight'),
        tensors.get(f'{name}.bias'),
        _batch_norm(model, name).eps,
    )
    return AffineMap(torch.diag(scale), shift)


def _identity_norm(model: nn.Module, tensors: Mapping[str, torch.Tensor], name: str) -> Dict[str, torch.Tensor]:
    values = {'running_mean': 0., 'running_var': 1. - _batch_norm(model, name).eps, 'weight': 1., 'bias': 0.}
    return {
        f'{name}.{key}': torch.full_like(to_float64(tensors[f'{name}.{key}']), value)
        for key, value in values.items() if f'{name}.{key}' in tensors
    }


def _batch_norm(model: nn.Module, name: str) -> _BatchNorm:
    module = model.get_submodule(name)
    assert isinstance(module, _BatchNorm)
    return module


class _Head(nn.Module):
    """The part of a model behind a tap, as a module for `functional_call`."""

    def __init__(self, model: nn.Module, point: str):
        super().__init__()
        self.model = model
        self.point = point

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        if self.point == 'pre_logits':
            return self.model.get_classifier()(feature)
        return self.model.forward_head(feature, pre_logits=self.point == 'to_pre_logits')


@dataclass(frozen=True)
class _Call:
    """One module that the head ran, in order of execution."""
    name: str
    module: nn.Module


def _measure_point(student: nn.Module, input_size: Sequence[int], point: str) -> StudentTap:
    feature = _tapped_feature(student, input_size, point)
    head = _Head(student, point)
    calls = _trace(head, feature)
    tensors = _random_tensors(student, calls)
    probe = torch.randn(feature.shape, generator=_generator(), dtype=torch.float64)
    aspect = input_size[1] / input_size[2] if point == 'features' else 1.
    best = float('inf')
    for layout in candidate_layouts(student, feature, aspect):
        for consumers in _candidate_consumers(calls, layout.channels):
            error = _fold_error(head, tensors, layout, consumers, probe)
            if error < TAP_TOLERANCE:
                return StudentTap(point, layout, consumers, error, tuple(feature.shape[1:]))
            best = min(best, error)
    if best == float('inf'):
        raise _NoTap('no linear layer that can take the map reads this feature')
    raise _NoTap(f'an affine map does not fold into the next linear layer (measured error {best:.1e})')


def _tapped_feature(student: nn.Module, input_size: Sequence[int], point: str) -> torch.Tensor:
    if not hasattr(student, 'forward_features') or not hasattr(student, 'forward_head'):
        raise _NoTap('the model has no forward_features() and forward_head()')
    feature = student.forward_features(random_images(student, input_size))
    if point == 'features':
        if not isinstance(feature, torch.Tensor):
            raise _NoTap(f'forward_features() returns {type(feature).__name__}, not one tensor')
        return feature
    if not classifier_reads_pre_logits(student, feature):
        raise _NoTap('the classifier does not read what forward_head(pre_logits=True) returns')
    return student.forward_head(feature, pre_logits=True)


def _trace(head: _Head, feature: torch.Tensor) -> List[_Call]:
    """Run the head once and list the modules it ran, in order."""
    calls: List[_Call] = []

    def _record(name: str) -> Any:
        return lambda module, args: calls.append(_Call(name, module))

    handles = [m.register_forward_pre_hook(_record(name)) for name, m in head.model.named_modules() if name]
    try:
        head(feature)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _random_tensors(model: nn.Module, calls: Sequence[_Call]) -> Dict[str, torch.Tensor]:
    """Return random float64 values of all tensors that the head reads.

    At initialisation a norm is the identity and some classifiers are zero, which would hide what does not fold.
    """
    generator = _generator()
    tensors: Dict[str, torch.Tensor] = {}
    for name, module in [('', model), *((call.name, call.module) for call in calls)]:
        prefix = f'{name}.' if name else ''
        for key, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not value.is_floating_point():
                continue
            random = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if key == 'running_var':
                random = 0.5 + random.abs()
            tensors[prefix + key] = random / max(random[0].numel(), 1) ** 0.5 if value.ndim > 1 else random
    return tensors


def _candidate_consumers(calls: Sequence[_Call], channels: int) -> Iterator[Tuple[Consumer, ...]]:
    """Yield sets of layers that may read the tapped feature: the first linear layer, then all of its input width."""
    positions = [i for i, call in enumerate(calls) if _reads(call.module, channels)]
    groups = [positions[:1]] + ([positions] if len(positions) > 1 else [])
    for group in groups if positions else []:
        for with_pre_norm in (False, True):
            consumers = [_create_consumer(calls, i, channels, with_pre_norm) for i in group]
            if all(consumers):
                yield tuple(c for c in consumers if c)


def _reads(module: nn.Module, channels: int) -> bool:
    if isinstance(module, nn.Linear):
        return module.in_features == channels
    return isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.in_channels == channels and module.groups == 1


def _create_consumer(calls: Sequence[_Call], index: int, channels: int, with_pre_norm: bool) -> Optional[Consumer]:
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


def _nearest_norm(calls: Iterator[_Call], channels: int) -> Optional[str]:
    for call in calls:
        if isinstance(call.module, _BatchNorm) and call.module.running_mean is not None:
            return call.name if call.module.num_features == channels else None
    return None


def _fold_error(
        head: _Head,
        tensors: Dict[str, torch.Tensor],
        layout: FeatureLayout,
        consumers: Sequence[Consumer],
        probe: torch.Tensor,
) -> float:
    """Return the largest logit difference between a random map in front of the head and the map folded into it."""
    affine = _random_affine(layout.channels)
    mapped = layout.from_positions(affine(layout.to_positions(probe)))
    folded = fold_affine(head.model, tensors, consumers, affine)
    try:
        unmerged = _call_head(head, tensors, mapped)
        merged = _call_head(head, {**tensors, **folded}, probe)
    except _CANNOT_RUN as e:
        _logger.debug(f'{consumers} cannot be measured: {e}')
        return float('inf')
    spread = (unmerged - unmerged.mean()).abs().max()
    if not spread.item() > 0:  # logits that do not depend on anything would agree with everything
        return float('inf')
    return ((merged - unmerged).abs().max() / spread).item()


def _call_head(head: _Head, tensors: Mapping[str, torch.Tensor], feature: torch.Tensor) -> torch.Tensor:
    logits = functional_call(head, {f'model.{name}': value for name, value in tensors.items()}, (feature,))
    return logits[0] if isinstance(logits, (tuple, list)) else logits


def _random_affine(channels: int) -> AffineMap:
    generator = _generator()
    weight = torch.randn(channels, channels, generator=generator, dtype=torch.float64) / channels ** 0.5
    return AffineMap(weight, torch.randn(channels, generator=generator, dtype=torch.float64))


def _generator() -> torch.Generator:
    """Return a private random generator, so that building a tap does not move the run's random state."""
    return torch.Generator().manual_seed(0)
