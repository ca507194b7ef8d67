"""The batches of an epoch, which can be continued from inside after a stop.

Loaders cannot jump to a position: what a batch holds depends on the generators of the main process and of the workers
at the moment it was made. So the epoch is loaded again from its start, with the generators of then, and the batches
that were trained on already are thrown away. That costs their loading and nothing else, and is exact with any number
of workers. Knows no model and no flags.
"""
import logging
from typing import Any, Dict, Iterator, Optional

from .utils.random import RandomState

_logger = logging.getLogger(__name__)


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
