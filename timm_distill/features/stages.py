"""Stages of a timm model: its last feature and those before it, measured on a forward of random images."""
import inspect
import logging
from dataclasses import dataclass, replace
from typing import Callable, Dict, List, MutableMapping, Optional, Sequence, Tuple, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn

from ..errors import UsageError
from .grids import candidate_layouts, patch_grid
from .inputs import CANNOT_RUN, RawFeature, evaluation_mode, logits_of, random_images
from .layouts import FeatureLayout, GridSize, layout_of_map
from .spec import Stage

_logger = logging.getLogger(__name__)

# Grids of models whose patch embedding does not tell them, by input size and tensor.
_MEASURED_GRIDS: MutableMapping[nn.Module, Dict[Tuple[GridSize, Optional[int]], Optional[GridSize]]] = (
    WeakKeyDictionary())


def has_head(model: nn.Module) -> bool:
    """Whether a model splits into `forward_features` and `forward_head` as timm's do."""
    return hasattr(model, 'forward_features') and hasattr(model, 'forward_head')


def classes_of(logits: torch.Tensor, pre_logits: Optional[torch.Tensor] = None) -> int:
    """Return K of logits [B, K]; 0 where they are no vector per image, or nothing but the pre-logits."""
    if logits.ndim != 2:
        return 0
    if pre_logits is not None and torch.equal(pre_logits.flatten(1), logits):
        return 0
    return logits.shape[1]


def count_classes(model: nn.Module, input_size: Sequence[int]) -> int:
    """Return the classes of a model as its logits have them, whatever it says of itself; 0 without a classifier.

    Args:
        model: timm model or any other that gives logits, [B, K], or several of them first.
        input_size: Input that it runs on, (channels, height, width).
    """
    with evaluation_mode(model):
        images = random_images(model, input_size)
        logits = logits_of(model(images))
        try:
            pre_logits = model.forward_head(model.forward_features(images), pre_logits=True)
        except CANNOT_RUN:
            pre_logits = None
    return classes_of(logits, pre_logits)


def drops_positions(model: nn.Module, images: torch.Tensor) -> bool:
    """Measure whether a model's feature has other positions in training, as with `patch_drop_rate`.

    Modules with buffers stay in eval mode, so that no statistics move, and so does the random state.
    """
    devices = [images.device] if images.is_cuda else []
    with evaluation_mode(model), torch.random.fork_rng(devices=devices):
        expected = _shapes(model.forward_features(images))
        for module in model.modules():
            module.training = not any(True for _ in module.buffers(recurse=False))
        try:
            return _shapes(model.forward_features(images)) != expected
        except CANNOT_RUN as e:
            _logger.debug(f'{type(model).__name__} does not run without its statistics: {e}')
            return False


def _shapes(raw: RawFeature) -> List[torch.Size]:
    return [raw.shape] if isinstance(raw, torch.Tensor) else [shape for part in raw for shape in _shapes(part)]


def last_stage_feature(raw: RawFeature, model: nn.Module) -> torch.Tensor:
    """Return the tensor of the last stage of what `forward_features` returned: the last, where there are several.

    Raises:
        UsageError: If there is none.
    """
    feature = raw
    while isinstance(feature, (list, tuple)) and feature:
        feature = feature[-1]
    if not isinstance(feature, torch.Tensor):
        raise UsageError(f'{type(model).__name__}.forward_features() returns {type(raw).__name__} without tensors.')
    return feature


def resolve_feature_layout(model: nn.Module, input_size: Sequence[int]) -> FeatureLayout:
    """Return the layout of the last-stage feature of a model.

    Where shapes and attributes leave a doubt, the map that `forward_intermediates` gives decides.

    Raises:
        UsageError: If the feature is not a tensor of 2 to 4 dimensions.
    """
    with evaluation_mode(model):
        images = random_images(model, input_size)
        feature = last_stage_feature(model.forward_features(images), model)
        maps = [] if feature.ndim == 2 else intermediate_maps(model, images)
        layouts = candidate_layouts(model, feature, (input_size[1], input_size[2]), maps)
    if not layouts:
        raise UsageError(
            f'{type(model).__name__} gives a last-stage feature of shape {list(feature.shape)}; '
            'a map [B, C, H, W], tokens [B, L, C] or a vector [B, C] is needed.')
    if len(layouts) > 1 and feature.shape[layouts[0].channel_dim] != getattr(model, 'num_features', None):
        return layout_of_map(layouts, feature, maps[-1] if maps else None)
    return layouts[0]


def intermediate_maps(model: nn.Module, images: torch.Tensor) -> List[torch.Tensor]:
    """Return the intermediate features that a model gives as maps, [B, C, H, W], shallow to deep; [] for none."""
    if not hasattr(model, 'forward_intermediates'):
        return []
    try:
        maps = model.forward_intermediates(images, output_fmt='NCHW', intermediates_only=True)
    except CANNOT_RUN as e:
        _logger.debug(f'{type(model).__name__} gives no intermediate features: {e}')
        return []
    return [map_ for map_ in maps if isinstance(map_, torch.Tensor) and map_.ndim == 4]


def layout_for(
        model: nn.Module,
        layout: FeatureLayout,
        images: torch.Tensor,
        index: Optional[int] = None,
) -> FeatureLayout:
    """Return a layout of tokens with the grid that the model gives these very images; others as they are.

    Args:
        model: timm model that the layout was found for.
        layout: Layout of its last-stage feature, or of the tensor `index` of what `forward_features` returns.
        images: What the model is run on, [B, C, H, W].
        index: Which tensor, None for the last-stage feature.
    """
    if not layout.has_tokens or tuple(images.shape[-2:]) == layout.input_size:
        return layout
    return _layout_at(model, layout, (int(images.shape[1]), int(images.shape[2]), int(images.shape[3])), index)


@torch.compiler.disable
def _layout_at(
        model: nn.Module,
        layout: FeatureLayout,
        input_size: Tuple[int, int, int],
        index: Optional[int],
) -> FeatureLayout:
    assert layout.input_size is not None
    size = input_size[1], input_size[2]
    if layout.grid is not None and patch_grid(model, layout.input_size) == layout.grid:
        return replace(layout, grid=patch_grid(model, size), input_size=size)
    known = _MEASURED_GRIDS.setdefault(model, {})
    if (size, index) not in known:
        known[size, index] = _measure_grid(model, layout, input_size, index)
    return replace(layout, grid=known[size, index], input_size=size)


def _measure_grid(
        model: nn.Module,
        layout: FeatureLayout,
        input_size: Tuple[int, int, int],
        index: Optional[int],
) -> Optional[GridSize]:
    """Return the grid at another input size, from a forward of random images in eval mode."""
    with evaluation_mode(model):
        images = random_images(model, input_size)
        raw = model.forward_features(images)
        feature = last_stage_feature(raw, model) if index is None else raw[index]
        layouts = candidate_layouts(model, feature, input_size[1:], intermediate_maps(model, images))
    found = [found for found in layouts if found.fmt == layout.fmt]
    agrees = bool(found) and found[0].num_prefix_tokens == layout.num_prefix_tokens
    return found[0].grid if agrees else None


def resolve_stages(model: nn.Module, input_size: Sequence[int]) -> Tuple[Stage, ...]:
    """Return the deepest intermediate feature of every grid size, shallow to deep; none where the model has none.

    Of a model whose grid never changes (ViT), the last feature of every quarter of its depth.
    """
    if not hasattr(model, 'forward_intermediates'):
        return ()
    with evaluation_mode(model):
        try:
            maps = model.forward_intermediates(
                random_images(model, input_size), output_fmt='NCHW', intermediates_only=True)
        except CANNOT_RUN as e:
            _logger.debug(f'{type(model).__name__} gives no intermediate features: {e}')
            return ()
    stages = [
        Stage(index, cast(Tuple[int, int, int], tuple(feature.shape[1:])), _is_nonnegative(feature))
        for index, feature in enumerate(maps) if isinstance(feature, torch.Tensor) and feature.ndim == 4]
    deepest = {stage.shape[1:]: stage for stage in stages}
    if len(deepest) == 1:
        quarters = {len(stages) * (i + 1) // 4 - 1 for i in range(4)} - {-1}
        return tuple(stages[i] for i in sorted(quarters))
    return tuple(sorted(deepest.values(), key=lambda stage: stage.index))


def _is_nonnegative(feature: torch.Tensor) -> bool:
    return not feature.is_meta and bool((feature >= 0).all())  # a tensor on the meta device has no values


def forward_with_stages(
        model: nn.Module,
        images: torch.Tensor,
        stages: Sequence[Stage],
) -> Tuple[RawFeature, Tuple[torch.Tensor, ...]]:
    """Run a model's trunk once; return what `forward_features` would and the maps of the stages, [B, C, H, W]."""
    indices = [stage.index for stage in stages]
    raw, maps = model.forward_intermediates(images, indices=indices, output_fmt='NCHW')
    return raw, tuple(maps)


@dataclass(frozen=True)
class Intermediates:
    """Features inside of a trunk, of one run.

    Attributes:
        raw: What `forward_features` would return.
        stages: Maps of the stages asked for, [B, C, H, W] each.
        blocks: Maps of the blocks asked for, likewise.
        prefix: Class and register tokens at the stage asked for, [B, L, C].
    """
    raw: RawFeature
    stages: Tuple[torch.Tensor, ...] = ()
    blocks: Tuple[torch.Tensor, ...] = ()
    prefix: Optional[torch.Tensor] = None


def read_intermediates(
        model: nn.Module,
        images: torch.Tensor,
        stages: Sequence[Stage] = (),
        blocks: Sequence[Stage] = (),
        prefix_of: Optional[Stage] = None,
) -> Intermediates:
    """Run a model's trunk once and read stages, blocks that may be among them, and the prefix tokens of a stage.

    Raises:
        ValueError: If the model does not give its prefix tokens.
    """
    wanted = sorted({stage.index for stage in (*stages, *blocks, *([prefix_of] if prefix_of else ()))})
    kwargs = {}
    if prefix_of is not None:
        if 'return_prefix_tokens' not in inspect.signature(cast(Callable, model.forward_intermediates)).parameters:
            raise ValueError('its forward_intermediates does not give the class tokens that stand before the stage')
        kwargs['return_prefix_tokens'] = True
    raw, found = model.forward_intermediates(images, indices=wanted, output_fmt='NCHW', **kwargs)
    maps = dict(zip(wanted, (each[0] for each in found) if kwargs else found))
    return Intermediates(
        raw,
        tuple(maps[stage.index] for stage in stages),
        tuple(maps[block.index] for block in blocks),
        found[wanted.index(prefix_of.index)][1] if prefix_of is not None else None)


def stages_share_trunk(model: nn.Module, images: torch.Tensor, stages: Sequence[Stage]) -> bool:
    """Measure whether `forward_with_stages` ends with what `forward_features` returns, so that one run serves both."""
    raw, _ = forward_with_stages(model, images, stages)
    expected = model.forward_features(images)
    return isinstance(raw, torch.Tensor) and raw.shape == getattr(expected, 'shape', None) and bool(
        torch.allclose(raw, expected, rtol=1e-4, atol=1e-5))
