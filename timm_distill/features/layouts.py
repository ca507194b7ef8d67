"""Layouts of a timm model's features: NCHW maps, NHWC maps, tokens, vectors.

Knows shapes alone; which grid a model's tokens form is found in `grids.py`.
"""
from dataclasses import dataclass
from typing import Optional, Sequence, Tuple, cast

import torch

from ..errors import UsageError

GridSize = Tuple[int, int]


@dataclass(frozen=True)
class FeatureLayout:
    """Layout of one feature tensor.

    Attributes:
        fmt: 'NCHW', 'NHWC', 'NLC' (tokens), 'NCL' (tokens behind channels) or 'NC' (a vector).
        channels: C.
        num_prefix_tokens: Class and register tokens in front of the patches' tokens.
        grid: Grid (height, width) of the patches' tokens at `input_size`; None where the model tells none.
        input_size: Height and width of the input that has this grid.
        ordered: Whether the tokens are positions of the input at all; class tokens alone are not.
    """
    fmt: str
    channels: int
    num_prefix_tokens: int = 0
    grid: Optional[GridSize] = None
    input_size: Optional[GridSize] = None
    ordered: bool = True

    @property
    def channel_dim(self) -> int:
        """Dimension of the channels in the feature tensor."""
        return self.fmt.index('C')

    @property
    def has_tokens(self) -> bool:
        """Whether the positions are tokens that a grid gives their place."""
        return self.fmt in ('NLC', 'NCL') and self.ordered

    @property
    def is_map(self) -> bool:
        """Whether `to_map` knows where every position belongs."""
        return not self.has_tokens or self.grid is not None

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

        C' may differ from C: an adapter expands the channels between the two calls. Tokens that are no positions are
        averaged, [B, C', 1, 1].

        Raises:
            UsageError: If the tokens are not those of the grid.
        """
        if self.fmt not in ('NLC', 'NCL'):
            return positions
        if not self.ordered:
            return positions.mean(2, keepdim=True)
        if no_map := self.explain(positions):
            raise UsageError(no_map)
        return self.drop_prefix(positions)[:, :, :, 0].unflatten(2, cast(GridSize, self.grid))

    def drop_prefix(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the patches' tokens of what `to_positions` returned, [B, C', L, 1]. A view."""
        return positions[:, :, self.num_prefix_tokens:]

    def from_map(self, x: torch.Tensor) -> torch.Tensor:
        """Return a map, [B, C, H, W], as positions without prefix tokens: what `to_map` undoes where there are none."""
        return x.flatten(2).unsqueeze(-1) if self.fmt in ('NLC', 'NCL') else x

    def explain(self, positions: torch.Tensor) -> str:
        """Return why the tokens of what `to_positions` returned are no map, '' where they are."""
        num_tokens = self.drop_prefix(positions).shape[2]
        if not self.has_tokens or self.grid is not None and num_tokens == self.grid[0] * self.grid[1]:
            return ''
        if self.grid is None:
            found = f'The model gives {num_tokens} tokens and does not tell on which grid of the input they lie'
        else:
            found = (
                f'The model gives {num_tokens} tokens for an input whose grid is {self.grid[0]}x{self.grid[1]}: '
                'positions were dropped or added')
        return (
            f'{found}, so they cannot be compared with a feature map. Leave patch_drop_rate at 0 in '
            '--model-kwargs, choose another model, or --kd methods that read no feature maps (--list-kd).')


def layout_of_map(
        layouts: Sequence[FeatureLayout],
        feature: torch.Tensor,
        map_: Optional[torch.Tensor],
) -> FeatureLayout:
    """Return the layout under which a feature has the shape of a known map, [B, C, H, W]; the first without one."""
    for layout in layouts if map_ is not None else ():
        positions = layout.to_positions(feature)
        if layout.is_map and layout.to_map(positions).shape[1:] == map_.shape[1:]:
            return layout
    return layouts[0]
