"""Grids of a model's tokens over its input, by its patch embedding or its intermediate maps.

A token count alone tells no grid. Where the model tells one, the tokens have to agree with it; only a model that tells
nothing is taken by the aspect of its input.
"""
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from .inputs import CANNOT_RUN
from .layouts import FeatureLayout, GridSize

_MAX_PREFIX_TOKENS = 16
_LIKENESS_TOLERANCE = 1e-3


def candidate_layouts(
        model: nn.Module,
        feature: torch.Tensor,
        input_size: GridSize,
        maps: Optional[Sequence[torch.Tensor]] = None,
) -> List[FeatureLayout]:
    """Return the layouts that a feature of `model` may have, the likeliest first.

    Args:
        model: timm model that the feature comes from.
        feature: Output of its `forward_features`, [B, ...] of 2 to 4 dimensions.
        input_size: Height and width of the input.
        maps: The model's intermediate maps for the same images, [B, C, H, W] each; none for a model without.
    """
    formats = {2: ['NC'], 3: ['NLC', 'NCL'], 4: ['NCHW', 'NHWC']}.get(feature.ndim, [])
    num_features = getattr(model, 'num_features', None)
    declared = str(getattr(model, 'output_fmt', '')).split('.')[-1]

    def _rank(fmt: str) -> Tuple[bool, bool]:
        return fmt != declared, feature.shape[fmt.index('C')] != num_features

    return [
        _token_layout(model, fmt, feature, input_size, maps or ()) if 'L' in fmt
        else FeatureLayout(fmt, feature.shape[fmt.index('C')])
        for fmt in sorted(formats, key=_rank)
    ]


def patch_grid(model: nn.Module, input_size: GridSize) -> Optional[GridSize]:
    """Return the grid (height, width) that a model's patch embedding gives an input, None where none tells one."""
    grids = set()
    for module in model.modules():
        if hasattr(module, 'dynamic_feat_size'):
            try:
                height, width = module.dynamic_feat_size(input_size)
            except CANNOT_RUN:
                return None
            grids.add((int(height), int(width)))
    return grids.pop() if len(grids) == 1 else None


def grid_of_aspect(num_tokens: int, input_size: GridSize) -> Optional[GridSize]:
    """Return the one grid of `num_tokens` that square patches of some size cut the input into, None without one."""
    grids = [
        (height, num_tokens // height) for height in range(1, num_tokens + 1)
        if num_tokens % height == 0 and _has_square_patches((height, num_tokens // height), input_size)
    ]
    return grids[0] if len(grids) == 1 else None


def _has_square_patches(grid: GridSize, input_size: GridSize) -> bool:
    """Whether one patch size gives the grid in both dimensions, both rounded down or both up."""
    down = [(size / (count + 1), size / count) for size, count in zip(input_size, grid)]
    up = [(size / count, size / (count - 1) if count > 1 else float('inf')) for size, count in zip(input_size, grid)]
    return _overlap(down, (False, True)) or _overlap(up, (True, False))


def _overlap(intervals: Sequence[Tuple[float, float]], closed: Tuple[bool, bool]) -> bool:
    """Whether two intervals, closed at their lower or upper end, share a number."""
    (low, high), (other_low, other_high) = intervals
    low, high = max(low, other_low), min(high, other_high)
    return low < high or (low == high and all(closed))


def _token_layout(
        model: nn.Module,
        fmt: str,
        feature: torch.Tensor,
        input_size: GridSize,
        maps: Sequence[torch.Tensor],
) -> FeatureLayout:
    channels, num_tokens = feature.shape[fmt.index('C')], feature.shape[fmt.index('L')]
    tokens = feature if fmt == 'NLC' else feature.transpose(1, 2)
    prefixes = _possible_prefixes(model, channels)
    told = patch_grid(model, input_size)
    if told is None and not maps:
        told_grids = [grid_of_aspect(num_tokens - prefix, input_size) for prefix in prefixes if prefix < num_tokens]
    else:
        told_grids = [told, *(_grid_of(map_, tokens, prefixes) for map_ in reversed(maps))]
    for grid in filter(None, told_grids):
        for prefix in prefixes:
            if num_tokens - prefix == grid[0] * grid[1]:
                return FeatureLayout(fmt, channels, prefix, grid, input_size)
    if num_tokens == 1 or num_tokens in prefixes:
        return FeatureLayout(fmt, channels, input_size=input_size, ordered=False)  # class tokens alone
    return FeatureLayout(fmt, channels, input_size=input_size)


def _possible_prefixes(model: nn.Module, channels: int) -> Tuple[int, ...]:
    """Return how many class and register tokens a model may put in front: as it declares, else as it has."""
    declared = getattr(model, 'num_prefix_tokens', None)
    if isinstance(declared, int):
        return tuple(dict.fromkeys((declared, 0)))
    own = {
        name: parameter.shape for name, parameter in model.named_parameters()
        if 'token' in name and parameter.ndim == 3 and parameter.shape[0] == 1
        and parameter.shape[1] <= _MAX_PREFIX_TOKENS
    }
    together = sum(shape[1] for shape in own.values() if shape[2] == channels)
    return tuple(dict.fromkeys((together, *sorted({shape[1] for shape in own.values()}, reverse=True), 0)))


def _grid_of(map_: torch.Tensor, tokens: torch.Tensor, prefixes: Sequence[int]) -> Optional[GridSize]:
    """Return the grid of a map, [B, C, H, W], whose positions the tokens, [B, L, C], are; None if they are not."""
    count, prefix = map_.shape[2] * map_.shape[3], tokens.shape[1] - map_.shape[2] * map_.shape[3]
    if map_.shape[1] != tokens.shape[2] or prefix not in prefixes:
        return None
    if not map_.is_meta and not _same_order(tokens[:, prefix:], map_.flatten(2).transpose(1, 2)):
        return None
    return int(map_.shape[2]), count // int(map_.shape[2])


def _same_order(tokens: torch.Tensor, positions: torch.Tensor) -> bool:
    """Measure whether each token, [B, L, C], is as like the position of its own index as any, a norm between or not."""
    a, b = (_standardize(x.float()) for x in (tokens, positions))
    likeness = a @ b.transpose(1, 2)  # [B, L, L]
    own = likeness.diagonal(dim1=1, dim2=2) >= likeness.amax(2) - _LIKENESS_TOLERANCE  # new models give equal tokens
    return bool(own.float().mean() > 0.5)


def _standardize(x: torch.Tensor) -> torch.Tensor:
    x = x - x.mean(2, keepdim=True)
    return x / x.norm(dim=2, keepdim=True).clamp_min(1e-12)
