"""Provenance of a student: teacher and its hash, methods, data, versions. Plain values, kept in every checkpoint."""
import argparse
import os
import platform
from typing import Any, Dict, Mapping, Optional, Union

import timm
import torch
import torchvision

from ..args.per_teacher import teachers_of

_TRAINING_FLAGS = (
    'kd', 'kd_kwargs', 'kd_schedule', 'teacher_drop', 'epochs', 'opt', 'lr', 'weight_decay', 'sched', 'warmup_epochs',
    'grad_accum_steps', 'smoothing', 'mixup', 'cutmix', 'aa', 'reprob',
    'model_ema_decay', 'amp_dtype', 'seed')


def collect_provenance(
        args: argparse.Namespace,
        version: str,
        teacher_hash: Union[str, Mapping[str, str]] = '',
        num_samples: Optional[int] = None,
        weights: Optional[Mapping[str, float]] = None,
) -> Dict[str, Any]:
    """Return what is known of a run before it trains.

    Args:
        args: Flags of the run.
        version: Version of timm_distill.
        teacher_hash: Of the teacher's weights as loaded; of several by name.
        num_samples: Images of the training set.
        weights: Weights of the loss terms in force, defaults included.
    """
    provenance: Dict[str, Any] = {
        'training': {**_flags(args), **({'weights': dict(weights)} if weights else {})},
        'data': {
            # a folder's last name says what it is; its path says where somebody's machine keeps it
            'name': args.dataset or os.path.basename(os.path.abspath(str(args.data_dir or ''))),
            'training images': num_samples,
            'batch size': f'{args.batch_size} x {args.world_size}',
        },
        'versions': {
            'timm_distill': version,
            'timm': timm.__version__,
            'torch': str(torch.__version__),
            'torchvision': str(torchvision.__version__),
            'python': platform.python_version(),
        },
    }
    if args.teacher and args.kd != 'none':
        provenance['teacher'] = {
            'name': _name_of(args.teacher),
            'checkpoint': _file_names(args.teacher_checkpoint or ''),
            'sha256 of its weights': dict(teacher_hash) if isinstance(teacher_hash, Mapping) else teacher_hash,
        }
        if args.teacher_classes:
            provenance['teacher']['classes by'] = _file_names(args.teacher_classes)
        if args.teacher_standardize:
            provenance['teacher']['targets standardised'] = args.teacher_standardize
    return provenance


def _name_of(teacher: Any) -> Union[str, Dict[str, str]]:
    """Return the teacher's model, of several by name."""
    models = teachers_of(teacher)
    return models if len(models) > 1 else next(iter(models.values()))


def _file_names(paths: Union[str, Mapping[str, str]]) -> Union[str, Dict[str, str]]:
    """Return paths without the folders, which say where somebody's machine keeps files."""
    if isinstance(paths, Mapping):
        return {name: os.path.basename(path) for name, path in paths.items()}
    return os.path.basename(str(paths))


def _flags(args: argparse.Namespace) -> Mapping[str, Any]:
    values = {name: getattr(args, name, None) for name in _TRAINING_FLAGS}
    if not getattr(args, 'model_ema', False):
        values.pop('model_ema_decay')
    if not getattr(args, 'teacher_drop', 0.):
        values.pop('teacher_drop')
    if not getattr(args, 'amp', False):
        values.pop('amp_dtype')
    return {name: value for name, value in values.items() if value not in (None, '', {}, [])}
