"""Weights from a file: .safetensors, .pth or a training checkpoint, weights-only."""
import os
from dataclasses import dataclass
from typing import Any, Dict, Mapping, Optional

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict

from ..errors import UsageError
from .file import read_checkpoint
from .run_files import is_unmerged

_KEYS = {'raw': ('state_dict', 'model'), 'ema': ('state_dict_ema', 'model_ema')}  # as timm reads them


@dataclass(frozen=True)
class Weights:
    """Weights and the file that they lie in.

    Attributes:
        state_dict: The weights by name, without the prefixes of wrappers.
        entry: The entry of a training checkpoint that they are, '' for a file of weights alone.
        content: All that the file holds.
    """
    state_dict: Dict[str, torch.Tensor]
    entry: str
    content: Dict[str, Any]


def read_weights(path: str, flag: str, kind: Optional[str] = None, hint: str = '') -> Weights:
    """Read the weights of a file.

    Args:
        path: The file.
        flag: What named it, for messages.
        kind: 'raw' or 'ema' of a training checkpoint; None takes the averaged ones where there are any.
        hint: What to do where it has none of that kind.

    Raises:
        UsageError: If the file is missing, unreadable, would run code, holds no weights, or not those asked for.
    """
    content = _read(path, flag)
    refuse_unmerged(content, path, flag)
    present = {
        kind: next((key for key in keys if content.get(key) is not None), '') for kind, keys in _KEYS.items()}
    if kind is not None and not present[kind] and (any(present.values()) or kind == 'ema'):
        raise UsageError(f'{flag} {path} holds no {"averaged" if kind == "ema" else "raw"} weights: {hint}.')
    entry = present[kind] if kind is not None else present['ema'] or present['raw']
    state_dict = content[entry] if entry else content
    _check_tensors(state_dict, path, flag)
    return Weights(clean_state_dict(state_dict), entry, content)


def refuse_unmerged(content: Mapping[str, Any], path: str, flag: str) -> None:
    """Raise a UsageError for the tensors of a student that could not be merged."""
    if is_unmerged(content, path):
        raise UsageError(
            f'{flag} {path} holds a student that was written because it could not be merged: its adapter '
            'is not in its weights. Give another checkpoint of its run.')


def _read(path: str, flag: str) -> Dict[str, Any]:
    if not os.path.isfile(path):
        raise UsageError(f'{flag} {path}: there is no such file.')
    if not path.endswith('.safetensors'):
        return read_checkpoint(path, flag)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as e:
        reason = ' '.join(str(e).split())[:200]
        raise UsageError(f'Cannot read {path!r} as safetensors ({reason}), check {flag}.') from e


def _check_tensors(state_dict: Any, path: str, flag: str) -> None:
    if not isinstance(state_dict, dict) or not state_dict:
        raise UsageError(f'{flag} {path} holds no weights: a {type(state_dict).__name__} instead of tensors by name.')
    wrong = [
        (name, value) for name, value in state_dict.items()
        if not isinstance(name, str) or not isinstance(value, torch.Tensor)]
    if wrong:
        name, value = wrong[0]
        raise UsageError(
            f'{flag} {path} holds no plain weights: its {str(name)[:80]!r} is a {type(value).__name__}, '
            f'not a tensor ({len(wrong)} of {len(state_dict)} entries).')
