"""States of a process's random generators, in forms that load without running code."""
import random
from contextlib import contextmanager
from typing import Any, Dict, Iterator, NamedTuple, Optional, Tuple, cast

import numpy as np
import torch

__all__ = ['RandomState', 'get_rng_state', 'scramble', 'seed_generators', 'set_rng_state', 'unchanged_randomness']

_MASK = (1 << 64) - 1


class RandomState(NamedTuple):
    """The generators as they were at one moment; taking it costs some 40 microseconds and waits for no device."""
    python: Tuple[Any, ...]
    numpy: Tuple[Any, ...]
    torch: torch.Tensor
    cuda: Optional[torch.Tensor]

    @classmethod
    def take(cls, cuda: bool = True) -> 'RandomState':
        """Return the state of now; `cuda=False` in a loader's worker process, whose parent holds the device."""
        return cls(
            random.getstate(),
            cast(Tuple[Any, ...], np.random.get_state(legacy=True)),
            torch.get_rng_state(),
            torch.cuda.get_rng_state() if cuda and torch.cuda.is_available() else None,
        )

    def restore(self) -> None:
        """Put the generators back; a CUDA state is left out where there is no CUDA."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.cuda)

    def state_dict(self) -> Dict[str, Any]:
        """Return it as tensors, numbers and text, which load without pickles."""
        name, keys, *rest = self.numpy
        numpy = (str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest)
        state = {'python': self.python, 'numpy': numpy, 'torch': self.torch}
        return state if self.cuda is None else {**state, 'cuda': self.cuda}

    @classmethod
    def from_state_dict(cls, state: Dict[str, Any]) -> 'RandomState':
        """Return what `state_dict` was made from."""
        name, keys, *rest = state['numpy']
        numpy = (name, keys.numpy().astype(np.uint32), *rest)
        return cls(state['python'], numpy, state['torch'], state.get('cuda'))


@contextmanager
def unchanged_randomness() -> Iterator[None]:
    """Leave the generators as they were, whatever is drawn inside."""
    before = RandomState.take()
    try:
        yield
    finally:
        before.restore()


def get_rng_state(cuda: bool = True) -> Dict[str, Any]:
    """Return the state of this process's random generators, without pickles; `cuda` as in `RandomState.take`."""
    return RandomState.take(cuda).state_dict()


def set_rng_state(state: Dict[str, Any]) -> None:
    """Put the random generators back to a state of `get_rng_state`."""
    RandomState.from_state_dict(state).restore()


def scramble(*numbers: int) -> int:
    """Return 64 bits that depend on all numbers: the finalizer of SplitMix64 on each in turn."""
    state = 0
    for number in numbers:
        state = (state + 0x9E3779B97F4A7C15 + number) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def seed_generators(*numbers: int) -> None:
    """Put the generators of Python, NumPy and torch's CPU to a state that depends on the numbers alone."""
    seed = scramble(*numbers)
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    torch.default_generator.manual_seed(seed & (_MASK >> 1))  # torch.manual_seed would queue a call for CUDA each time
