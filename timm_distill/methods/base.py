"""The contract of a method: features of student and teacher in, named unweighted loss terms out.

A method knows no loop, no argparse and no other method. Whatever it trains is a submodule of it and used in `forward`,
so that optimizer, DDP, EMA and checkpoint find it.
"""
from typing import Any, Callable, ClassVar, Dict, FrozenSet, Optional

import torch
import torch.nn as nn

from ..registry import Registry
from ..taps import Features

METHODS = Registry('method', '--kd', __package__)


def register_method(name: str) -> Callable[[type], type]:
    """Return a class decorator that registers a method under `name`."""
    return METHODS.register(name)


class DistillMethod(nn.Module):
    """Base of all methods. The constructor's keyword arguments are the user's options.

    Attributes:
        paper: Authors, venue and link.
        teacher_outputs: What is read of the teacher: any of 'logits', 'feature' (last stage), 'pre_logits', and 'tap',
            the counterpart of the adapter's insertion point (last stage or pre-logits).
        adapter: Name of the adapter that the method puts on the student's path, if it does.
    """
    paper: ClassVar[str] = ''
    teacher_outputs: ClassVar[FrozenSet[str]] = frozenset({'logits'})
    adapter: ClassVar[Optional[str]] = None

    @property
    def adapter_options(self) -> Dict[str, Any]:
        """Options of the adapter."""
        return {}

    def weight(self, epoch: int) -> float:
        """Return the factor that the method's schedule puts on its terms in an epoch, counted from 0."""
        return 1.

    def transform_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Map the logits of student and teacher, [B, K], before the task loss and every method see them."""
        return logits

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Return named unweighted terms.

        Args:
            student: Features of the student, with gradients.
            teacher: Features of the teacher, as asked for by `teacher_outputs`.
            target: Class indices [B] or soft targets [B, K].

        Returns:
            Scalars by name; every name ends in '_loss'.
        """
        raise NotImplementedError

    @classmethod
    def describe_needs(cls) -> str:
        """Return one line on what the method reads."""
        names = {'tap': 'last-stage feature (pre-logits where the tap is there)', 'feature': 'last-stage feature'}
        needs = [f'teacher {", ".join(names.get(x, x.replace("_", "-")) for x in sorted(cls.teacher_outputs))}']
        if cls.adapter:
            needs.append(f"adapter '{cls.adapter}' on the student's path, merged at every save")
        if 'logits' in cls.teacher_outputs:
            needs.append('equal class counts')
        return '; '.join(needs)
