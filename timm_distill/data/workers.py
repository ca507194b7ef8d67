"""Loader processes that live as long as the run, as in timm, and can still be resumed exactly.

A worker's random generators go on from epoch to epoch, so what an image looks like depends on all that its worker did
before. Each batch therefore brings the states of its worker's generators along; a checkpoint holds the newest of each
worker, and the workers of a resumed run start from them.
"""
import pickle
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import torch
from torch.utils.data import DataLoader, get_worker_info

from ..stopping import outlive_stop_signals
from ..utils.random import get_rng_state, set_rng_state

# A pickle of the worker's own making: bytes cross the process boundary faster than tensors, which need shared memory.
WorkerState = Tuple[int, bytes]


class _CollateWithState:
    """Collates samples and adds which worker did so and the states of its random generators, None without workers."""

    def __init__(self, collate_fn: Callable):
        self.collate_fn = collate_fn

    def __call__(self, samples: Any) -> Tuple[Any, Optional[WorkerState]]:
        batch = self.collate_fn(samples)
        worker = get_worker_info()
        return batch, None if worker is None else (worker.id, pickle.dumps(get_rng_state(cuda=False)))


class _InitFromState:
    """Initialises a worker as the loader would, then puts its random generators to a saved state where there is one."""

    def __init__(self, init_fn: Optional[Callable[[int], None]], states: Dict[int, Any]):
        self.init_fn = init_fn
        self.states = states

    def __call__(self, worker_id: int) -> None:
        outlive_stop_signals()
        if self.init_fn is not None:
            self.init_fn(worker_id)
        if worker_id in self.states:
            set_rng_state(self.states[worker_id])


class ResumableLoader:
    """A loader of batches whose workers live on over epochs; knows their random generators' states.

    Args:
        loader: Not yet iterated over; its collate and init functions are wrapped.
    """

    def __init__(self, loader: DataLoader):
        self.loader = loader
        self.collate_fn = loader.collate_fn  # timm's prefetcher looks here for mixup
        self._restored: Dict[int, Any] = {}
        self._newest: Dict[int, bytes] = {}
        loader.collate_fn = _CollateWithState(loader.collate_fn)
        loader.worker_init_fn = _InitFromState(loader.worker_init_fn, self._restored)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch, state in self.loader:
            if state is not None:
                worker_id, self._newest[worker_id] = state
            yield batch

    def __getattr__(self, name: str) -> Any:  # dataset, samplers
        if name == 'loader':  # not yet set: copy and pickle ask before __init__
            raise AttributeError(name)
        return getattr(self.loader, name)

    def state_dict(self) -> Dict[str, Any]:
        """Return whether workers run and the states of their generators, as of the newest batch of each."""
        workers = {**self._restored, **{i: pickle.loads(state) for i, state in self._newest.items()}}
        return {'started': self.loader._iterator is not None or bool(self._restored), 'workers': workers}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Let the workers, which must not run yet, start from the states that `state_dict` returned."""
        self._restored.update({i: s for i, s in state['workers'].items() if i < self.loader.num_workers})
        if state['started'] and self.loader.num_workers:
            # starting workers draws their seeds from the global generator, which in the stopped run happened long ago
            self.loader.generator = torch.Generator()


def make_resumable(loader: Any) -> Any:
    """Wrap the `DataLoader` in a timm loader (the loader itself, or what its prefetcher reads) as `ResumableLoader`."""
    if isinstance(loader, DataLoader):
        return ResumableLoader(loader)
    loader.loader = ResumableLoader(loader.loader)
    return loader


def find_resumable(loader: Any) -> Optional[ResumableLoader]:
    """Return what `make_resumable` put in; None where it did not."""
    inner = getattr(loader, 'loader', None) if not isinstance(loader, ResumableLoader) else loader
    return inner if isinstance(inner, ResumableLoader) else None
