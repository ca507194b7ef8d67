"""Averages of loss terms, and a count of the updates that were not finite, read from the device as rarely as possible.

Values are noted as tensors and fetched together, with one wait for the device.
"""
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.distributed as dist
from timm.utils import AverageMeter


class NonFiniteLossError(RuntimeError):
    """Too many updates in a row were not finite; names the terms, the epoch and the batch.

    Attributes:
        batch: (input, target) of such an update, where the loop had it at hand.
    """

    def __init__(self, message: str, batch: Optional[Tuple[torch.Tensor, torch.Tensor]] = None):
        super().__init__(message)
        self.batch = batch


@dataclass
class Streak:
    """Updates in a row that were not finite, up to the newest one; goes on from epoch to epoch.

    Attributes:
        length: How many.
        reason: What was not finite at its start.
    """
    length: int = 0
    reason: str = ''


class LossMeter:
    """Sample-weighted averages of a task's loss terms, over all ranks where distributed.

    Batches with a term that is not finite count as skipped and enter no average.

    Args:
        device: Where values are exchanged between ranks.
        distributed: Average over the ranks of the default process group.
        streak: What the epoch before ended with.
    """

    def __init__(self, device: torch.device, distributed: bool = False, streak: Optional[Streak] = None):
        streak = streak or Streak()
        self.device = device
        self.distributed = distributed
        self.meters: OrderedDict[str, AverageMeter] = OrderedDict()
        self.num_batches = 0  # read so far
        self.num_skipped = 0  # updates that were not finite
        self.streak = streak.length  # how many of these in a row, up to the newest update
        self.longest_streak = streak.length
        self.reason = streak.reason  # what was not finite at the start of the newest streak
        self._batches: List[Tuple[List[str], torch.Tensor, int]] = []
        self._updates: List[Tuple[int, torch.Tensor]] = []  # number of batches before its end, whether finite

    def add(self, result: Dict[str, torch.Tensor], num_samples: int) -> None:
        """Note the terms of one batch, without waiting for their values."""
        names = ['loss'] + [name for name in result if name.endswith('_loss')]
        terms = torch.stack([result[name].detach() for name in names])  # a copy, safe from in-place changes
        self._batches.append((names, terms, num_samples))

    def end_update(self, finite: torch.Tensor) -> None:
        """Note whether the update that the newest batches made had finite gradients."""
        self._updates.append((len(self._batches), finite))

    def fetch(self) -> None:
        """Read what was noted since the last call, with one wait for the device."""
        if not self._batches:
            return
        noted = [terms.double() for _, terms, _ in self._batches]
        flags = [finite.double().to(noted[0].device).view(1) for _, finite in self._updates]
        values = iter(torch.cat(noted + flags).tolist())
        bad = [self._update({name: next(values) for name in names}, n) for names, _, n in self._batches]
        first = 0
        for last, _ in self._updates:
            reasons = [reason for reason in bad[first:last] if reason]
            if not next(values):
                reasons.append(f'the gradient at batch {self.num_batches - len(bad) + last - 1}')
            self._count(reasons)
            first = last
        self._batches, self._updates = [], []

    def _update(self, values: Dict[str, float], num_samples: int) -> str:
        """Take a batch into the averages; returns what is not finite in it, in words."""
        bad = [f'{name}={value}' for name, value in values.items() if not math.isfinite(value)]
        if math.isfinite(values['loss']):
            bad = []  # a term of weight 0 that is not finite is no part of the loss
        for name, value in values.items():
            meter = self.meters.setdefault(name, AverageMeter())
            if not bad and math.isfinite(value):
                meter.update(value, num_samples)
        self.num_batches += 1
        return f"{', '.join(bad)} at batch {self.num_batches - 1}" if bad else ''

    def _count(self, reasons: List[str]) -> None:
        if not reasons:
            self.streak = 0
            return
        if self.streak == 0:
            self.reason = reasons[0]
        self.num_skipped += 1
        self.streak += 1
        self.longest_streak = max(self.longest_streak, self.streak)

    def read(self) -> Tuple[OrderedDict[str, float], OrderedDict[str, float]]:
        """Fetch, and share between ranks: the average of each term so far, and its value on the newest batch."""
        self.fetch()
        # one row per term: sum over samples, samples, newest value, number of ranks
        rows = [[meter.sum, meter.count, meter.val, 1] for meter in self.meters.values()]
        if self.distributed:
            shared = torch.tensor(rows, dtype=torch.float64, device=self.device)
            dist.all_reduce(shared)
            rows = shared.tolist()
            self._share_streaks()
        average = OrderedDict((name, row[0] / row[1] if row[1] else math.nan) for name, row in zip(self.meters, rows))
        newest = OrderedDict((name, row[2] / row[3]) for name, row in zip(self.meters, rows))
        return average, newest

    def _share_streaks(self) -> None:
        counts = torch.tensor([self.num_skipped, self.streak, self.longest_streak], device=self.device)
        dist.all_reduce(counts, op=dist.ReduceOp.MAX)
        self.num_skipped, self.streak, self.longest_streak = counts.tolist()

    def check(self, epoch: int, limit: Optional[int]) -> None:
        """Raise NonFiniteLossError, on every rank, if `limit` updates in a row were not finite; None for no limit."""
        if limit is None or self.longest_streak < limit:
            return
        raise NonFiniteLossError(
            f"Training diverged in epoch {epoch}: {self.reason or 'a batch on another rank'} (batches count from 0), "
            f'the first of {self.longest_streak} updates in a row that were not finite; none of them was applied. '
            'A lower --lr, --clip-grad, a longer warmup or --amp-dtype bfloat16 may help.')

    def forgive(self) -> None:
        """Begin to count anew, after the weights have been put back."""
        self.streak = self.longest_streak = 0

    def state_dict(self) -> Dict[str, Any]:
        """Return the averages and counts of this rank, all that was noted included."""
        self.fetch()
        return {
            'meters': {name: (meter.val, meter.sum, meter.count) for name, meter in self.meters.items()},
            **{name: getattr(self, name) for name in _COUNTS},
        }

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Continue from a state."""
        for name, (val, total, count) in state['meters'].items():
            meter = self.meters.setdefault(name, AverageMeter())
            meter.val, meter.sum, meter.count = val, total, count
            meter.avg = total / count if count else 0.
        for name in _COUNTS:
            setattr(self, name, state[name])


_COUNTS = ('num_batches', 'num_skipped', 'streak', 'longest_streak', 'reason')
