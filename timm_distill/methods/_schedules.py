"""Weights of loss terms over epochs: pure functions of the epoch, counted from 0."""
import math
from bisect import bisect_right
from typing import Any, Callable, List, Mapping, Optional, Sequence, Tuple, Union

from ..errors import UsageError

Steps = Tuple[Tuple[int, float], ...]
ScheduleSpec = Union[str, Mapping[int, float], Sequence[Any]]
Schedule = Callable[[int], float]

_FORMS = "a list of epoch:weight that starts at epoch 0, e.g. '0:0.1,5:0.5'"
_PARTS = "warmup:EPOCHS, cosine:START:END, decay:EPOCH, stop:EPOCH"


class WeightSchedule:
    """Piecewise constant factor over epochs.

    Args:
        steps: Pairs (first epoch, weight), epochs increasing from 0. The last weight stays in force for ever.
    """

    def __init__(self, steps: Steps):
        epochs = [epoch for epoch, _ in steps]
        increasing = epochs[:1] == [0] and all(a < b for a, b in zip(epochs, epochs[1:]))
        if not increasing or not all(0 <= weight < math.inf for _, weight in steps):
            raise UsageError(f'A weight schedule is {_FORMS}, with increasing epochs and weights from 0, not {steps}.')
        self.steps = steps
        self._epochs = epochs

    def __call__(self, epoch: int) -> float:
        return self.steps[bisect_right(self._epochs, epoch) - 1][1]

    def __repr__(self) -> str:
        return ','.join(f'{epoch}:{weight:g}' for epoch, weight in self.steps)


class WarmupSchedule:
    """Factor that grows linearly to 1: 1/n in the first epoch, 1 in the n-th and ever after.

    Args:
        epochs: n, at least 1.
    """

    def __init__(self, epochs: int):
        if epochs < 1:
            raise UsageError(f'warmup:{epochs} must be one epoch or more.')
        self.epochs = epochs

    def __call__(self, epoch: int) -> float:
        return min(1., (epoch + 1) / self.epochs)

    def __repr__(self) -> str:
        return f'warmup:{self.epochs}'


class CosineSchedule:
    """Factor that goes from `start` in the first epoch to `end` in the last on half a cosine.

    Args:
        start: Factor of epoch 0.
        end: Factor of the last epoch and ever after.
        num_epochs: Length of the run.
    """

    def __init__(self, start: float, end: float, num_epochs: int):
        if not (0 <= start < math.inf and 0 <= end < math.inf):
            raise UsageError(f'cosine:{start:g}:{end:g} must have finite weights from 0.')
        self.start, self.end, self.num_epochs = start, end, num_epochs

    def __call__(self, epoch: int) -> float:
        progress = min(1., epoch / max(self.num_epochs - 1, 1))
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * progress)) / 2

    def __repr__(self) -> str:
        return f'cosine:{self.start:g}:{self.end:g}'


class DecaySchedule:
    """Factor 1 that falls to 0 in the last epoch on half a cosine.

    Args:
        epoch: How many epochs it is held before.
        num_epochs: Length of the run.
    """

    def __init__(self, epoch: int, num_epochs: int):
        if epoch < 0:
            raise UsageError(f'decay:{epoch} must be 0 epochs or more.')
        self.epoch, self.num_epochs = epoch, num_epochs

    def __call__(self, epoch: int) -> float:
        if epoch < self.epoch:
            return 1.
        progress = (epoch + 1 - self.epoch) / max(self.num_epochs - self.epoch, 1)
        return (1 + math.cos(math.pi * min(1., progress))) / 2

    def __repr__(self) -> str:
        return f'decay:{self.epoch}'


class ProductSchedule:
    """Product of several factors.

    Args:
        parts: Schedules.
    """

    def __init__(self, parts: Sequence[Schedule]):
        self.parts = tuple(parts)

    def __call__(self, epoch: int) -> float:
        return math.prod(part(epoch) for part in self.parts)

    def __repr__(self) -> str:
        return '*'.join(repr(part) for part in self.parts)


def create_weight_schedule(
        spec: ScheduleSpec,
        named: Optional[Mapping[str, Steps]] = None,
        option: str = 'schedule',
        num_epochs: Optional[int] = None,
) -> Schedule:
    """Create a schedule from what the user wrote.

    Args:
        spec: 'const' (weight 1), a key of `named`, 'warmup:5' (linear), 'cosine:1:0' (start and end), 'decay:30' (1
            for 30 epochs, then half a cosine to 0), 'stop:60' (0 from that epoch on), steps '0:0.1,5:0.5', a product
            of these such as 'warmup:5*stop:60'; or the steps as a sequence of such items or pairs, or as a mapping
            epoch -> weight.
        named: Published schedules by name.
        option: Name of the option, for messages.
        num_epochs: Length of the run; a cosine and a decay need it.

    Raises:
        UsageError: If the value is none of these.
    """
    named = {'const': ((0, 1.),), **(named or {})}
    if isinstance(spec, str) and '*' in spec:
        return ProductSchedule([create_weight_schedule(part, named, option, num_epochs) for part in spec.split('*')])
    if isinstance(spec, str) and spec.strip() in named:
        return WeightSchedule(named[spec.strip()])
    try:
        if isinstance(spec, str) and not spec.strip()[:1].isdigit():
            return _create_part(*spec.strip().split(':'), option=option, num_epochs=num_epochs)
        return WeightSchedule(tuple((int(epoch), float(weight)) for epoch, weight in _pairs(spec)))
    except UsageError:
        raise
    except (TypeError, ValueError):
        raise UsageError(f"{option}={spec!r} is neither {', '.join(named)} nor {_PARTS} nor {_FORMS}.") from None


def _create_part(kind: str, *values: str, option: str, num_epochs: Optional[int]) -> Schedule:
    """Create one of the forms with a name; ValueError and TypeError are for a malformed one."""
    if kind == 'warmup':
        (epochs,) = values
        return WarmupSchedule(int(epochs))
    if kind == 'stop':
        (epoch,) = values
        return WeightSchedule(((0, 1.), (int(epoch), 0.)))
    if kind == 'decay':
        (epoch,) = values
        if num_epochs is None:
            raise UsageError(f'{option}=decay:{epoch} needs the length of the run: give num_epochs (--epochs).')
        return DecaySchedule(int(epoch), num_epochs)
    if kind == 'cosine':
        start, end = values
        if num_epochs is None:
            raise UsageError(f'{option}=cosine:{start}:{end} needs the length of the run: give num_epochs (--epochs).')
        return CosineSchedule(float(start), float(end), num_epochs)
    raise ValueError(kind)


def _pairs(spec: ScheduleSpec) -> List[Tuple[Any, Any]]:
    if isinstance(spec, Mapping):
        return list(spec.items())
    items: Sequence[Any] = spec.split(',') if isinstance(spec, str) else spec
    return [tuple(item.split(':')) if isinstance(item, str) else tuple(item) for item in items]  # type: ignore[misc]
