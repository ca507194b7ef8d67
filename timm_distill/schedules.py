"""Weights of loss terms over epochs: pure functions of the epoch, counted from 0."""
import math
from bisect import bisect_right
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from .errors import UsageError

Steps = Tuple[Tuple[int, float], ...]
ScheduleSpec = Union[str, Mapping[int, float], Sequence[Any]]

_FORMS = "a list of epoch:weight that starts at epoch 0, e.g. '0:0.1,5:0.5'"


class WeightSchedule:
    """Piecewise constant factor over epochs.

    Args:
        steps: Pairs (first epoch, weight), epochs increasing from 0. The last weight stays in force for ever.
    """

    def __init__(self, steps: Steps):
        epochs = [epoch for epoch, _ in steps]
        increasing = epochs[:1] == [0] and all(a < b for a, b in zip(epochs, epochs[1:]))
        if not increasing or not all(math.isfinite(weight) for _, weight in steps):
            raise UsageError(f'A weight schedule is {_FORMS}, with increasing epochs and finite weights, not {steps}.')
        self.steps = steps
        self._epochs = epochs

    def __call__(self, epoch: int) -> float:
        return self.steps[bisect_right(self._epochs, epoch) - 1][1]

    def __repr__(self) -> str:
        return ','.join(f'{epoch}:{weight:g}' for epoch, weight in self.steps)


def create_weight_schedule(
        spec: ScheduleSpec,
        named: Optional[Mapping[str, Steps]] = None,
        option: str = 'schedule',
) -> WeightSchedule:
    """Create a schedule from what the user wrote.

    Args:
        spec: 'const' (weight 1), a key of `named`, '0:0.1,5:0.5', a sequence of such items or pairs, or a mapping
            epoch -> weight.
        named: Published schedules by name.
        option: Name of the option, for messages.

    Raises:
        UsageError: If the value is none of these.
    """
    known: Dict[str, Steps] = {'const': ((0, 1.),), **(named or {})}
    if isinstance(spec, str) and spec in known:
        return WeightSchedule(known[spec])
    try:
        steps = tuple((int(epoch), float(weight)) for epoch, weight in _pairs(spec))
    except (TypeError, ValueError):
        raise UsageError(f"{option}={spec!r} is neither {', '.join(known)} nor {_FORMS}.") from None
    return WeightSchedule(steps)


def _pairs(spec: ScheduleSpec) -> List[Tuple[Any, Any]]:
    if isinstance(spec, Mapping):
        return list(spec.items())
    items: Sequence[Any] = spec.split(',') if isinstance(spec, str) else spec
    return [tuple(item.split(':')) if isinstance(item, str) else tuple(item) for item in items]  # type: ignore[misc]
