"""Tail of a timm model: what follows one of its stages, as a function of that stage's map.

The model's own `forward_features` runs on copies of the modules before the stage that compute nothing: the last of them
gives the map, the others what they gave for other images. Whether that is the model's last feature is measured. A tail
holds names, shapes and constants, never modules: it serves every copy of its model.
"""
import copy
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

import torch
import torch.nn as nn

from ..utils._compat import count_writes, tree_flatten, tree_leaves, tree_unflatten
from .inputs import CANNOT_RUN, evaluation_mode, private_generator, random_images
from .layouts import FeatureLayout
from .replay import Call, TensorTemplate, create_template, replace_modules, trace_calls
from .spec import Stage
from .stages import forward_with_stages, last_stage_feature, read_intermediates
from .tracing import output_error

TAIL_TOLERANCE = 1e-6  # relative to the spread of the model's last feature
_ROUNDING = 0.05  # differences below may be rounding: of random weights, or in low precision
_TRIES = 8  # places where the stage's map stands, outermost modules first


@dataclass(frozen=True)
class StageTensor:
    """Leaf of a module's output that the stage's tensor takes the place of; modules give None, too."""


@dataclass(frozen=True)
class Tail:
    """Function of a stage's map that a model's last layers are.

    Attributes:
        stage: The stage.
        layout: Layout of the stage where the model computes it, its prefix tokens included.
        output_layout: Layout of the model's last feature.
        input_size: What the model is fed, (channels, height, width).
        name: The module that gives the stage's tensor.
        skipped: What the modules up to it give, by name: for each of a module's first calls its leaves and their
            structure. A StageTensor stands for the stage's own.
    """
    stage: Stage
    layout: FeatureLayout
    output_layout: FeatureLayout
    input_size: Tuple[int, int, int]
    name: str
    skipped: Dict[str, Tuple[Tuple[Tuple[Any, ...], Any], ...]] = field(repr=False)

    @property
    def prefix_of(self) -> Optional[Stage]:
        """The stage, where class and register tokens stand in front of its own; else None."""
        return self.stage if self.layout.num_prefix_tokens else None

    def run(self, model: nn.Module, x: torch.Tensor, prefix: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Return the model's last feature, [B, C', H', W'], for a map in the place of the stage's.

        Args:
            model: The model, or a copy of it.
            x: Map [B, C, H, W] of the stage's shape.
            prefix: The model's own class and register tokens at this stage, [B, L, C], where it has some.
        """
        outputs = {
            name: [self._create(call, x, prefix) for call in calls] for name, calls in self.skipped.items()}
        images = torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape[0], *self.input_size)
        raw = replace_modules(model, outputs).forward_features(images)
        feature = last_stage_feature(raw, model)
        return self.output_layout.to_map(self.output_layout.to_positions(feature))

    def _create(self, call: Tuple[Tuple[Any, ...], Any], x: torch.Tensor, prefix: Optional[torch.Tensor]) -> Any:
        leaves, structure = call
        created = [
            self._put_back(x, prefix) if isinstance(leaf, StageTensor)
            else leaf.create(x.shape[0], x) if isinstance(leaf, TensorTemplate) else leaf for leaf in leaves]
        return tree_unflatten(created, structure)

    def _put_back(self, x: torch.Tensor, prefix: Optional[torch.Tensor]) -> torch.Tensor:
        positions = self.layout.from_map(x)
        if prefix is not None and self.prefix_of is not None:
            positions = torch.cat([prefix.transpose(1, 2).unsqueeze(-1).to(x.dtype), positions], 2)
        # layers that write to their input shall not write to the caller's
        return self.layout.from_positions(positions).clone(memory_format=torch.contiguous_format)


def find_tail(
        model: nn.Module,
        stage: Stage,
        output_layout: FeatureLayout,
        input_size: Sequence[int],
) -> Tuple[Optional[Tail], str]:
    """Find what follows a stage, and measure that it gives the model's last feature for the stage's own map.

    Args:
        model: timm model with `forward_intermediates`, frozen.
        stage: One of its stages.
        output_layout: Layout of its last feature.
        input_size: What it is fed, (channels, height, width).

    Returns:
        The tail; or None and the reason.
    """
    size = (int(input_size[0]), int(input_size[1]), int(input_size[2]))
    with evaluation_mode(model):
        try:
            probes = [_Probe(model, stage, output_layout, _probe_images(model, size, count)) for count in (2, 3)]
            return _first_measured(model, stage, output_layout, size, probes)
        except CANNOT_RUN as e:
            return None, f'it does not run in parts: {" ".join(str(e).split())[:200] or type(e).__name__}'


def _probe_images(model: nn.Module, input_size: Tuple[int, int, int], batch_size: int) -> torch.Tensor:
    """Return images of which none is in a batch of another size."""
    like = random_images(model, input_size, 1)
    generator = private_generator().manual_seed(batch_size)
    return torch.randn(batch_size, *input_size, generator=generator).to(like.device, like.dtype)


class _Probe:
    """One batch through a model: its calls, the stage's map and prefix tokens, its last feature."""

    def __init__(self, model: nn.Module, stage: Stage, layout: FeatureLayout, images: torch.Tensor):
        self.images = images
        _, (self.map,) = forward_with_stages(model, images, [stage])
        self.calls, raw = trace_calls(model, lambda: model.forward_features(images))
        self.feature = layout.to_map(layout.to_positions(last_stage_feature(raw, model)))
        self.reached = _names_before(model, images, stage)


def _names_before(model: nn.Module, images: torch.Tensor, stage: Stage) -> Set[str]:
    """Return which modules run for a stage alone; none for a model that cannot stop there."""
    try:
        calls, _ = trace_calls(model, lambda: model.forward_intermediates(
            images, indices=[stage.index], output_fmt='NCHW', intermediates_only=True, stop_early=True))
    except CANNOT_RUN:
        return set()
    return {call.name for call in calls}


def _first_measured(
        model: nn.Module,
        stage: Stage,
        output_layout: FeatureLayout,
        input_size: Tuple[int, int, int],
        probes: Sequence[_Probe],
) -> Tuple[Optional[Tail], str]:
    first, other = probes
    if [call.name for call in first.calls] != [call.name for call in other.calls]:
        return None, 'it runs other modules for other images'
    reasons = []
    for index, leaf, layout in _places(first)[:_TRIES]:
        try:
            skipped = _skip(first.calls, other.calls, index, leaf)
            tail = Tail(stage, layout, output_layout, input_size, first.calls[index].name, skipped)
            reasons.append(_measure(model, tail, first))
        except ValueError as e:
            reasons.append(str(e))
            continue
        if not reasons[-1]:
            return tail, ''
    return None, (reasons or ['none of its modules gives the stage as its forward_intermediates does'])[0]


def _measure(model: nn.Module, tail: Tail, probe: _Probe) -> str:
    """Return why a tail is not what follows the stage, '' where it is, gradients included.

    Where the difference may be one of rounding, a copy of the model in float64 decides.

    Raises:
        ValueError: If the model does not give the tokens in front of the stage's.
    """
    with_prefix = tail.prefix_of is not None
    prefix = read_intermediates(model, probe.images, prefix_of=tail.stage).prefix if with_prefix else None
    x = probe.map.detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            actual = tail.run(model, x, prefix)
            (gradient,) = torch.autograd.grad(actual.float().square().mean(), [x])
    except CANNOT_RUN as e:
        return f'what follows the stage does not run alone: {" ".join(str(e).split())[:200] or type(e).__name__}'
    error = output_error([actual.detach().double()], [probe.feature.double()])
    if TAIL_TOLERANCE < error < _ROUNDING and x.dtype != torch.float64:
        exact = copy.deepcopy(model).double()
        return _measure(exact, tail, _Probe(exact, tail.stage, tail.output_layout, probe.images.double()))
    if not error <= TAIL_TOLERANCE:
        return f'its last feature depends on more than the stage (without that it is off by {error:.2g} of its spread)'
    finite = bool(torch.isfinite(gradient).all())
    return '' if finite else 'no finite gradient comes back through what follows the stage'


def _places(probe: _Probe) -> List[Tuple[int, int, FeatureLayout]]:
    """Return where the stage's map is computed: calls, a leaf of each, its layout.

    First comes the last module that runs for the stage alone: at random weights others before it may give the same.
    Behind these stand the others, the earliest first, and of modules inside of one another the outermost.
    """
    found: Dict[int, Tuple[int, FeatureLayout]] = {}
    for index, call in enumerate(probe.calls):
        tensors = [leaf for leaf in tree_leaves(call.output) if isinstance(leaf, torch.Tensor)]
        untouched = dict(zip(map(id, tensors), (count_writes(t) == v for t, v in zip(tensors, call.versions))))
        for leaf, tensor in enumerate(tree_leaves(call.output)):
            layout = _layout_of(tensor, probe.map) if untouched.get(id(tensor)) else None
            if layout is not None:
                found[index] = leaf, layout

    def _rank(index: int) -> Tuple[bool, int, int]:
        call = probe.calls[index]
        if call.name in probe.reached:
            return False, -call.end, 0
        inside = [probe.calls[i].end for i in found if i == index or index in probe.calls[i].ancestors]
        return True, min(inside), len(call.ancestors)

    return [(index, *found[index]) for index in sorted(found, key=_rank)]


def _layout_of(tensor: Any, map_: torch.Tensor) -> Optional[FeatureLayout]:
    """Return the layout in which a module's output is a map, [B, C, H, W], behind its prefix tokens; None if not."""
    if not isinstance(tensor, torch.Tensor) or tensor.ndim not in (3, 4) or tensor.shape[0] != map_.shape[0]:
        return None
    channels, grid = map_.shape[1], (int(map_.shape[2]), int(map_.shape[3]))
    for fmt in ('NCHW', 'NHWC') if tensor.ndim == 4 else ('NLC', 'NCL'):
        layout = FeatureLayout(fmt, channels, grid=grid if tensor.ndim == 3 else None)
        if tensor.shape[layout.channel_dim] != channels:
            continue
        positions = layout.to_positions(tensor)
        prefix = positions.shape[2] - grid[0] * grid[1] if tensor.ndim == 3 else 0
        if prefix < 0 or prefix and fmt == 'NCL':
            continue
        layout = FeatureLayout(fmt, channels, prefix, layout.grid)
        actual = layout.to_map(positions)
        if actual.shape == map_.shape and torch.equal(actual, map_):
            return layout
    return None


def _skip(
        calls: Sequence[Call],
        others: Sequence[Call],
        index: int,
        leaf: int,
) -> Dict[str, Tuple[Tuple[Tuple[Any, ...], Any], ...]]:
    """Return what is given instead of all calls up to one: of that one and of those that are inside no other of them.

    Raises:
        ValueError: If a module runs again afterwards, inside of one that is skipped, or its output has no batch.
    """
    place = calls[index]
    outputs: Dict[str, List[Tuple[Tuple[Any, ...], Any]]] = {}
    for call, other in zip(calls, others):
        is_place = call is place
        if not is_place and (call.end > place.begin or not set(call.ancestors) <= set(place.ancestors)):
            continue
        leaves, structure = tree_flatten(call.output)
        templates = [create_template(*pair) for pair in zip(leaves, tree_leaves(other.output), strict=True)]
        if is_place:
            templates[leaf] = StageTensor()
        outputs.setdefault(call.name, []).append((tuple(templates), structure))
    return {name: tuple(given) for name, given in outputs.items()}


__all__ = ['TAIL_TOLERANCE', 'Tail', 'find_tail']
