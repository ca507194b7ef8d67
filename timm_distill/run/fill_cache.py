"""Filling of a cache without training: a teacher sees every view that is missing, on any number of processes."""
import argparse
import logging
import time
from typing import Sequence

from ..args import check_train_args, create_train_parser, parse_args, translate_timm_distillation
from ..errors import UsageError
from ..methods import list_methods, load_method_file
from ..teacher.teacher import Teacher
from .build import build_run
from .cached import fill_views
from .state import Run

_logger = logging.getLogger(__name__)


def fill_cache(argv: Sequence[str]) -> int:
    """Fill a cache; one that was stopped goes on where it was.

    Args:
        argv: Flags of the training script. The student gives input size and normalisation and is not trained.

    Returns:
        Views that this process added.

    Raises:
        UsageError: As a training run, and for a cache that cannot be written.
    """
    args = parse_args(create_train_parser(), list(argv))
    for path in args.kd_module:
        load_method_file(path)
    translate_timm_distillation(args, list_methods())
    check_train_args(args, list_methods())
    check_fill_args(args)
    run = build_run(args)
    targets, grid = run.task.targets, run.loaders.grid
    assert targets is not None and grid is not None
    try:
        return sum(_fill_number(run, number) for number in range(grid.num_views))
    finally:
        targets.close()


def check_fill_args(args: argparse.Namespace) -> None:
    """Reject flags that leave nothing to fill, or nobody to do it."""
    for flag, value in (('--teacher-cache DIR', args.teacher_cache), ('--teacher NAME', args.teacher)):
        if not value:
            raise UsageError(f'fill needs {flag}')
    if args.kd == 'none':
        raise UsageError('fill needs --kd with the methods that will read the cache')


def _fill_number(run: Run, number: int) -> int:
    """Fill the views of one number."""
    targets, grid = run.task.targets, run.loaders.grid
    assert targets is not None and grid is not None
    start, added = time.monotonic(), 0
    for size in range(grid.num_sizes):
        keys = targets.missing(number, size)
        if len(keys) and not (targets.writable and isinstance(run.task.teacher, Teacher)):
            raise UsageError(
                f'--teacher-cache {targets.folder} cannot be written: it lacks {len(keys)} views of number {number}')
        added += fill_views(run, keys, run.args.workers)
    targets.flush()
    if added and run.args.rank == 0:
        rate = added / max(time.monotonic() - start, 1e-9)
        _logger.info(f'View {number + 1} of {grid.num_views}: {added} images, {rate:.0f} per second and process.')
    return added
