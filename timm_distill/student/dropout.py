"""The dropout in front of a classifier: found by watching a model run, and delayed until an adapter has run.

Dropout scales what it keeps, so that features behind it have another deviation in training than at inference. A batch
norm there would keep running statistics that do not fit the features that it meets.
"""
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..features.tracing import inputs_of


class DelayedDropout(TorchFunctionMode):
    """Skips one dropout of what runs in this context, which gives a function that applies it to a tensor instead.

    Args:
        index: Which call of torch's dropout it is, counted from 0.
        channels: What it must be given, [B, C], [B, C, 1, 1] or [B, L, C]: a model that runs another dropout there in
            training is left as it is.
    """

    def __init__(self, index: int, channels: int):
        super().__init__()
        self.index = index
        self.channels = channels
        self._calls = 0
        self._skipped: Optional[Tuple[float, bool]] = None

    def __torch_function__(
            self,
            func: Callable,
            types: Any,
            args: Tuple[Any, ...] = (),
            kwargs: Optional[Dict[str, Any]] = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            self._calls += 1
            input, rate, training = _read_call(*args, **kwargs)
            if self._calls == self.index + 1 and self.channels in (input.shape[-1], input.numel() // len(input)):
                self._skipped = rate, training
                return input
        return func(*args, **kwargs)

    def __enter__(self) -> Callable[[torch.Tensor], torch.Tensor]:
        super().__enter__()
        return self.apply  # torch.compile traces a method, but no call of an object

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the dropout that was skipped."""
        return x if self._skipped is None else F.dropout(x, *self._skipped)


def _read_call(
        input: torch.Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
) -> Tuple[torch.Tensor, float, bool]:
    """Return input, rate and mode of a call of `torch.nn.functional.dropout`."""
    return input, p, training


class _Recorder(TorchFunctionMode):
    """Notes each dropout's rate and the storage that its output has to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: List[float] = []
        self.outputs: List[torch.Tensor] = []

    def __torch_function__(
            self,
            func: Callable,
            types: Any,
            args: Tuple[Any, ...] = (),
            kwargs: Optional[Dict[str, Any]] = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.dropout:
            return func(*args, **kwargs)
        input, rate, _ = _read_call(*args, **kwargs)
        self.rates.append(rate)
        self.outputs.append(input.clone())
        return self.outputs[-1]

    def find(self, tensor: torch.Tensor) -> Optional[int]:
        """Return which dropout with a rate gave a tensor or what it is a view of, None for none."""
        storage = tensor.untyped_storage().data_ptr()
        return next((
            i for i, (rate, output) in enumerate(zip(self.rates, self.outputs))
            if rate > 0 and output.untyped_storage().data_ptr() == storage), None)


def find_dropout_of(output: Callable[[], torch.Tensor]) -> Optional[int]:
    """Return which dropout call gives the output of a function of a model in eval mode, None where none does last."""
    with _Recorder() as recorder:
        tensor = output()
    return recorder.find(tensor)


def find_dropout_before(module: nn.Module, run: Callable[[], Any]) -> Optional[int]:
    """Return which dropout call gives the input of a module that is run once, None where none does."""
    with _Recorder() as recorder, inputs_of([module]) as (inputs,):
        run()
    return recorder.find(inputs[-1])


def count_dropouts(run: Callable[[], Any]) -> int:
    """Return how many dropouts with a rate something runs."""
    with _Recorder() as recorder:
        run()
    return sum(rate > 0 for rate in recorder.rates)
