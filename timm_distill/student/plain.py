"""The plain student, without adapters: built again by name, as whoever loads the released file does, or copied."""
import copy
import logging
from typing import Optional

import timm
import torch
import torch.nn as nn
from timm.layers import SplitBatchNorm2d

from ..features.inputs import CANNOT_RUN
from ..utils._compat import get_model_kwargs
from .merge import MERGE_TOLERANCE, merge_error

_logger = logging.getLogger(__name__)


def create_plain_student(student: nn.Module, images: torch.Tensor) -> nn.Module:
    """Return a model without adapters that takes the student's plain state dict, with its weights, in eval mode.

    The architecture is built again by its timm name and arguments where that is measured to be the student: loading a
    state dict into it is what happens to the released file, with all weights that the architecture ties tied anew.
    Else it is a deep copy.

    Args:
        student: Student as trained; it stays as it is.
        images: Batch to compare both on, [B, C, H, W].
    """
    copied = copy_plain_student(student)
    rebuilt = _build_again(student)
    if rebuilt is None:
        return copied
    try:
        rebuilt.load_state_dict(copied.state_dict())
        error = merge_error(copied, rebuilt, images)
    except CANNOT_RUN as e:
        _logger.debug(f'{type(student).__name__} built again is another model: {e}')
        return copied
    if error <= MERGE_TOLERANCE[images.dtype]:
        return rebuilt
    _logger.debug(f'{type(student).__name__} built again gives other logits (difference {error:.1e})')
    return copied


def copy_plain_student(student: nn.Module) -> nn.Module:
    """Return a deep copy of a student without what `--split-bn` adds, in eval mode."""
    model = copy.deepcopy(student)
    for module in model.modules():
        if isinstance(module, SplitBatchNorm2d):
            module.aux_bn = nn.ModuleList()  # not used in eval mode
    return _without_distilled_training(model).eval()


def _without_distilled_training(model: nn.Module) -> nn.Module:
    if hasattr(model, 'set_distilled_training'):
        model.set_distilled_training(False)  # a plain model gives one tensor of logits in training too
    return model


def _build_again(student: nn.Module) -> Optional[nn.Module]:
    """Return a new model of the student's architecture, None where timm did not build it."""
    name = (getattr(student, 'pretrained_cfg', None) or {}).get('architecture')
    kwargs = get_model_kwargs(student)
    if not name or kwargs is None:
        return None
    kwargs = {'num_classes': getattr(student, 'num_classes', None), **kwargs, 'pretrained': False}
    try:
        with torch.random.fork_rng(devices=[]):  # it is built on the CPU
            model = timm.create_model(name, **kwargs)
    except CANNOT_RUN as e:
        _logger.debug(f'{name} cannot be built again: {e}')
        return None
    parameter = next(student.parameters())
    model.to(device=parameter.device, dtype=parameter.dtype)
    if any(_is_channels_last(p) for p in student.parameters()):
        model.to(memory_format=torch.channels_last)
    return _without_distilled_training(model).eval()


def _is_channels_last(x: torch.Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
