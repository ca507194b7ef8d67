"""Tracing of a model's head: the layers that a forward calls, and their run on other tensors."""
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch.func import functional_call

from .inputs import RawFeature, _random_values, logits_of, private_generator


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
        return logits_of(output)


@contextmanager
def inputs_of(modules: Sequence[nn.Module]) -> Iterator[List[List[torch.Tensor]]]:
    """Note the first arguments that modules are given in this context, in order; hooks of their own come after."""
    inputs: List[List[torch.Tensor]] = [[] for _ in modules]

    def _keep(noted: List[torch.Tensor]) -> Callable:
        return lambda module, args: noted.append(args[0])

    handles = [m.register_forward_pre_hook(_keep(noted), prepend=True) for m, noted in zip(modules, inputs)]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def mapped_input(layer: nn.Module, map_: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Give a layer what `map_` makes of its first argument. The layer keeps its class, its names and its forward."""
    def _hook(module: nn.Module, args: Tuple[Any, ...]) -> Tuple[Any, ...]:
        return map_(args[0]), *args[1:]

    handle = layer.register_forward_pre_hook(_hook)
    try:
        yield
    finally:
        handle.remove()


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


def random_like(feature: RawFeature) -> RawFeature:
    """Return random float64 values in the shape of a feature, on the CPU."""
    if isinstance(feature, torch.Tensor):
        return torch.randn(feature.shape, generator=private_generator(), dtype=torch.float64)
    container: Any = type(feature)
    return container(random_like(part) for part in feature)


def call_head(head: Head, tensors: Mapping[str, torch.Tensor], feature: RawFeature) -> torch.Tensor:
    """Run a head with other tensors."""
    return functional_call(head, {f'model.{name}': value for name, value in tensors.items()}, (feature,))


def output_error(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the largest difference relative to each tensor's spread; nan and other shapes are infinite."""
    error = 0.
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape:
            return float('inf')
        difference = ((a - e).abs().max() / (e - e.mean()).abs().max().clamp(min=1e-300)).item()
        error = max(error, difference if difference == difference else float('inf'))
    return error
