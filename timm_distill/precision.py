"""Float32 or better inside of low-precision training: losses of differences need it."""
from contextlib import contextmanager
from functools import wraps
from typing import Any, Callable, Iterator, TypeVar

import torch

Function = TypeVar('Function', bound=Callable[..., Any])


def to_full_precision(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in float32, or as it is when it is float32 or float64."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute CUDA products of float32 in float32: TF32 would lose the loss to cancellation."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def in_full_precision(function: Function) -> Function:
    """Decorate a function of tensors (or sequences of them): it computes in float32 or better, outside autocast.

    Autocast would run a loss's own matrix products in low precision whatever the precision of its inputs.
    """
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = _device_type([*args, *kwargs.values()])
        with full_float32(), torch.autocast(device, enabled=False):
            return function(*(_convert(x) for x in args), **{name: _convert(x) for name, x in kwargs.items()})
    return run  # type: ignore[return-value]


def _convert(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return to_full_precision(value)
    return [_convert(x) for x in value] if isinstance(value, (list, tuple)) else value


def _device_type(values: Any) -> str:
    """Return the device type of the first tensor."""
    for value in values:
        if isinstance(value, torch.Tensor):
            return value.device.type
        if isinstance(value, (list, tuple)) and value:
            return _device_type(value)
    raise ValueError('There is no tensor among the arguments.')
