"""Optimizer state in full: its `state_dict`, and what some of timm's optimizers and averages keep beside it.

AdaHessian draws from a generator of its own and keeps a trace on each parameter, the average of bfloat16 weights rounds
with a generator of its own: without these a resumed run is another one.
"""
import random
from typing import Any, Dict, Iterator, List, Tuple

import torch

__all__ = ['get_hidden_state', 'load_optimizer_state', 'set_hidden_state']


def get_hidden_state(holder: Any) -> Dict[str, Any]:
    """Return what an object remembers outside its `state_dict`, {} for nothing; tensors, numbers and text.

    Args:
        holder: An optimizer, also one inside another (Lookahead), or anything else with generators as attributes.
    """
    state: Dict[str, Any] = {}
    generators = {name: _generator_state(value) for name, value in _generators(holder)}
    if generators:
        state['generators'] = generators
    attributes = [
        {name: value.detach() for name, value in vars(parameter).items() if _is_trace(value, parameter)}
        for parameter in _parameters(holder)]
    if any(attributes):
        state['parameters'] = attributes
    return state


def set_hidden_state(holder: Any, state: Dict[str, Any]) -> None:
    """Put back what `get_hidden_state` returned."""
    base = _innermost(holder)
    for name, saved in state.get('generators', {}).items():
        if hasattr(base, name):
            setattr(base, name, _restored_generator(getattr(base, name), saved))
    for parameter, attributes in zip(_parameters(holder), state.get('parameters', [])):
        for name, value in attributes.items():
            setattr(parameter, name, value.to(parameter.device, copy=True))


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Dict[str, Any]) -> None:
    """Load a `state_dict` with the precision it has: torch casts scalars, too, to that of their parameter."""
    optimizer.load_state_dict(state)
    saved_ids = [i for group in state['param_groups'] for i in group['params']]
    entries = _innermost(optimizer).state
    for parameter, saved_id in zip(_parameters(optimizer), saved_ids):
        for name, value in state['state'].get(saved_id, {}).items():
            if isinstance(value, torch.Tensor) and value.ndim == 0 and entries[parameter][name].dtype != value.dtype:
                entries[parameter][name] = value.to(entries[parameter][name].device, copy=True)


def _innermost(holder: Any) -> Any:
    for value in vars(holder).values():
        if isinstance(value, torch.optim.Optimizer):
            return _innermost(value)
    return holder


def _parameters(holder: Any) -> List[torch.Tensor]:
    return [parameter for group in getattr(holder, 'param_groups', []) for parameter in group['params']]


def _generators(holder: Any) -> Iterator[Tuple[str, Any]]:
    for name, value in vars(_innermost(holder)).items():
        if isinstance(value, (torch.Generator, random.Random)):
            yield name, value


def _is_trace(value: Any, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape


def _generator_state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    return {'device': str(generator.device), 'state': generator.get_state()}


def _restored_generator(generator: Any, saved: Any) -> Any:
    if isinstance(generator, random.Random):
        generator.setstate(saved)
        return generator
    device = torch.device(saved['device'])
    if generator.device.type != device.type:
        if not _is_available(device):
            return generator
        generator = torch.Generator(device)  # AdaHessian moves its generator to the device at its first step
    generator.set_state(saved['state'])
    return generator


def _is_available(device: torch.device) -> bool:
    accelerator = torch.accelerator.current_accelerator()
    return device.type == 'cpu' or accelerator is not None and accelerator.type == device.type
