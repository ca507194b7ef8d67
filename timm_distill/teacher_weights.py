"""A teacher's model with its weights: timm's pretrained ones, those of a hub or folder, or those of a file.

Whatever is missing, unreadable or of another architecture is one clear error; nothing is re-initialised silently.
"""
import difflib
import logging
import os
from typing import Any, Dict, Optional

import timm
import torch
import torch.nn as nn
from timm.models import load_state_dict

from .errors import UsageError

_logger = logging.getLogger(__name__)

_HUB_PREFIXES = ('hf-hub:', 'hf_hub:', 'local-dir:')


def load_teacher_model(
        name: str,
        in_chans: int,
        num_classes: int,
        checkpoint: Optional[str] = None,
        pretrained: bool = True,
        model_kwargs: Optional[Dict[str, Any]] = None,
        verbose: bool = True,
) -> nn.Module:
    """Create a teacher's model by name, with its weights; the arguments are those of `create_teacher`.

    Raises:
        UsageError: If the name is unknown, or the weights are missing, unreadable or of another architecture.
    """
    kwargs = {'in_chans': in_chans, **(model_kwargs or {})}
    if checkpoint:
        return _load_checkpoint_teacher(name, checkpoint, kwargs)
    if pretrained:
        return _load_pretrained_teacher(name, kwargs)
    if verbose:
        _logger.warning(f'The teacher {name} has random weights (--no-teacher-pretrained): there is nothing to '
                        'learn from it. Give it weights with --teacher-checkpoint FILE.')
    return _create_model(name, **{'num_classes': num_classes, **kwargs})


def _create_model(name: str, **kwargs: Any) -> nn.Module:
    if not name.startswith(_HUB_PREFIXES) and not timm.is_model(name):
        raise UsageError(f"Unknown teacher '{name}'{_similar_models(name)}. --teacher takes a timm architecture, "
                         'hf-hub:REPO or local-dir:FOLDER.')
    try:
        return timm.create_model(name, **kwargs)
    except (TypeError, AttributeError, AssertionError) as e:
        raise UsageError(f"The teacher '{name}' does not take these --teacher-kwargs: {e}") from e


def _similar_models(name: str) -> str:
    similar = timm.list_models(f'*{name}*')[:3] or difflib.get_close_matches(name, timm.list_models(), n=3)
    return f' (did you mean {", ".join(similar)}?)' if similar else ''


def _load_pretrained_teacher(name: str, kwargs: Dict[str, Any]) -> nn.Module:
    if 'num_classes' in kwargs:
        raise UsageError(f'--teacher-kwargs num_classes={kwargs["num_classes"]} would re-initialise the head of the '
                         f"pretrained teacher '{name}'. Leave it out, or give --teacher-checkpoint FILE.")
    hub = name.startswith(_HUB_PREFIXES)
    if not hub and timm.is_model(name) and not timm.is_model_pretrained(name):
        raise UsageError(f"timm has no pretrained weights for the teacher '{name}'. Give --teacher-checkpoint FILE, or "
                         '--no-teacher-pretrained to distil from random weights.')
    try:
        return _create_model(name, pretrained=True, **kwargs)
    except UsageError:
        raise
    except Exception as e:  # the hub raises errors of many libraries: connection, missing file, wrong keys
        raise UsageError(f"The pretrained weights of the teacher '{name}' could not be loaded "
                         f'({type(e).__name__}: {str(e).splitlines()[0] if str(e) else "no message"}). '
                         'Give --teacher-checkpoint FILE, or --no-teacher-pretrained.') from e


def _load_checkpoint_teacher(name: str, checkpoint: str, kwargs: Dict[str, Any]) -> nn.Module:
    state_dict = read_state_dict(checkpoint, '--teacher-checkpoint')
    model = _create_model(name, **kwargs)
    num_classes = _count_classes(model, state_dict)
    if num_classes and num_classes != getattr(model, 'num_classes', num_classes):
        model = _create_model(name, **{**kwargs, 'num_classes': num_classes})
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as e:
        raise UsageError(f"--teacher-checkpoint {checkpoint} does not fit the architecture '{name}': "
                         f'{_load_error(model, state_dict)}. Change --teacher or --teacher-kwargs.') from e
    return model


def read_state_dict(path: str, flag: str) -> Dict[str, torch.Tensor]:
    """Read weights from a .safetensors, .pth or training checkpoint, weights-only.

    Raises:
        UsageError: If the file is missing, unreadable or would run code; names `flag`.
    """
    if not os.path.isfile(path):
        raise UsageError(f'{flag} {path}: there is no such file.')
    try:
        return load_state_dict(path, use_ema=True, weights_only=True)
    except Exception as e:  # truncated zip, bad header, pickle with code: each library has its own error
        raise UsageError(f'{flag} {path} is not a readable checkpoint '
                         f'({type(e).__name__}: {str(e).splitlines()[0] if str(e) else "no message"}).') from e


def _count_classes(model: nn.Module, state_dict: Dict[str, torch.Tensor]) -> Optional[int]:
    """Return the class count of the weights: the rows of what is the classifier's weight in the model."""
    classifier = model.get_classifier() if hasattr(model, 'get_classifier') else None
    for name, module in model.named_modules():
        weight = state_dict.get(f'{name}.weight')
        if module is classifier and weight is not None and weight.ndim >= 2:
            return weight.shape[0]
    return None


def _load_error(model: nn.Module, state_dict: Dict[str, torch.Tensor]) -> str:
    own = model.state_dict()
    missing = sorted(own.keys() - state_dict.keys())
    unexpected = sorted(state_dict.keys() - own.keys())
    shapes = [f'{k} is {list(state_dict[k].shape)}, not {list(own[k].shape)}'
              for k in own if k in state_dict and own[k].shape != state_dict[k].shape]
    parts = [
        f'{len(keys)} {what} ({", ".join(keys[:3])}{", ..." if len(keys) > 3 else ""})'
        for what, keys in (('missing', missing), ('unexpected', unexpected), ('of another shape', shapes)) if keys
    ]
    return ', '.join(parts)
