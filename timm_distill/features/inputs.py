"""Inputs that a model can be measured on: random images, its own size, its patches."""
from contextlib import contextmanager
from typing import Any, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from ..errors import UsageError

# What a model raises that does not take a probe: wrong shapes, dtypes, types.
CANNOT_RUN = (
    RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, IndexError, KeyError, AssertionError)
RawFeature = Union[torch.Tensor, List[torch.Tensor], Tuple[torch.Tensor, ...]]  # what forward_features returns



def logits_of(output: Any) -> torch.Tensor:
    """Return the logits of what a model returned: the first where there are several."""
    return output[0] if isinstance(output, (tuple, list)) else output


def _random_values(value: torch.Tensor, generator: torch.Generator, positive: bool) -> torch.Tensor:
    random = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    if positive:
        random = 0.5 + random.abs()
    return random / max(random[0].numel(), 1) ** 0.5 if value.ndim > 1 else random


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
    images = torch.randn(batch_size, *input_size, generator=private_generator())
    return images.to(parameter.device, parameter.dtype)


def private_generator() -> torch.Generator:
    """Return a random generator of its own, so that building a task does not move the run's random state."""
    return torch.Generator().manual_seed(0)


def resize_images(images: torch.Tensor, size: Tuple[int, int], mode: str = 'bicubic') -> torch.Tensor:
    """Resize a batch, [B, C, H, W], where it has another size; 'bicubic' and 'bilinear' are antialiased."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    if mode == 'nearest':
        return F.interpolate(images, size, mode=mode)
    return F.interpolate(images, size, mode=mode, antialias=True, align_corners=False)


def runnable_size(
        model: nn.Module,
        input_size: Sequence[int],
) -> Tuple[Optional[Tuple[int, int]], str]:
    """Measure at which size a model runs.

    Args:
        model: timm model.
        input_size: Input as (channels, height, width).

    Returns:
        The size (height, width) that the input has to be resized to, None where the model runs as it comes; and why it
        runs neither so nor at its own size, '' where it does.
    """
    reasons = []
    for size in (tuple(input_size[1:]), own_size(model)):
        if size is None:
            continue
        reason = reason_not_to_run(model, (input_size[0], *size))
        if not reason:
            return (None if size == tuple(input_size[1:]) else (size[0], size[1])), ''
        reasons.append(f'at {size[0]}x{size[1]}: {reason}')
    return None, '; '.join(reasons)


def reason_not_to_run(model: nn.Module, input_size: Sequence[int]) -> str:
    """Return why a model does not run on an input (channels, height, width), '' where it does.

    One with a classifier has to give a vector of logits per image: without pooling it gives one per position.
    """
    try:
        with evaluation_mode(model):
            output = model(random_images(model, input_size))
    except CANNOT_RUN as e:
        return (' '.join(str(e).split())[:200] or type(e).__name__) + _explain_pooling(model)
    logits = logits_of(output)
    if getattr(model, 'num_classes', 1) != 0 and getattr(logits, 'ndim', 2) != 2:
        return f'its logits for an image are {list(logits.shape[1:])}, not one per class{_explain_pooling(model)}'
    return ''


def _explain_pooling(model: nn.Module) -> str:
    unpooled = any('' in (getattr(m, 'global_pool', None), getattr(m, 'pool_type', None)) for m in model.modules())
    return " (its feature is not pooled: leave out global_pool='')" if unpooled else ''


def count_flops(model: nn.Module, images: torch.Tensor) -> int:
    """Return the floating-point operations of the matrix products and convolutions that a forward pass runs."""
    with FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops()


def own_size(model: nn.Module) -> Optional[Tuple[int, int]]:
    """Return the input size that a model was built for, as (height, width)."""
    embed_size = getattr(getattr(model, 'patch_embed', None), 'img_size', None)
    if isinstance(embed_size, (tuple, list)) and len(embed_size) == 2:
        return int(embed_size[0]), int(embed_size[1])
    size = (getattr(model, 'pretrained_cfg', None) or {}).get('input_size')
    return (size[1], size[2]) if size else None


def find_patch_size(model: nn.Module) -> Tuple[int, int]:
    """Return the patch size (height, width) of a model that reads patch sequences.

    Raises:
        UsageError: If it reads images alone.
    """
    get_patch_size = getattr(model, 'get_patch_size', None)
    if get_patch_size is None:
        raise UsageError(
            f'--naflex-loader gives sequences of patches, which {type(model).__name__} cannot read: '
            'choose a naflexvit model, or leave it out')
    height, width = get_patch_size()
    return height, width
