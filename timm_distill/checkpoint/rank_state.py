"""State of the single processes of a run: random generators, loaders, running statistics, position in the epoch."""
import logging
from typing import Any, Dict, List, Optional

import torch
import torch.distributed as dist
from timm.task import TrainingTask
from timm.utils import unwrap_model

from ..utils.random import get_rng_state, set_rng_state

_logger = logging.getLogger(__name__)

__all__ = ['gather_rank_states', 'get_rank_state', 'restore_rank']


def _rank_buffers(task: Any) -> Dict[str, Dict[str, torch.Tensor]]:
    """Return the persistent buffers of the trained module and of its EMA, which each rank counts on its own batches."""
    modules = {'module': task.get_trainable_module(), 'ema': task.get_trainable_module(ema=True)}
    return {key: _persistent_buffers(unwrap_model(module)) for key, module in modules.items() if module is not None}


def _persistent_buffers(module: torch.nn.Module) -> Dict[str, torch.Tensor]:
    parameters = {name for name, _ in module.named_parameters()}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in parameters}


def get_rank_state(task: Any, loaders: Any, position: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
    """Return what only this rank knows: random generators, loader processes, running statistics and position.

    Args:
        task: Its buffers are saved, except those of rank 0, which the student's weights hold.
        loaders: Anything whose `state_dict` says where its random generators stand, None for none.
        position: Inside the epoch, None at its end.
    """
    state = {'rng': get_rng_state(), 'position': position}
    if loaders is not None:
        state['loaders'] = loaders.state_dict()
    if dist.is_initialized() and dist.get_rank() > 0:
        state['buffers'] = {
            key: {name: tensor.detach().cpu() for name, tensor in buffers.items()}
            for key, buffers in _rank_buffers(task).items()
        }
    return state


def gather_rank_states(state: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Return the states of all ranks; all of them call this together."""
    if not dist.is_initialized():
        return [state]
    states: List[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, state)
    return states


def restore_rank(task: TrainingTask, loaders: Any, checkpoint: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """Put back what only this rank knew. Comes last: building loaders and models draws random numbers.

    Args:
        task: Gets its running statistics.
        loaders: Get the generators of their processes, which must not run yet.
        checkpoint: As read.

    Returns:
        This rank's position inside the epoch; None at the start of one.
    """
    ranks = checkpoint.get('ranks')
    if not ranks:
        return None
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if len(ranks) != world_size:
        return _position_for_other_world(ranks, world_size)
    state = ranks[rank]
    for key, buffers in state.get('buffers', {}).items():
        own = _rank_buffers(task).get(key, {})
        for name in own.keys() & buffers.keys():
            own[name].copy_(buffers[name])
    position = state['position']
    if loaders is not None:
        # inside an epoch the loader is run again from the epoch's start
        is_inside = position is not None and position['data']['num_batches'] < len(loaders.train)
        loaders.load_state_dict(position['loaders'] if is_inside else state.get('loaders'))
    set_rng_state(state['rng'])
    return position


def _position_for_other_world(ranks: List[Dict[str, Any]], world_size: int) -> Optional[Dict[str, Any]]:
    _logger.warning(
        f'The checkpoint was written by {len(ranks)} processes, these are {world_size}: the run goes on, '
        'but not as if it had never stopped.')
    position = ranks[0]['position']
    if position is None:
        return None
    done = position['data']['num_batches'] * len(ranks) // world_size
    return {**position, 'data': {**position['data'], 'num_batches': done}}
