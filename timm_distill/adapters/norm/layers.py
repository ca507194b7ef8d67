"""The layers of the N-to-one transform, as its forms read them."""
from typing import Any, Callable, Iterator, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn

from ...losses import to_full_precision
from ..base import AdapterOutput, Match


class Block(NamedTuple):
    """Channels of the expanded feature that one teacher is matched with.

    Attributes:
        segments: How many segments these are.
        channels: Ct.
    """
    segments: int
    channels: int

    @property
    def width(self) -> int:
        return self.segments * self.channels


def share_segments(segments: int, teacher_channels: Union[int, Sequence[int]]) -> Tuple[Block, ...]:
    """Return a block for each teacher: the segments are shared out evenly, those left over from the first one on."""
    widths = (teacher_channels,) if isinstance(teacher_channels, int) else tuple(teacher_channels)
    share, left = divmod(segments, len(widths))
    return tuple(Block(share + (i < left), width) for i, width in enumerate(widths))


class Layers(NamedTuple):
    """Layers and options of the transform: all that a form needs.

    Attributes:
        expand: W1, a 1x1 convolution to N * Ct channels, of several teachers to theirs one after the other.
        expand_bn: Batch norm behind it, or `nn.Identity`.
        contract: W2, a 1x1 convolution back to Cs channels; None beside the student's path.
        contract_bn: Batch norm behind it, or `nn.Identity`.
        blocks: What of the expanded feature is matched with which teacher; one for a single teacher.
        residual: The input is added to the output.
        offset: The output has an offset.
        pool: How the larger of two grids is pooled to the smaller, 'avg' or 'max'.
    """
    expand: nn.Conv2d
    expand_bn: Any
    contract: Optional[nn.Conv2d]
    contract_bn: Any
    blocks: Tuple[Block, ...]
    residual: bool
    offset: bool
    pool: str

    def targets(self, match: Match) -> Tuple[torch.Tensor, ...]:
        """Return the feature of each teacher, in the order of the blocks."""
        return (match.teacher,) if isinstance(match.teacher, torch.Tensor) else match.teacher

    def rows(self) -> Iterator[slice]:
        """Yield the channels of each block."""
        start = 0
        for block in self.blocks:
            yield slice(start, start + block.width)
            start += block.width

    @property
    def norms(self) -> Tuple[nn.Module, ...]:
        """The batch norms that run; none without them."""
        norms = (self.expand_bn,) if self.contract is None else (self.expand_bn, self.contract_bn)
        return () if isinstance(self.expand_bn, nn.Identity) else norms


# The interface of the forms: the transform's output for x, [B, Cs, H, W], and its loss where there is a match.
Form = Callable[[Layers, torch.Tensor, Optional[Match]], AdapterOutput]


def matrix(conv: nn.Conv2d) -> torch.Tensor:
    """Return the weight of a 1x1 convolution as [C_out, C_in], in float32 or better."""
    return to_full_precision(conv.weight).flatten(1)


def count_positions(x: torch.Tensor) -> int:
    """Return the positions of a feature map, [B, C, H, W]."""
    return x.numel() // x.shape[1]
