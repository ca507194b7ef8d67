"""State of optimizers, schedules and averages in full: their `state_dict`, and what some of timm's keep beside it.

AdaHessian draws from a generator of its own and keeps a trace on each parameter, the average of bfloat16 weights rounds
with a generator of its own: without these a resumed run is another one.
"""
import logging
import random
from typing import Any, Dict, Iterator, List, Tuple

import torch
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler

from ..errors import UsageError

_logger = logging.getLogger(__name__)

__all__ = [
    'get_hidden_state', 'get_scheduler_state', 'load_optimizer', 'load_optimizer_state', 'load_scheduler_state',
    'set_hidden_state',
]

_PLATEAU_COUNTERS = ('best', 'last_epoch', 'num_bad_epochs', 'cooldown_counter')


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


def _group_keys(group: Dict[str, Any]) -> List[str]:
    # switches (bool or None) come and go with torch versions, the numbers belong to the kind of optimizer; 'step' is
    # counted by some from their first update on
    return sorted(
        k for k, v in group.items()
        if k not in ('params', 'initial_lr', 'lr_scale', 'param_names', 'step')
        and isinstance(v, (float, int, tuple, list)) and not isinstance(v, bool))


def load_optimizer(optimizer: torch.optim.Optimizer, state: Dict[str, Any], path: str) -> None:
    """Load the state of an optimizer from the checkpoint `path`.

    Raises:
        UsageError: If it is of another kind, or of other parameters.
    """
    groups, saved_groups = optimizer.param_groups, state['param_groups']
    sizes, saved_sizes = [len(g['params']) for g in groups], [len(g['params']) for g in saved_groups]
    advice = 'pass the flags of that run, or --no-resume-opt to start the optimizer afresh.'
    if sizes != saved_sizes:
        raise UsageError(f'The optimizer in {path!r} has groups of {saved_sizes} parameters, here {sizes}: {advice}')
    for group, saved_group in zip(groups, saved_groups):
        keys, saved_keys = _group_keys(group), _group_keys(saved_group)
        if keys != saved_keys:
            raise UsageError(
                f'The optimizer in {path!r} is of another kind, it has {saved_keys} and here it is {keys}: {advice}')
    load_optimizer_state(optimizer, state)


def get_scheduler_state(lr_scheduler: Scheduler) -> Dict[str, Any]:
    """Return what a scheduler remembers."""
    state = lr_scheduler.state_dict()
    if isinstance(lr_scheduler, PlateauLRScheduler):
        state.update({name: getattr(lr_scheduler.lr_scheduler, name) for name in _PLATEAU_COUNTERS})
        state['restore_lr'] = lr_scheduler.restore_lr
    return state


def load_scheduler_state(lr_scheduler: Scheduler, state: Dict[str, Any]) -> None:
    """Restore what a scheduler remembers. What it was configured with is left to the flags of this run."""
    if isinstance(lr_scheduler, PlateauLRScheduler):
        for name in _PLATEAU_COUNTERS:
            setattr(lr_scheduler.lr_scheduler, name, state.get(name, getattr(lr_scheduler.lr_scheduler, name)))
        lr_scheduler.restore_lr = state.get('restore_lr')
        return
    # all other timm schedules are functions of the epoch or update alone
    new = lr_scheduler.state_dict()
    changed = [f'{k} {state[k]} -> {new[k]}' for k in new if k != 'metric' and k in state and state[k] != new[k]]
    if changed:
        _logger.warning(f"The learning rate schedule differs from the checkpoint's: {', '.join(changed)}.")
