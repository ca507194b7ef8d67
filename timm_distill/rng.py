"""States of a process's random generators, in forms that load without running code."""
import random
from typing import Any, Dict

import numpy as np
import torch

__all__ = ['get_rng_state', 'set_rng_state']


def get_rng_state(cuda: bool = True) -> Dict[str, Any]:
    """State of this process's random generators (Python, NumPy, torch, the current CUDA device), without pickles.

    Args:
        cuda: Include CUDA's; a loader's worker process cannot, as its parent holds the device.
    """
    name, keys, position, has_gauss, cached_gaussian = np.random.get_state(legacy=True)
    state = {
        'python': random.getstate(),
        'numpy': (str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached_gaussian),
        'torch': torch.get_rng_state(),
    }
    if cuda and torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Dict[str, Any]) -> None:
    """Put the random generators back to a state of `get_rng_state`; a CUDA state needs CUDA, else it is left out."""
    random.setstate(state['python'])
    name, keys, *rest = state['numpy']
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'])
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])
