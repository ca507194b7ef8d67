"""Training log: lines with each loss term, a progress bar, the time that data and steps took."""
import logging
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Dict, Iterator, List, Optional

import torch
import torch.distributed as dist
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .grad_norms import GradientNorms
from .meters import LossMeter

_logger = logging.getLogger(__name__)

__all__ = ['StepTiming', 'TrainLog', 'collect_warnings', 'progress_bar']


@dataclass
class StepTiming:
    """Times of the parts of training steps, over all epochs.

    Attributes:
        batches: Batches trained.
        seconds: Time of these, waiting for data included.
        data_seconds: Time waited for data.
    """
    batches: int = 0
    seconds: float = 0.
    data_seconds: float = 0.


class TrainLog:
    """Log lines of one training epoch: progress, each term by name, speed since the line before, learning rate.

    Args:
        losses: Where the terms are noted.
        epoch: Index of the epoch.
        num_updates: Optimizer updates in the epoch.
        log_interval: Updates between lines; the first and the last update always have one.
        max_streak: Updates in a row that may be skipped before training stops, None for any number.
        norms: Gradient norms to show beside the terms.
        num_epochs: Length of the run; without it the time left is that of the epoch.
    """

    def __init__(
            self,
            losses: LossMeter,
            epoch: int,
            num_updates: int,
            log_interval: int = 50,
            max_streak: Optional[int] = None,
            norms: Optional[GradientNorms] = None,
            num_epochs: Optional[int] = None,
    ):
        self.losses = losses
        self.norms = norms
        self.num_epochs = num_epochs or epoch + 1
        self.epoch = epoch
        self.num_updates = num_updates
        self.log_interval = log_interval
        self.max_streak = max_streak
        self.primary = not losses.distributed or dist.get_rank() == 0
        self.world_size = dist.get_world_size() if losses.distributed else 1
        self.loss: Optional[float] = None  # average, as last read
        self._restart()

    def _restart(self) -> None:
        self.start = time.perf_counter()
        self.data_time = 0.
        self.images = 0
        self.updates = 0

    def add(self, result: Dict[str, torch.Tensor], num_images: int, data_time: float) -> None:
        """Note one batch: its result, its size and how long it was waited for."""
        self.losses.add(result, num_images)
        self.images += num_images
        self.data_time += data_time

    def update(self, update_idx: int, optimizer: torch.optim.Optimizer, bar: tqdm) -> bool:
        """Note one optimizer update; where a line is due, read the values, write it and return true."""
        self.updates += 1
        if update_idx % self.log_interval and update_idx != self.num_updates - 1:
            return False
        average, newest = self.losses.read()
        self.loss = average['loss']
        if self.primary:
            bar.set_postfix(loss=f'{self.loss:.4g}', refresh=False)
            lrs = [group['lr'] for group in optimizer.param_groups]
            self._write(update_idx, average, newest, sum(lrs) / len(lrs))
        self._restart()
        self.losses.check(self.epoch, self.max_streak)
        return True

    def _write(self, update_idx: int, average: Dict[str, float], newest: Dict[str, float], lr: float) -> None:
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        terms = '  '.join(
            f"{'Loss' if name == 'loss' else name}: {newest[name]:#.3g} ({average[name]:#.3g})" for name in average)
        if self.norms is not None:
            terms += ''.join(f'  {name}: {value:#.3g}' for name, value in self.norms.newest().items())
        _logger.info(
            f'Train: {self.epoch} [{update_idx:>4d}/{self.num_updates:>4d} '
            f'({100 * (update_idx + 1) / self.num_updates:>3.0f}%)]  {terms}  '
            f'Time: {elapsed / self.updates:.3f}s, {self.images * self.world_size / elapsed:.1f} images/s  '
            f'Data: {self.data_time / self.updates:.3f}s  LR: {lr:.3e}  ETA: {self._time_left(update_idx, elapsed)}')
        if self.losses.streak:
            _logger.warning(
                f'{self.losses.num_skipped} updates of this epoch were not finite and were skipped, the '
                f'newest from {self.losses.reason or "a batch on another rank"}.')

    def _time_left(self, update_idx: int, elapsed: float) -> str:
        """Return the training time left at the speed since the last line, h:mm:ss; validation is not counted."""
        updates = (self.num_epochs - self.epoch) * self.num_updates - update_idx - 1
        return str(timedelta(seconds=round(elapsed / self.updates * max(updates, 0))))


class _WarningList(logging.Handler):
    """Notes each message once; one that changes with every update does not make it endless."""

    def __init__(self, longest: int = 100):
        super().__init__(logging.WARNING)
        self.longest = longest
        self.lines: List[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if line not in self.lines and len(self.lines) < self.longest:
            self.lines.append(line)


@contextmanager
def collect_warnings() -> Iterator[List[str]]:
    """Collect what the log warns of, errors too, each message once and at most a hundred, while this is entered."""
    handler = _WarningList()
    logging.getLogger().addHandler(handler)
    try:
        yield handler.lines
    finally:
        logging.getLogger().removeHandler(handler)


@contextmanager
def progress_bar(loader: Any, desc: str, progress: Optional[bool], initial: int = 0) -> Iterator[Any]:
    """Iterate over loader under a bar on stderr that log lines do not break.

    Args:
        loader: What to iterate over.
        desc: Text in front of the bar.
        progress: Show it; None shows it where stderr is a terminal.
        initial: Where it begins.
    """
    if progress is None:
        progress = sys.stderr.isatty()
    redirect = logging_redirect_tqdm() if progress else nullcontext()
    with redirect, tqdm(
            loader, desc=desc, disable=not progress, leave=False, dynamic_ncols=True, initial=initial) as bar:
        yield bar
