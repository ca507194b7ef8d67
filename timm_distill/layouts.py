"""How a timm model lays out the positions of a feature: NCHW maps, NHWC maps, tokens, vectors.

Knows shapes and the few attributes that timm's models share; never a model's name.
"""
import math
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn as nn

_MAX_PREFIX_TOKENS = 16


@dataclass(frozen=True)
class FeatureLayout:
    """Layout of one feature tensor.

    Attributes:
        fmt: 'NCHW', 'NHWC', 'NLC' (tokens), 'NCL' (tokens behind channels) or 'NC' (a vector).
        channels: C.
        num_prefix_tokens: Class and register tokens in front of the grid's tokens.
        aspect: Height over width of the model's input, which a grid of tokens follows.
    """
    fmt: str
    channels: int
    num_prefix_tokens: int = 0
    aspect: float = 1.

    @property
    def channel_dim(self) -> int:
        """Dimension of the channels in the feature tensor."""
        return self.fmt.index('C')

    def to_positions(self, x: torch.Tensor) -> torch.Tensor:
        """Return all positions, prefix tokens included, as [B, C, H, W]; tokens as [B, C, L, 1]. A view."""
        if self.fmt == 'NHWC':
            return x.permute(0, 3, 1, 2)
        if self.fmt == 'NLC':
            return x.transpose(1, 2).unsqueeze(-1)
        if self.fmt == 'NCL':
            return x.unsqueeze(-1)
        return x[:, :, None, None] if self.fmt == 'NC' else x

    def from_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Undo `to_positions`. A view."""
        if self.fmt == 'NHWC':
            return positions.permute(0, 2, 3, 1)
        if self.fmt == 'NLC':
            return positions.squeeze(-1).transpose(1, 2)
        if self.fmt == 'NCL':
            return positions.squeeze(-1)
        return positions.flatten(1) if self.fmt == 'NC' else positions

    def to_map(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the spatial part of what `to_positions` returned as [B, C', H, W], prefix tokens dropped.

        C' may differ from C: an adapter expands the channels between the two calls.
        """
        if self.fmt not in ('NLC', 'NCL'):
            return positions
        tokens = positions[:, :, self.num_prefix_tokens:, 0]  # [B, C', H * W]
        return tokens.unflatten(2, token_grid(tokens.shape[2], self.aspect) or (tokens.shape[2], 1))

    def from_map(self, x: torch.Tensor) -> torch.Tensor:
        """Return a map, [B, C, H, W], as positions without prefix tokens: what `to_map` undoes where there are none."""
        return x.flatten(2).unsqueeze(-1) if self.fmt in ('NLC', 'NCL') else x


def token_grid(num_tokens: int, aspect: float = 1.) -> Optional[Tuple[int, int]]:
    """Return the grid (height, width) of `num_tokens` whose aspect is that of the input, None where there is none."""
    height = round(math.sqrt(num_tokens * aspect))
    for candidate in (height, height - 1, height + 1):
        width = num_tokens // candidate if candidate > 0 else 0
        if width and candidate * width == num_tokens and 0.5 < candidate / width / aspect < 2.:
            return candidate, width
    return None


def candidate_layouts(model: nn.Module, feature: torch.Tensor, aspect: float = 1.) -> List[FeatureLayout]:
    """Return the layouts that a feature of `model` may have, the likeliest first.

    Args:
        model: timm model that the feature comes from.
        feature: Output of its `forward_features`, [B, ...] of 2 to 4 dimensions.
        aspect: Height over width of the input.
    """
    formats = {2: ['NC'], 3: ['NLC', 'NCL'], 4: ['NCHW', 'NHWC']}.get(feature.ndim, [])
    num_features = getattr(model, 'num_features', None)
    declared = str(getattr(model, 'output_fmt', '')).split('.')[-1]

    def _rank(fmt: str) -> Tuple[bool, bool]:
        return fmt != declared, feature.shape[fmt.index('C')] != num_features

    return [_create_layout(model, fmt, feature, aspect) for fmt in sorted(formats, key=_rank)]


def layout_of_map(
        layouts: Sequence[FeatureLayout],
        feature: torch.Tensor,
        map_: Optional[torch.Tensor],
) -> FeatureLayout:
    """Return the layout under which a feature has the shape of a known map, [B, C, H, W]; the first without one."""
    for layout in layouts if map_ is not None else ():
        if layout.to_map(layout.to_positions(feature)).shape[1:] == map_.shape[1:]:
            return layout
    return layouts[0]


def _create_layout(model: nn.Module, fmt: str, feature: torch.Tensor, aspect: float) -> FeatureLayout:
    prefix = 0
    if fmt in ('NLC', 'NCL'):
        prefix = _count_prefix_tokens(model, feature.shape[fmt.index('L')], aspect)
    return FeatureLayout(fmt, feature.shape[fmt.index('C')], prefix, aspect)


def _count_prefix_tokens(model: nn.Module, num_tokens: int, aspect: float) -> int:
    """Return how many tokens stand in front of the grid: as declared if the rest is a grid, else as few as it takes."""
    declared = getattr(model, 'num_prefix_tokens', 0)
    for prefix in (declared, *range(min(_MAX_PREFIX_TOKENS, num_tokens))):
        if token_grid(num_tokens - prefix, aspect):
            return prefix
    return 0
