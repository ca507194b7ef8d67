"""Weights from a file, and what the file says of the images that they were trained on.

Whatever is missing, unreadable or no weights is one clear error.
"""
import argparse
import json
import os
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch

from ..checkpoint.run_files import nonfinite_tensors
from ..checkpoint.weights import read_weights
from ..errors import UsageError
from .preprocessing import InputRecord

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
        label_names: Names of its classes, None where it says none.
    """
    state_dict: Dict[str, torch.Tensor]
    entry: str
    records: Tuple[InputRecord, ...]
    follows_defaults: str = ''
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    architecture: str = ''
    label_names: Any = None

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
    other = 'raw' if weights == 'ema' else 'ema'
    file = read_weights(path, flag, weights, f'give --teacher-weights {other}, or leave it out')
    content, entry = file.content, file.entry
    nonfinite = nonfinite_tensors(file.state_dict, constant=None)
    if nonfinite:
        raise UsageError(
            f'{flag} {path}: {len(nonfinite)} of its tensors are not finite ({", ".join(nonfinite[:3])}): '
            'its training diverged. Give another checkpoint.')
    name = os.path.basename(path)
    args = content.get('args') if entry else None
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    hub_config = _read_hub_config(path)
    records = [
        *_config_records(content.get('data_config') if entry else None, f'the data_config in {name}'),
        *_config_records(args, f'the args in {name}'),
        *_config_records(content.get('pretrained_cfg') if entry else None, f'the pretrained_cfg in {name}'),
        *_config_records(hub_config.get('pretrained_cfg'), 'the config.json beside it'),
    ]
    follows_defaults = f'the args in {name}' if {'mean', 'std', 'img_size', 'interpolation'} <= args.keys() else ''
    return WeightFile(
        file.state_dict, entry, tuple(records), follows_defaults, _model_kwargs(args), str(args.get('model', '')),
        (content.get('label_names') if entry else None) or hub_config.get('label_names'))


def _model_kwargs(args: Mapping[str, Any]) -> Dict[str, Any]:
    """Return what flags say of a model's computation; sizes, channels and classes are read from other places."""
    flags = {'global_pool': args.get('gp'), 'bn_eps': args.get('bn_eps')}
    given = args.get('model_kwargs')
    kwargs = {**flags, **(given if isinstance(given, dict) else {})}
    return {name: value for name, value in kwargs.items() if value is not None and name not in _READ_ELSEWHERE}


def _read_hub_config(path: str) -> Dict[str, Any]:
    """Return the config that lies beside weights in the hub's format, empty where there is none."""
    config = os.path.join(os.path.dirname(path), 'config.json')
    if os.path.basename(path) not in _HUB_FILES or not os.path.isfile(config):
        return {}
    try:
        with open(config, encoding='utf-8') as file:
            content = json.load(file)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


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
