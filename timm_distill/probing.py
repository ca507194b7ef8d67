"""Measuring a model: which modules its head runs, and what its logits are with other tensors, in float64."""
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from .errors import UsageError

# What a model raises that does not take a probe: wrong shapes, dtypes, types.
CANNOT_RUN = (
    RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, IndexError, KeyError, AssertionError)

RawFeature = Union[torch.Tensor, List[torch.Tensor], Tuple[torch.Tensor, ...]]  # what forward_features returns


class Head(nn.Module):
    """A part of a model's head as a module.

    Args:
        model: timm model.
        part: 'features' (all of `forward_head`), 'to_pre_logits' (up to the classifier) or 'pre_logits' (the
            classifier).
    """

    def __init__(self, model: nn.Module, part: str):
        super().__init__()
        self.model = model
        self.part = part

    def forward(self, feature: RawFeature) -> torch.Tensor:
        if self.part == 'pre_logits':
            output = self.model.get_classifier()(feature)
        elif self.part == 'to_pre_logits':
            output = self.model.forward_head(feature, pre_logits=True)
        else:
            output = self.model.forward_head(feature)
        return output[0] if isinstance(output, (tuple, list)) else output


@dataclass(frozen=True)
class Call:
    """One module that a head ran, in order of execution.

    Attributes:
        name: Name of the module in the model.
        module: The module.
        input: Its first argument.
    """
    name: str
    module: nn.Module
    input: Any


def trace(head: Head, feature: RawFeature, tensors: Optional[Mapping[str, torch.Tensor]] = None) -> List[Call]:
    """Run a head once, with other tensors if given, and list the modules that it ran, in order."""
    calls: List[Call] = []

    def _record(name: str) -> Any:
        return lambda module, args: calls.append(Call(name, module, args[0] if args else None))

    handles = [m.register_forward_pre_hook(_record(name)) for name, m in head.model.named_modules() if name]
    try:
        call_head(head, tensors or {}, feature)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def random_tensors(model: nn.Module, calls: Sequence[Call]) -> Dict[str, torch.Tensor]:
    """Return random float64 values of all tensors that a head reads, by name.

    At initialisation a norm is the identity and some classifiers are zero, which would hide what does not fold.
    """
    generator = private_generator()
    tensors: Dict[str, torch.Tensor] = {}
    drawn: Dict[int, torch.Tensor] = {}  # tied weights are one tensor
    for name, module in [('', model), *((call.name, call.module) for call in calls)]:
        prefix = f'{name}.' if name else ''
        for key, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not value.is_floating_point():
                continue
            if id(value) not in drawn:
                drawn[id(value)] = _random_values(value, generator, positive=key == 'running_var')
            tensors[prefix + key] = drawn[id(value)]
    return tensors


def _random_values(value: torch.Tensor, generator: torch.Generator, positive: bool) -> torch.Tensor:
    random = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    if positive:
        random = 0.5 + random.abs()
    return random / max(random[0].numel(), 1) ** 0.5 if value.ndim > 1 else random


def random_like(feature: RawFeature) -> RawFeature:
    """Return random float64 values in the shape of a feature, on the CPU."""
    if isinstance(feature, torch.Tensor):
        return torch.randn(feature.shape, generator=private_generator(), dtype=torch.float64)
    return type(feature)(random_like(part) for part in feature)  # type: ignore[misc]


def call_head(head: Head, tensors: Mapping[str, torch.Tensor], feature: RawFeature) -> torch.Tensor:
    """Run a head with other tensors."""
    return functional_call(head, {f'model.{name}': value for name, value in tensors.items()}, (feature,))


def classifier_parameters(model: nn.Module) -> List[nn.Parameter]:
    """Return the parameters of a model's classifier or classifiers; none where it does not name them."""
    classifier = getattr(model, 'get_classifier', lambda: ())()
    heads = classifier if isinstance(classifier, (tuple, list)) else (classifier,)
    return [p for head in heads if isinstance(head, nn.Module) for p in head.parameters()]


def output_error(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the largest difference relative to each tensor's spread; nan and other shapes are infinite."""
    error = 0.
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape:
            return float('inf')
        difference = ((a - e).abs().max() / (e - e.mean()).abs().max().clamp(min=1e-300)).item()
        error = max(error, difference if difference == difference else float('inf'))
    return error


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
    logits = output[0] if isinstance(output, (tuple, list)) else output
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
        raise UsageError(f'--naflex-loader gives sequences of patches, which {type(model).__name__} cannot read: '
                         'choose a naflexvit model, or leave it out')
    height, width = get_patch_size()
    return height, width
