"""Cached targets of a run: opening a cache, filling what an epoch left out."""
import argparse
import logging
import os
from typing import Any, Dict

import torch
import torch.distributed as dist

from ..cache.header import Header, check_header, create_header, read_header
from ..cache.location import is_remote, locate_cache
from ..cache.table import table_bytes
from ..cache.targets import CachedTargets
from ..checkpoint.file import why_unwritten
from ..data import DataLoaders
from ..data.views import load_views
from ..errors import UsageError
from ..task import DistillTask
from ..teacher.stored import StoredTeacher, describe_teacher
from ..teacher.teacher import Teacher
from .cache_forms import NEW_VIEWS, choose_codecs, choose_forms, describe_bytes, known_classes
from .cache_teacher import describe_targets, summoning
from .device import Precision
from .state import Run

_logger = logging.getLogger(__name__)


def count_views(args: argparse.Namespace) -> int:
    """Return the views of each image, 0 without a cache.

    Raises:
        UsageError: If the cache has another number, or there is neither cache nor teacher.
    """
    if not args.teacher_cache or args.kd == 'none':
        return 0
    header = read_header(locate_cache(args.teacher_cache))
    if header is None:
        if not args.teacher or is_remote(args.teacher_cache):
            raise UsageError(
                f'--teacher-cache {args.teacher_cache} has no cache.json: give the folder of a cache, or --teacher to '
                'fill a new one in a folder of this machine')
        return args.cache_views or NEW_VIEWS
    views = int(header['views']['cache_views'])
    if args.cache_views not in (None, views):
        raise UsageError(
            f'--cache-views {args.cache_views}: the cache {args.teacher_cache} has {views}, leave the flag out or fill '
            'another')
    return views


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
    folder = locate_cache(args.teacher_cache)
    header = read_header(folder)
    assert loaders.grid is not None
    here = describe_targets(args, data_config, loaders, task.teacher, precision)
    if header is None:
        header = _begin_cache(args, task, folder, {**here, 'slots': len(loaders.grid)})
    check_header(folder, header, here)
    spec = StoredTeacher(header['facts']).feature_spec
    codecs = choose_codecs(args, task, spec, header, folder)
    writable = bool(args.teacher) and not is_remote(args.teacher_cache) and os.access(folder, os.W_OK)
    task.targets = CachedTargets(folder, loaders.grid, codecs, writable, spec.num_classes, known_classes(task))
    missing = _from_first_rank(args, task.targets.count_missing(loaders.grid.num_views))
    _report_size(args, task.targets, missing)
    task.summon_teacher = summoning(args, data_config, loaders, precision, task)
    if missing and not args.teacher:
        raise UsageError(
            f'--teacher-cache {args.teacher_cache} lacks {missing} of {len(loaders.grid)} views of what --kd {args.kd} '
            f'reads ({", ".join(codec.name for codec in codecs.values())}): give --teacher to fill them')
    if task.summon_teacher is not None and (missing or args.cache_check):
        task.summon()


def _begin_cache(args: argparse.Namespace, task: DistillTask, folder: str, content: Header) -> Header:
    """Write the header of a new cache.

    Raises:
        UsageError: If it cannot be written.
    """
    assert isinstance(task.teacher, Teacher)
    facts = describe_teacher(task.teacher)
    try:
        return create_header(folder, {'format': 1, **content, 'facts': facts, 'forms': choose_forms(args, task)})
    except OSError as e:
        raise UsageError(
            f'--teacher-cache {args.teacher_cache} holds no cache yet and cannot be written '
            f'({why_unwritten(e)}): give another folder') from e


def begin_epoch(run: Run, epoch: int) -> None:
    """Have the teacher confirm some of the views of an epoch."""
    if run.task.targets is not None:
        run.task.targets.num_checks = run.args.cache_check


def end_epoch(run: Run, epoch: int) -> None:
    """Fill the views that an epoch dropped with its last, incomplete batch, and flush."""
    targets, grid = run.task.targets, run.loaders.grid
    if targets is None or grid is None:
        return
    targets.flush()
    able = isinstance(run.task.teacher, Teacher) and targets.writable
    if grid.num_sizes == grid.num_repeats == 1 and _on_all_ranks(run, able):
        keys = _from_first_rank(run.args, targets.missing(grid.number_of(epoch)))
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


def _report_size(args: argparse.Namespace, targets: CachedTargets, missing: int) -> None:
    if args.rank != 0:
        return
    size = sum(table_bytes(len(targets.grid), codec.row_bytes) for codec in targets.codecs.values())
    names = ', '.join(codec.name for codec in targets.codecs.values())
    state = f'{missing} are missing' if missing else 'complete, the teacher need not run'
    if missing and not targets.writable:
        state += ' and are not stored, as the cache is only read'
    _logger.info(
        f'Cached targets in {targets.folder}: {names}, {len(targets.grid)} views, {describe_bytes(size)} when full; '
        f'{state}.')


def _on_all_ranks(run: Run, value: bool) -> bool:
    """Whether something holds on every process; all of them ask, whatever it is on their own."""
    if not run.args.distributed:
        return value
    count = torch.tensor(int(value), device=run.device)
    dist.all_reduce(count, op=dist.ReduceOp.MIN)
    return bool(count)


def _from_first_rank(args: argparse.Namespace, value: Any) -> Any:
    if not args.distributed:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
