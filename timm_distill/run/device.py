"""Device and precision of a run; both scripts resolve their flags here."""
import importlib
import logging
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Callable, Optional, Sequence

import torch
from timm.utils import NativeScaler

from ..errors import UsageError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Precision:
    """Precision of a run: dtypes and autocast.

    Attributes:
        model_dtype: Dtype of weights and input, None for float32.
        autocast: Makes the context of each forward pass.
        loss_scaler: Scales float16 gradients; None where none is needed.
    """
    model_dtype: Optional[torch.dtype]
    autocast: Callable
    loss_scaler: Optional[NativeScaler]


def import_device_modules(names: Sequence[str]) -> None:
    """Import what `--device-modules` names: packages that bring torch a device.

    Raises:
        UsageError: If one cannot be imported.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as e:  # whatever a foreign package raises
            raise UsageError(f"--device-modules '{name}' cannot be imported: {type(e).__name__}: {e}") from e


def resolve_device_name(name: Optional[str]) -> str:
    """Return `--device`; without one 'cuda' where there is one, and the CPU otherwise, with a line that says so.

    Raises:
        UsageError: If the device cannot be used here.
    """
    if name is None:
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
        if name == 'cpu':
            _logger.info('No CUDA device was found: running on the CPU (--device chooses another one).')
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as e:
        raise UsageError(f"--device '{name}' cannot be used here: {str(e).splitlines()[0]}") from e
    return name


def enable_fast_math() -> None:
    """Let CUDA use TF32 and search for the fastest convolutions, as timm's scripts do."""
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def resolve_precision(device: torch.device, amp: bool, amp_dtype: str, model_dtype: Optional[str]) -> Precision:
    """Resolve `--amp`, `--amp-dtype` and `--model-dtype`."""
    dtype = resolve_dtype(model_dtype)
    if not amp:
        return Precision(dtype, nullcontext, None)
    autocast_dtype = getattr(torch, amp_dtype)
    # only float16 gradients underflow, and only CUDA computes in float16
    scaler = NativeScaler(device=device.type) if device.type == 'cuda' and autocast_dtype == torch.float16 else None
    return Precision(dtype, partial(torch.autocast, device_type=device.type, dtype=autocast_dtype), scaler)


def resolve_dtype(name: Optional[str]) -> Optional[torch.dtype]:
    """Return the dtype of a flag such as `--model-dtype`, None where it is not given."""
    return getattr(torch, name) if name else None
