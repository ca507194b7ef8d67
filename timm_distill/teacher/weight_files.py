"""Weights from a file, and what the file says of the images that they were trained on.

Loading is weights-only; whatever is missing, unreadable or no weights is one clear error.
"""
import argparse
import json
import os
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict

from ..checkpoint.file import read_checkpoint
from ..checkpoint.run_files import is_unmerged, nonfinite_tensors
from ..errors import UsageError
from .preprocessing import InputRecord

_RAW_KEYS, _EMA_KEYS = ('state_dict', 'model'), ('state_dict_ema', 'model_ema')  # as timm reads them
_READ_ELSEWHERE = ('img_size', 'in_chans', 'num_classes')
_HUB_FILES = ('model.safetensors', 'pytorch_model.bin')  # lie beside a config.json that describes them


@dataclass(frozen=True)
class WeightFile:
    """Weights and what is known of them.

    Attributes:
        state_dict: The weights by name.
        entry: The entry of a training checkpoint that they are, '' for a file of weights alone.
        records: What the file says of the input, the one that counts most first.
        follows_defaults: Name of the flags that it holds of a run with timm's scripts, which are complete: what they
            leave open was the architecture's default. '' where there are none.
        model_kwargs: What its flags say of the model beside its size and class count, as arguments of
            `timm.create_model`.
        architecture: The model that these are of.
    """
    state_dict: Dict[str, torch.Tensor]
    entry: str
    records: Tuple[InputRecord, ...]
    follows_defaults: str = ''
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    architecture: str = ''

    @property
    def size(self) -> Optional[Tuple[int, int]]:
        """(height, width) of the images, None where nothing says it."""
        return next((record.size for record in self.records if record.size is not None), None)


def read_weight_file(path: str, flag: str, weights: Optional[str] = None) -> WeightFile:
    """Read a .safetensors, .pth or training checkpoint.

    Args:
        path: The file.
        flag: What named it, for messages.
        weights: 'raw' or 'ema' of a training checkpoint; None takes the averaged ones where there are any.

    Raises:
        UsageError: If the file is missing, unreadable, would run code, holds no finite weights, or not those asked for.
    """
    content = _read(path, flag)
    if is_unmerged(content, path):
        raise UsageError(
            f'{flag} {path} holds a student that was written because it could not be merged: its adapter '
            'is not in its weights. Give another checkpoint of its run.')
    entry = _choose_entry(content, path, flag, weights)
    state_dict = content[entry] if entry else content
    _check_tensors(state_dict, path, flag)
    nonfinite = nonfinite_tensors(state_dict, constant=None)
    if nonfinite:
        raise UsageError(
            f'{flag} {path}: {len(nonfinite)} of its tensors are not finite ({", ".join(nonfinite[:3])}): '
            'its training diverged. Give another checkpoint.')
    name = os.path.basename(path)
    args = content.get('args') if entry else None
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    records = [
        *_config_records(content.get('data_config') if entry else None, f'the data_config in {name}'),
        *_config_records(args, f'the args in {name}'),
        *_config_records(content.get('pretrained_cfg') if entry else None, f'the pretrained_cfg in {name}'),
        *_config_records(_read_hub_config(path), 'the config.json beside it'),
    ]
    follows_defaults = f'the args in {name}' if {'mean', 'std', 'img_size', 'interpolation'} <= args.keys() else ''
    return WeightFile(
        clean_state_dict(state_dict), entry, tuple(records), follows_defaults, _model_kwargs(args),
        str(args.get('model', '')))


def _model_kwargs(args: Mapping[str, Any]) -> Dict[str, Any]:
    """Return what flags say of a model's computation; sizes, channels and classes are read from other places."""
    flags = {'global_pool': args.get('gp'), 'bn_eps': args.get('bn_eps')}
    given = args.get('model_kwargs')
    kwargs = {**flags, **(given if isinstance(given, dict) else {})}
    return {name: value for name, value in kwargs.items() if value is not None and name not in _READ_ELSEWHERE}


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


def _choose_entry(content: Mapping[str, Any], path: str, flag: str, weights: Optional[str]) -> str:
    """Return the entry with the weights, '' where the content is the weights."""
    present = {
        kind: next((key for key in keys if content.get(key) is not None), '')
        for kind, keys in (('raw', _RAW_KEYS), ('ema', _EMA_KEYS))
    }
    if weights is not None and not present[weights] and (present['raw'] or present['ema'] or weights == 'ema'):
        other = 'raw' if weights == 'ema' else 'ema'
        raise UsageError(
            f'{flag} {path} holds no {"averaged" if weights == "ema" else "raw"} weights: '
            f'give --teacher-weights {other}, or leave it out.')
    return present[weights] if weights is not None else present['ema'] or present['raw']


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


def _read_hub_config(path: str) -> Optional[Dict[str, Any]]:
    """Return the `pretrained_cfg` that lies beside weights in the hub's format."""
    config = os.path.join(os.path.dirname(path), 'config.json')
    if os.path.basename(path) not in _HUB_FILES or not os.path.isfile(config):
        return None
    try:
        with open(config, encoding='utf-8') as file:
            content = json.load(file)
    except (OSError, ValueError):
        return None
    return content.get('pretrained_cfg') if isinstance(content, dict) else None


def _config_records(config: Any, source: str) -> List[InputRecord]:
    """Return what flags or a data config say of the input."""
    if not isinstance(config, dict):
        return []
    interpolation = config.get('interpolation')
    record = InputRecord(
        source,
        config.get('mean'),
        config.get('std'),
        recorded_size(config),
        interpolation if isinstance(interpolation, str) and interpolation else None,
    )
    said = (record.mean, record.std, record.size, record.interpolation)
    return [record] if any(value is not None for value in said) else []


def recorded_size(config: Mapping[str, Any]) -> Optional[Tuple[int, int]]:
    """Return the (height, width) that flags or a data config name, None where they name none."""
    model_kwargs = config.get('model_kwargs')
    sizes = [config.get('input_size'), config.get('img_size')]
    if isinstance(model_kwargs, dict):
        sizes.append(model_kwargs.get('img_size'))
    for size in sizes:
        height, width = size[-2:] if isinstance(size, (tuple, list)) and len(size) > 1 else (size, size)
        if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0:
            return height, width
    return None
