"""Float32 or better inside of low-precision training: losses of differences need it."""
from contextlib import contextmanager
from functools import wraps
from typing import Any, Callable, Iterator, Tuple, TypeVar, cast

import torch

Function = TypeVar('Function', bound=Callable[..., Any])


def to_full_precision(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in float32, or as it is when it is float32 or float64."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# What is read and set of float32 products, torch >= 2.9: reading the older flags raises where these were set alone.
_backends: Any = torch.backends
_SETTINGS: Tuple[Any, ...] = ()
if hasattr(_backends.cuda.matmul, 'fp32_precision'):
    _SETTINGS = (_backends.cuda.matmul, _backends.cudnn.conv, _backends.mkldnn.matmul, _backends.mkldnn.conv)


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute products of float32 in float32: TF32, or bfloat16 on the CPU, would lose the loss to cancellation."""
    previous = _set_full_float32()
    try:
        yield
    finally:
        _restore_float32(previous)


@torch.compiler.disable  # settings of the process are nothing to trace
def _set_full_float32() -> Tuple[Any, ...]:
    """Return the settings of float32 products as they were."""
    if not _SETTINGS:
        previous = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision('highest')
        torch.backends.cudnn.allow_tf32 = False
        return previous
    values = tuple(setting.fp32_precision for setting in _SETTINGS)
    for setting in _SETTINGS:
        setting.fp32_precision = 'ieee'
    return values


@torch.compiler.disable
def _restore_float32(previous: Tuple[Any, ...]) -> None:
    if not _SETTINGS:
        torch.set_float32_matmul_precision(previous[0])
        torch.backends.cudnn.allow_tf32 = previous[1]
    for setting, value in zip(_SETTINGS, previous):
        setting.fp32_precision = 'none'  # that of the backend, or of all backends: one that was inherited stays so
        if setting.fp32_precision != value:
            setting.fp32_precision = value


def in_full_precision(function: Function) -> Function:
    """Decorate a function of tensors (or sequences of them): it computes in float32 or better, outside autocast.

    Autocast would run a loss's own matrix products in low precision whatever the precision of its inputs.
    """
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = _device_type([*args, *kwargs.values()])
        with full_float32(), torch.autocast(device, enabled=False):
            return function(*(_convert(x) for x in args), **{name: _convert(x) for name, x in kwargs.items()})
    return cast(Function, run)


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
