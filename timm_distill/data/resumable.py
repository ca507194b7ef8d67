"""Data order that resumes exactly: loader processes and the position inside an epoch."""
import logging
import os
import pickle
import signal
import threading
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import torch
from torch.utils.data import DataLoader, get_worker_info

from ..utils._compat import has_started
from ..utils.random import RandomState, get_rng_state, set_rng_state

_logger = logging.getLogger(__name__)

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

    Attributes:
        on_batch: Called with each batch before it is given out; None for nothing.
    """
    on_batch: Optional[Callable[[Any], None]] = None

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
            if self.on_batch is not None:
                self.on_batch(batch)
            yield batch

    def __getattr__(self, name: str) -> Any:  # dataset, samplers
        if name == 'loader':  # not yet set: copy and pickle ask before __init__
            raise AttributeError(name)
        return getattr(self.loader, name)

    def state_dict(self) -> Dict[str, Any]:
        """Return whether workers run and the states of their generators, as of the newest batch of each."""
        workers = {**self._restored, **{i: pickle.loads(state) for i, state in self._newest.items()}}
        return {'started': has_started(self.loader) or bool(self._restored), 'workers': workers}

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


class EpochData:
    """Iterates over a loader once, from the start or from where an earlier process stopped.

    Args:
        loader: Yields the batches of the epoch.
        position: `state_dict()` of the process that stopped, None to begin at the start.
    """

    def __init__(self, loader: Any, position: Optional[Dict[str, Any]] = None):
        self.loader = loader
        self.position = position
        self.num_batches = 0 if position is None else int(position['num_batches'])  # given out so far
        self._start: Optional[RandomState] = None  # before the first batch was made
        self._before: Optional[RandomState] = None  # before the newest was asked for

    def __len__(self) -> int:
        return len(self.loader)

    def state_dict(self) -> Dict[str, Any]:
        """Return the position behind the newest batch."""
        assert self._start is not None and self._before is not None, 'no batch has been given out'
        return {
            'num_batches': self.num_batches,
            'start': self._start.state_dict(),
            'before': self._before.state_dict(),
        }

    def __iter__(self) -> Iterator[Any]:
        batches = self._begin() if self.position is None else self._replay(self.position)
        while True:
            # A loader that looks ahead makes a later batch now, from these generators.
            before = RandomState.take()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._before = before
            self.num_batches += 1
            yield batch

    def _begin(self) -> Iterator[Any]:
        self._start = RandomState.take()
        return iter(self.loader)

    def _replay(self, position: Dict[str, Any]) -> Iterator[Any]:
        """Return an iterator in the state of the stopped one; the generators are those of now again."""
        now = RandomState.take()
        self._start = RandomState.from_state_dict(position['start'])
        self._before = RandomState.from_state_dict(position['before'])
        if self.num_batches >= len(self.loader):
            return iter(())
        _logger.info(f'Loading {self.num_batches} batches again to continue the epoch behind them.')
        self._start.restore()
        batches = iter(self.loader)
        for _ in range(self.num_batches - 1):
            next(batches)
        self._before.restore()  # the trained batches' random numbers are missing in between
        next(batches)
        now.restore()
        return batches


def outlive_stop_signals() -> None:
    """Let a loader's worker process go on when its whole process group is told to stop; the main process decides.

    A SIGTERM that the main process sends still ends the worker.
    """
    signal.set_wakeup_fd(-1)  # the main process's
    for name in ('SIGINT', 'SIGUSR1'):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
