"""Cached targets of a run: opening a cache, its teacher, filling what an epoch left out."""
import argparse
import hashlib
import logging
import os
from functools import partial
from typing import Any, Dict, List, Optional, Union

import torch
import torch.distributed as dist

from ..args.per_teacher import kwargs_by_teacher, model_of, teachers_of, value_for
from ..cache.codecs import Codec, feature_codec, logits_codec
from ..cache.header import Header, check_header, create_header, describe_versions, describe_views, read_header
from ..cache.table import table_bytes
from ..cache.targets import CachedTargets
from ..data import DataLoaders
from ..data.views import load_views
from ..errors import UsageError
from ..features.spec import FeatureSpec
from ..task import DistillTask
from ..teacher.standardize import Standardizer
from ..teacher.stored import StoredTeacher, describe_teacher
from ..teacher.teacher import Teacher, create_teacher
from ..utils.random import unchanged_randomness
from .device import Precision, resolve_dtype
from .state import Run

_logger = logging.getLogger(__name__)

_HUB = 'hf://datasets/'
_NEW_VIEWS = 10
_NEW_TOPK = 10


def cache_folder(args: argparse.Namespace) -> str:
    """Return the folder of `--teacher-cache`, downloaded where it names one of the hub; '' without the flag.

    Raises:
        UsageError: If it cannot be downloaded.
    """
    if not args.teacher_cache.startswith(_HUB):
        return args.teacher_cache
    from huggingface_hub import snapshot_download
    name, _, revision = args.teacher_cache[len(_HUB):].partition('@')
    try:
        return snapshot_download(name, repo_type='dataset', revision=revision or None)
    except Exception as e:  # the hub's client raises many kinds
        raise UsageError(
            f'--teacher-cache {args.teacher_cache} cannot be downloaded: {" ".join(str(e).split())[:300]}') from e


def count_views(args: argparse.Namespace) -> int:
    """Return the views of each image, 0 without a cache.

    Raises:
        UsageError: If the cache has another number, or there is neither cache nor teacher.
    """
    if not args.teacher_cache or args.kd == 'none':
        return 0
    header = read_header(cache_folder(args))
    if header is None:
        if not args.teacher:
            raise UsageError(
                f'--teacher-cache {args.teacher_cache} has no cache.json: give the folder of a cache, or --teacher to '
                'fill a new one')
        return args.cache_views or _NEW_VIEWS
    views = int(header['views']['cache_views'])
    if args.cache_views not in (None, views):
        raise UsageError(
            f'--cache-views {args.cache_views}: the cache {args.teacher_cache} has {views}, leave the flag out or fill '
            'another')
    return views


def resolve_teacher(
        args: argparse.Namespace,
        data_config: Dict[str, Any],
        device: torch.device,
        precision: Precision,
) -> Union[Teacher, StoredTeacher]:
    """Return the teacher as its cache knows it; a live one where there is no cache yet."""
    header = read_header(cache_folder(args))
    teacher = StoredTeacher(header['facts']) if header else create_live_teacher(args, data_config, device, precision)
    teacher.standardizer = Standardizer(value_for(args.teacher_standardize, ''))
    return teacher


def create_live_teacher(
        args: argparse.Namespace,
        data_config: Dict[str, Any],
        device: torch.device,
        precision: Precision,
) -> Teacher:
    """Create the teacher of the flags; no random number of the run is drawn, as none is where the cache is full."""
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
        )


def attach_targets(
        args: argparse.Namespace,
        task: DistillTask,
        data_config: Dict[str, Any],
        loaders: DataLoaders,
        precision: Precision,
) -> None:
    """Let a task read its teacher's outputs from the cache, with a live teacher where views are missing.

    Raises:
        UsageError: If the cache is of something else, or lacks views and there is no teacher.
    """
    folder = cache_folder(args)
    header = read_header(folder)
    assert loaders.grid is not None
    needs_classifier = any(method.needs_classifier for method in task.module.methods.values())
    if 'head' in task.teacher_outputs or needs_classifier:
        raise UsageError(
            f'--kd {args.kd} reads the teacher\'s own head, which no cache holds: leave out --teacher-cache')
    if task.teacher_outputs & {'tail', 'blocks'}:
        raise UsageError(
            f"--kd {args.kd} reads the teacher's own last stage or its first blocks, which no cache holds: leave out "
            '--teacher-cache')
    if header is None:
        assert isinstance(task.teacher, Teacher)
        facts = describe_teacher(task.teacher)
        new = {'format': 1, **_describe(args, data_config, loaders, task.teacher, precision), 'facts': facts}
        new.update(forms=_choose_forms(args, task), slots=len(loaders.grid))
        header = create_header(folder, new)
    check_header(folder, header, _describe(args, data_config, loaders, task.teacher, precision))
    spec = StoredTeacher(header['facts']).feature_spec
    codecs = choose_codecs(args, task, spec, header)
    writable = bool(args.teacher) and not args.teacher_cache.startswith(_HUB) and os.access(folder, os.W_OK)
    task.targets = CachedTargets(folder, loaders.grid, codecs, writable)
    missing = _from_first_rank(args, task.targets.count_missing(loaders.grid.num_views))
    _report_size(args, task.targets, missing)
    if isinstance(task.teacher, Teacher):
        return
    if args.teacher:
        task.summon_teacher = partial(_summon_teacher, args, data_config, loaders, precision, folder, task.device)
    if missing and not args.teacher:
        raise UsageError(
            f'--teacher-cache {args.teacher_cache} lacks {missing} of {len(loaders.grid)} views of what --kd {args.kd} '
            f'reads ({", ".join(codec.name for codec in codecs.values())}): give --teacher to fill them')
    if task.summon_teacher is not None and (missing or args.cache_check):
        task.summon()


def _summon_teacher(
        args: argparse.Namespace,
        data_config: Dict[str, Any],
        loaders: DataLoaders,
        precision: Precision,
        folder: str,
        device: torch.device,
) -> Teacher:
    """Create the teacher of a cache that is there already, also in the middle of a run whose cache is damaged."""
    teacher = create_live_teacher(args, data_config, device, precision)
    header = read_header(folder)
    assert header is not None
    check_header(folder, header, _describe(args, data_config, loaders, teacher, precision))
    return teacher


def choose_codecs(
        args: argparse.Namespace,
        task: DistillTask,
        spec: FeatureSpec,
        header: Optional[Header] = None,
) -> Dict[str, Codec]:
    """Return the form of every output that the methods read, by flags, else as the cache has it."""
    forms = {**_choose_forms(args, task), **((header or {}).get('forms') or {})}
    if args.cache_topk is not None:
        forms['topk'] = args.cache_topk
    precision = args.cache_precision or forms['precision']
    codecs: Dict[str, Codec] = {}
    if 'logits' in task.teacher_outputs:
        explicit = args.cache_topk is not None
        temperature = softmax_temperature(task)
        codecs['logits'] = logits_codec(
            spec.num_classes, forms['topk'] if explicit or temperature is not None else 0, temperature)
    if 'feature' in task.teacher_outputs:
        codecs['feature'] = feature_codec('feature', spec.feature, precision)
    if 'pre_logits' in task.teacher_outputs:
        codecs['pre_logits'] = feature_codec('pre_logits', (spec.pre_logits,), precision)
    if 'stages' in task.teacher_outputs:
        codecs.update({
            f'stage{i}': feature_codec(f'stage{i}', stage.shape, precision) for i, stage in enumerate(spec.stages)})
    if args.train_img_sizes and codecs.keys() - {'logits', 'pre_logits'}:
        raise UsageError(
            '--teacher-cache stores maps of one size: with --train-img-sizes it takes methods that read logits or '
            'pre-logits')
    return codecs


def softmax_temperature(task: DistillTask) -> Optional[float]:
    """Return the one temperature at which all methods read the teacher's softmax; None where one of them reads more."""
    methods: List[Any] = list(task.module.methods.values())
    readers = [method for method in methods if 'logits' in method.teacher_outputs]
    probe = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    changed = any(not torch.equal(method.transform_logits(probe), probe) for method in methods)
    temperatures = {float(method.temperature) for method in readers if method.reads_softmax}
    if changed or len(temperatures) != 1 or not all(method.reads_softmax for method in readers):
        return None
    return temperatures.pop()


def report_cache_size(args: argparse.Namespace, task: DistillTask, num_samples: int) -> List[str]:
    """Return one line on the size of a cache for each method, as `--dry-run` prints it."""
    (teacher,) = task.teachers.values()
    views = args.cache_views or _NEW_VIEWS
    codecs = choose_codecs(args, task, teacher.feature_spec)
    slots = num_samples * views * max(1, args.aug_splits) * len(args.train_img_sizes or [0])
    sizes = {name: table_bytes(slots, codec.row_bytes) for name, codec in codecs.items()}
    lines = []
    for name, method in task.module.methods.items():
        outputs: Any = method.teacher_outputs
        read = [
            output for output in codecs
            if output in outputs or output.startswith('stage') and 'stages' in outputs
            or 'tap' in outputs and output in ('feature', 'pre_logits')]
        total = sum(sizes[output] for output in read)
        words = ', '.join(f'{codecs[output].name} {codecs[output].row_bytes} bytes a view' for output in read)
        lines.append(f'cache for {name}: {_bytes(total)} ({words})')
    lines.append(f'cache of {views} views of {num_samples} images: {_bytes(sum(sizes.values()))}')
    return lines


def begin_epoch(run: Run, epoch: int) -> None:
    """Have the teacher confirm some of the views of an epoch."""
    if run.task.targets is not None:
        run.task.targets.num_checks = run.args.cache_check


def end_epoch(run: Run, epoch: int) -> None:
    """Fill the views that an epoch dropped with its last, incomplete batch, and flush."""
    targets, grid = run.task.targets, run.loaders.grid
    if targets is None or grid is None:
        return
    if isinstance(run.task.teacher, Teacher) and targets.writable and grid.num_sizes == grid.num_repeats == 1:
        if run.args.distributed:
            targets.flush()
            dist.barrier()
        keys = targets.missing(grid.number_of(epoch))
        if len(keys) <= run.args.batch_size * run.args.world_size:
            fill_views(run, keys)
    targets.flush()


def fill_views(run: Run, keys: Any, num_workers: int = 0) -> int:
    """Let the teacher see views that are missing, this process its part of them; returns how many."""
    targets = run.task.targets
    assert targets is not None
    own = keys[run.args.rank::run.args.world_size]
    for input, target in load_views(run.loaders.train, own, run.args.batch_size, num_workers) if len(own) else ():
        input, target = run.compute.prepare_batch(input, target)
        with torch.no_grad(), run.precision.autocast():
            run.task.read_targets(input, target)
        if not targets.writable:
            break
    return len(own)


def _describe(
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
            **_describe_flags(args),
            **(_describe_live(args, teacher, precision) if isinstance(teacher, Teacher) else {}),
        },
    }


def _describe_flags(args: argparse.Namespace) -> Dict[str, Any]:
    """Return what the flags say of the teacher; a cache that is full is compared with no more."""
    said: Dict[str, Any] = {}
    if args.teacher:
        said = {
            'architecture': model_of(args.teacher, ''), 'kwargs': _model_kwargs(args),
            'pretrained': args.teacher_pretrained}
    if args.teacher_checkpoint:
        said['checkpoint'] = _hash_file(value_for(args.teacher_checkpoint, ''))
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
        'precision': f'{str(teacher.prepare.dtype).removeprefix("torch.")}{autocast}',
        **{name: value for name, value in teacher.preprocessing.values().items()},
    }


def _hash_file(path: str) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, 'rb') as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as e:
        raise UsageError(f'--teacher-checkpoint {path} cannot be read: {e.strerror or e}') from e
    return digest.hexdigest()[:16]


def _choose_forms(args: argparse.Namespace, task: DistillTask) -> Dict[str, Any]:
    topk = args.cache_topk
    if topk is None:
        reads_logits = 'logits' in task.teacher_outputs
        topk = 0 if reads_logits and softmax_temperature(task) is None else _NEW_TOPK
    return {'topk': topk, 'precision': args.cache_precision or 'float16'}


def _report_size(args: argparse.Namespace, targets: CachedTargets, missing: int) -> None:
    if args.rank != 0:
        return
    size = sum(table_bytes(len(targets.grid), codec.row_bytes) for codec in targets.codecs.values())
    names = ', '.join(codec.name for codec in targets.codecs.values())
    state = f'{missing} are missing' if missing else 'complete, no teacher is needed'
    _logger.info(
        f'Cached targets in {targets.folder}: {names}, {len(targets.grid)} views, {_bytes(size)} when full; {state}.')


def _from_first_rank(args: argparse.Namespace, value: int) -> int:
    if not args.distributed:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _bytes(count: float) -> str:
    units = ['bytes', 'kB', 'MB', 'GB', 'TB']
    while count >= 1000 and len(units) > 1:
        count /= 1000
        del units[0]
    return f'{count:.4g} {units[0]}'

