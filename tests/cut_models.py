"""timm's models with fewer blocks or channels than any argument of theirs leaves, for tests of their heads.

They are cut where timm creates them by name, so that whatever builds one again gets the same architecture.
"""
import re
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Tuple
from unittest import mock

import timm
import torch
import torch.nn as nn
from timm.models import _registry


def keep_repeats(model: nn.Module, count: int) -> None:
    """Leave `count` of equal blocks that follow each other, in place."""
    for blocks in [m for m in model.modules() if isinstance(m, (nn.Sequential, nn.ModuleList))]:
        kept: List[Tuple[str, nn.Module]] = []
        for name, block in blocks.named_children():
            same = [_kind(other) for _, other in kept[-count:]] == [_kind(block)] * count
            if not same or not any(True for _ in block.parameters()):
                kept.append((name, block))
        numbered = all(name.isdigit() for name, _ in kept)
        blocks._modules.clear()
        for number, (name, block) in enumerate(kept):
            blocks.add_module(str(number) if numbered else name, block)


def _kind(block: nn.Module) -> Tuple[str, List[torch.Size]]:
    without_rates = re.sub(r'drop_prob=[\d.]+', '', repr(block))  # these alone grow from block to block
    return without_rates, [tensor.shape for tensor in block.state_dict().values()]


def narrow(model: nn.Module, divisor: int, num_classes: int) -> None:
    """Divide the channels of a convolutional network on the meta device, in place; it gets weights on the CPU."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            depthwise = module.groups > 1
            module.groups = module.groups // divisor if depthwise else 1
            module.in_channels, inputs = _divided(module.in_channels, divisor), module.weight.shape[1]
            if module.out_channels != num_classes:
                module.out_channels = _divided(module.out_channels, divisor)
            module.weight = _empty(
                module.out_channels, inputs if depthwise else _divided(inputs, divisor), *module.kernel_size)
            module.bias = None if module.bias is None else _empty(module.out_channels)
        elif isinstance(module, nn.BatchNorm2d):
            module.num_features = _divided(module.num_features, divisor)
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if tensor.ndim:
                    setattr(module, name, type(tensor)(tensor[:module.num_features]))
        elif isinstance(module, nn.Linear):
            module.in_features = _divided(module.in_features, divisor)
            if module.out_features != num_classes:
                module.out_features = _divided(module.out_features, divisor)
            module.weight = _empty(module.out_features, module.in_features)
            module.bias = None if module.bias is None else _empty(module.out_features)
    for name in ('num_features', 'head_hidden_size'):
        setattr(model, name, _divided(getattr(model, name), divisor))
    model.to_empty(device='cpu')
    for module in model.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()


def _divided(channels: int, divisor: int) -> int:
    """Return fewer channels; an image keeps its own."""
    if channels <= 3:
        return channels
    assert channels % divisor == 0, f'{channels} channels cannot be divided by {divisor}'
    return channels // divisor


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, device='meta'))


def _cut(create: Callable[..., nn.Module], repeats: int, divisor: int) -> Callable[..., nn.Module]:
    def create_cut(**kwargs: Any) -> nn.Module:
        with torch.device('meta' if divisor > 1 else 'cpu'):
            model = create(**kwargs)
        if repeats:
            keep_repeats(model, repeats)
        if divisor > 1:
            narrow(model, divisor, model.num_classes)
        return model
    return create_cut


@contextmanager
def cut_models(cuts: Dict[str, Dict[str, int]]) -> Iterator[None]:
    """Let timm create some architectures smaller in this context.

    Args:
        cuts: `repeats` (blocks left of equal ones in a row) and `divisor` (of channels) by architecture.
    """
    small = {
        name: _cut(timm.models.model_entrypoint(name), cut.get('repeats', 0), cut.get('divisor', 1))
        for name, cut in cuts.items()}
    with mock.patch.dict(_registry._model_entrypoints, small):
        yield
