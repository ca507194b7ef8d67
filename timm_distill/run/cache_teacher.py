"""Teacher of a run with cached targets: known by its cache, or live, and what the cache has to say of it."""
import argparse
import hashlib
from functools import partial
from typing import Any, Callable, Dict, Optional, Union

import torch

from ..args.per_teacher import kwargs_by_teacher, model_of, teachers_of, value_for
from ..cache.header import Header, check_header, describe_versions, describe_views, read_header
from ..cache.location import locate_cache
from ..data import DataLoaders, known_names
from ..errors import UsageError
from ..methods._composition import methods_of
from ..task import DistillTask
from ..teacher.class_map import AUTO, FLAG, ClassMatch
from ..teacher.preprocessing import per_channel
from ..teacher.standardize import Standardizer
from ..teacher.stored import StoredTeacher
from ..teacher.teacher import Teacher, create_teacher
from ..utils.random import unchanged_randomness
from .device import Precision, resolve_dtype


def resolve_teacher(
        args: argparse.Namespace,
        data_config: Dict[str, Any],
        loaders: DataLoaders,
        device: torch.device,
        precision: Precision,
) -> Union[Teacher, StoredTeacher]:
    """Return the teacher as its cache knows it; a live one where there is no cache yet, or methods read its layers.

    Raises:
        UsageError: If they do and no flag names it.
    """
    header = read_header(locate_cache(args.teacher_cache))
    readers = [name for name, cls in methods_of(args.kd).items() if cls.reads_teacher_layers()]
    if readers and not args.teacher:
        raise UsageError(
            f"--kd {'+'.join(readers)} runs layers of the teacher itself, which no cache holds: give --teacher NAME "
            'too. What the teacher says of the images is read from the cache all the same.')
    reads_means = any(cls.needs_class_means for cls in methods_of(args.kd).values())
    lacks_means = reads_means and args.teacher and not value_for(args.nd_class_means, '')
    teacher: Union[Teacher, StoredTeacher]
    if header is None or readers or lacks_means:
        teacher = create_live_teacher(args, data_config, loaders, device, precision)
    else:
        teacher = StoredTeacher(header['facts'])
    teacher.standardizer = Standardizer(value_for(args.teacher_standardize, ''))
    return teacher


def create_live_teacher(
        args: argparse.Namespace,
        data_config: Dict[str, Any],
        loaders: DataLoaders,
        device: torch.device,
        precision: Precision,
) -> Teacher:
    """Create the teacher of the flags; no random number of the run is drawn, as none is where the cache is full."""
    classes: Optional[ClassMatch] = None
    if args.teacher_classes:
        names = known_names(loaders.train.dataset, args.num_classes)
        classes = ClassMatch(list(names) or [''] * args.num_classes, value_for(args.teacher_classes, ''))
    with unchanged_randomness():
        return create_teacher(
            model_of(args.teacher, ''),
            data_config['input_size'],
            args.num_classes,
            checkpoint=value_for(args.teacher_checkpoint, '') or None,
            pretrained=args.teacher_pretrained,
            model_kwargs=_model_kwargs(args),
            verbose=args.rank == 0,
            weights=value_for(args.teacher_weights, ''),
            mean=value_for(args.teacher_mean, ''),
            std=value_for(args.teacher_std, ''),
            img_size=value_for(args.teacher_img_size, ''),
            student_mean=data_config['mean'],
            student_std=data_config['std'],
            device=device,
            dtype=resolve_dtype(value_for(args.teacher_dtype, '')) or precision.model_dtype,
            autocast=args.teacher_dtype is None,
            classes=classes,
        )


def summoning(
        args: argparse.Namespace,
        data_config: Dict[str, Any],
        loaders: DataLoaders,
        precision: Precision,
        task: DistillTask,
) -> Optional[Callable[[], Teacher]]:
    """Return what creates the teacher of a cache that is there already, also in the middle of a run; None for none."""
    if not args.teacher or isinstance(task.teacher, Teacher):
        return None
    return partial(_summon_teacher, args, data_config, loaders, precision, task.device)


def _summon_teacher(
        args: argparse.Namespace,
        data_config: Dict[str, Any],
        loaders: DataLoaders,
        precision: Precision,
        device: torch.device,
) -> Teacher:
    folder = locate_cache(args.teacher_cache)
    teacher = create_live_teacher(args, data_config, loaders, device, precision)
    header = read_header(folder)
    assert header is not None
    check_header(folder, header, describe_targets(args, data_config, loaders, teacher, precision))
    return teacher


def describe_targets(
        args: argparse.Namespace,
        data_config: Dict[str, Any],
        loaders: DataLoaders,
        teacher: Any,
        precision: Precision,
) -> Header:
    """Return what this run's targets would depend on."""
    assert loaders.grid is not None
    return {
        'views': describe_views(args, data_config, loaders.grid),
        'data': loaders.fingerprints['training'],
        'versions': describe_versions(),
        'teacher': {
            **_describe_flags(args, data_config),
            **(_describe_live(args, teacher, precision) if isinstance(teacher, Teacher) else {}),
        },
    }


def _describe_flags(args: argparse.Namespace, data_config: Dict[str, Any]) -> Dict[str, Any]:
    """Return what the flags say of the teacher; a cache that is full is compared with no more."""
    choice = value_for(args.teacher_classes, '')
    said: Dict[str, Any] = {'classes': _hash_file(choice, FLAG) if choice not in ('', None, AUTO) else choice or None}
    if args.teacher:
        said.update(
            architecture=model_of(args.teacher, ''), kwargs=_model_kwargs(args), pretrained=args.teacher_pretrained)
    channels, size = data_config['input_size'][0], value_for(args.teacher_img_size, '')
    if args.teacher_dtype is not None:
        said['precision'] = value_for(args.teacher_dtype, '')
    for name, values in (('mean', value_for(args.teacher_mean, '')), ('std', value_for(args.teacher_std, ''))):
        if values is not None:
            said[name] = per_channel(values, channels).tolist()
    if size is not None:
        said['input_size'] = [channels, size, size]
    if args.teacher_checkpoint:
        said['checkpoint'] = _hash_file(value_for(args.teacher_checkpoint, ''), '--teacher-checkpoint')
        said['weights'] = value_for(args.teacher_weights, '')
    return said


def _model_kwargs(args: argparse.Namespace) -> Dict[str, Any]:
    """Return `--teacher-kwargs` of the one teacher, which may have a name."""
    names = [name for name in teachers_of(args.teacher) if name]
    kwargs = kwargs_by_teacher(args.teacher_kwargs, args.teacher)
    return kwargs[names[0]] if names else kwargs


def _describe_live(args: argparse.Namespace, teacher: Teacher, precision: Precision) -> Dict[str, Any]:
    autocast = f' in autocast to {args.amp_dtype}' if args.amp and teacher.autocast else ''
    return {
        'digest': teacher.digest,
        'class_sources': None if teacher.class_map is None else [list(item) for item in teacher.class_map.sources],
        'precision': f'{str(teacher.prepare.dtype).removeprefix("torch.")}{autocast}',
        **{name: value for name, value in teacher.preprocessing.values().items()},
    }


def _hash_file(path: str, flag: str) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, 'rb') as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as e:
        raise UsageError(f'{flag} {path} cannot be read: {e.strerror or e}') from e
    return digest.hexdigest()[:16]
