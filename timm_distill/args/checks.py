"""Checks of flags that need neither model nor data, before anything is built."""
import argparse
import difflib
import inspect
import logging
import math
import os
import re
from typing import Any, Dict, List, Optional, Sequence, Tuple

from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.optim import get_optimizer_class, list_optimizers, optimizer_kwargs

from ..errors import UsageError
from .combinations import check_train_combinations
from .distillation import DOT_DELTA, resolve_kd
from .per_teacher import all_values, kwargs_by_teacher, teachers_of
from .ranges import check_ranges

_logger = logging.getLogger(__name__)
INTERPOLATIONS = ('bilinear', 'bicubic', 'nearest', 'box', 'hamming', 'lanczos')
SCHEDULES = ('cosine', 'tanh', 'step', 'constant', 'multistep', 'plateau', 'poly', 'wsd', 'rsqrt', 'none')
_AUTO_AUGMENT = ('rand', 'augmix', 'original', 'originalr', 'v0', 'v0r', '3a')
# Flags with a fixed set of values that timm's parser leaves open, so that a typo shows up late or not at all.
_ONE_OF: Dict[str, Tuple[Optional[str], ...]] = {
    'amp_dtype': ('float16', 'bfloat16'),
    'model_dtype': (None, '', 'float32', 'float16', 'bfloat16'),
    'clip_mode': ('norm', 'value', 'agc'),
    'sched': SCHEDULES,
    'lr_base_scale': ('', 'linear', 'sqrt'),
    'train_crop_mode': (None, '', 'rrc', 'rkrc', 'rkrr', 'pad'),
    'crop_mode': (None, '', 'center', 'squash', 'border'),
    'remode': ('pixel', 'rand', 'const'),
    'mixup_mode': ('batch', 'pair', 'elem'),
    'interpolation': ('', *INTERPOLATIONS),
    'train_interpolation': ('', 'random', *INTERPOLATIONS),
    'dist_bn': ('', 'broadcast', 'reduce'),
    'worker_seeding': ('all', 'part'),
    'fuser': ('', 'te', 'old', 'nvfuser'),
    'on_nan': ('stop', 'skip', 'rollback'),
    'results_format': ('csv', 'json'),
}
_MAPPINGS = ('model_kwargs', 'teacher_kwargs', 'opt_kwargs', 'kd_kwargs', 'kd_weight')
# Settings that only a distillation run reads, with the value that means 'not given'.
_NEEDS_KD: Dict[str, Any] = {
    'teacher': None,
    'teacher_checkpoint': '',
    'teacher_kwargs': {},
    'teacher_weights': None,
    'teacher_mean': None,
    'teacher_std': None,
    'teacher_img_size': None,
    'teacher_classes': '',
    'teacher_standardize': None,
    'teacher_dtype': None,
    'task_loss_weight': None,
    'distill_loss_weight': None,
    'teacher_drop': 0.,
    'kd_tap': 'auto',
    'kd_lr_mult': 1.,
    'teacher_fsdp': False,
    'kd_optimizer': None,
    'kd_schedule': {},
    'nd_class_means': '',
    'nd_class_means_transform': 'eval',
    'teacher_cache': '',
    'cache_views': None,
    'cache_topk': None,
    'cache_precision': None,
    'cache_check': 0,
}


def check_train_args(args: argparse.Namespace, methods: Sequence[str] = ()) -> None:
    """Reject values and combinations that cannot work, warn of those that have no effect.

    Args:
        args: Training arguments; a `--kd` that was not given becomes 'none'.
        methods: Names of the methods there are, for a message.

    Raises:
        UsageError: Names the value, what is allowed and the flag.
    """
    resolve_kd(args, methods)
    _check_values(args)
    _check_optimizer(args)
    _check_augmentation(args)
    _check_distillation(args)
    check_train_combinations(args)


def check_validate_args(args: argparse.Namespace) -> None:
    """As `check_train_args`, for the validation script."""
    _check_values(args)


def _flag(name: str) -> str:
    return '--' + name.replace('_', '-')


def _check_values(args: argparse.Namespace) -> None:
    """Checks on single values and on the precision, for whichever flags this script has."""
    for name, allowed in _ONE_OF.items():
        if getattr(args, name, allowed[0]) not in allowed:
            words = ', '.join(f"'{v}'" for v in allowed if v)
            raise UsageError(f"{_flag(name)} '{getattr(args, name)}' must be one of {words}")
    check_ranges(args)
    _check_mappings(args)
    if args.amp and args.model_dtype not in (None, '', 'float32'):
        raise UsageError(
            f'--model-dtype {args.model_dtype} does not go with --amp, which needs float32 weights: '
            'leave out one of the two')
    channels = args.input_size[0] if args.input_size else args.in_chans or 3
    for name in ('mean', 'std', 'teacher_mean', 'teacher_std'):
        for value in all_values(getattr(args, name, None)):
            if value is not None and len(value) not in (1, channels):
                raise UsageError(
                    f'{_flag(name)} has {len(value)} values: give one, or one for each of {channels} channels')


def _check_mappings(args: argparse.Namespace) -> None:
    """Reject nan and infinity among the values of `key=value` flags, also inside lists."""
    for name in _MAPPINGS:
        for key, value in getattr(args, name, {}).items():
            values = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(v, float) and not math.isfinite(v) for v in values):
                raise UsageError(f'{_flag(name)} {key}={value} must be finite')


def _check_optimizer(args: argparse.Namespace) -> None:
    names = [str(name) for name in list_optimizers()]
    opt = args.opt.lower().split('_')[-1]  # timm takes prefixes such as lookahead_
    if opt not in names:
        closest = ', '.join(difflib.get_close_matches(opt, names) or names)
        raise UsageError(f"--opt '{args.opt}' is not an optimizer of timm; closest: {closest}")
    with_flag = optimizer_kwargs(cfg=args)
    known = [key for key in _optimizer_options(opt) if key not in with_flag]
    for key in args.opt_kwargs:
        if key in with_flag:
            raise UsageError(f'--opt-kwargs {key}={args.opt_kwargs[key]}: {key} has a flag of its own, {_flag(key)}')
        if known and key not in known:
            closest = ', '.join(difflib.get_close_matches(key, known) or known)
            raise UsageError(
                f"--opt-kwargs {key}={args.opt_kwargs[key]}: '{args.opt}' has no such argument; closest: "
                f'{closest}')


def _optimizer_options(opt: str) -> List[str]:
    """Return the arguments of an optimizer and of timm's factory; none where they cannot be known."""
    try:
        parameters = inspect.signature(get_optimizer_class(opt, bind_defaults=False)).parameters.values()
    except (AssertionError, ImportError):
        return []
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        return []
    own = ('filter_bias_and_bn', 'foreach', 'fallback_list', 'fallback_no_weight_decay')
    return sorted({*own, *(p.name for p in parameters)} - {'params'})


def _check_augmentation(args: argparse.Namespace) -> None:
    if args.aa and args.aa.split('-')[0] not in _AUTO_AUGMENT:
        raise UsageError(f"--aa '{args.aa}' must begin with one of {', '.join(_AUTO_AUGMENT)}")
    if args.aa:
        _check_policy(args.aa)
    for name in ('scale', 'ratio', 'cutmix_minmax'):
        value = getattr(args, name)
        if value is not None and (len(value) != 2 or value[0] > value[1]):
            raise UsageError(f'{_flag(name)} {" ".join(map(str, value))} must be two numbers, smallest first')
    if args.scale[1] == 0:
        raise UsageError(f'--scale {" ".join(map(str, args.scale))} must end above 0: no crop would be left')
    if args.cutmix_minmax is not None and args.cutmix_minmax[0] == args.cutmix_minmax[1]:
        raise UsageError(f'--cutmix-minmax {" ".join(map(str, args.cutmix_minmax))} must be two different numbers')
    if (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None) and args.batch_size % 2:
        raise UsageError(f'--batch-size {args.batch_size} must be even with --mixup or --cutmix, which mix in pairs')


def _check_policy(text: str) -> None:
    """Reject an `--aa` that timm cannot read, or of which it passes over a part."""
    create = {'rand': rand_augment_transform, 'augmix': augment_and_mix_transform}.get(
        text.split('-')[0], auto_augment_transform)
    ignored = [part for part in text.split('-')[1:] if not re.search(r'\d', part) and not part.startswith('t')]
    if ignored:
        raise UsageError(f"--aa '{text}': '{ignored[0]}' has no number, timm passes over it; e.g. rand-m9-mstd0.5-inc1")
    try:
        create(text, {})
    except (AssertionError, KeyError, TypeError, ValueError) as e:
        reason = str(e) or type(e).__name__
        raise UsageError(f"--aa '{text}' is no policy of timm ({reason}), e.g. rand-m9-mstd0.5-inc1") from e


def _check_distillation(args: argparse.Namespace) -> None:
    """Check what needs no list of methods; the task checks names, weights and options."""
    if args.kd != 'none' and not args.teacher and not args.teacher_cache:
        raise UsageError(f'--kd {args.kd} needs a teacher: pass --teacher NAME, or --kd none to train without one')
    _check_teachers(args)
    if args.teacher_cache and args.teacher_fsdp:
        raise UsageError('--teacher-fsdp does not go with --teacher-cache: leave out one of them')
    if args.cache_check and args.teacher_cache and not args.teacher:
        raise UsageError(f'--cache-check {args.cache_check} runs the teacher: give --teacher NAME too')
    if args.teacher_fsdp and args.torchcompile:
        raise UsageError('--teacher-fsdp does not go with --torchcompile: leave out one of them')
    if args.kd_optimizer is None and args.dot_delta != DOT_DELTA:
        _logger.warning(f'--dot-delta {args.dot_delta:g} ignored: it goes with --kd-optimizer dot.')
    if args.kd == 'none':
        ignored = [_flag(name) for name, unset in _NEEDS_KD.items() if getattr(args, name) != unset]
        if ignored:
            _logger.warning(f'{", ".join(ignored)} ignored: --kd none trains the student alone.')


# Flags with a value for all teachers or one for each.
_PER_TEACHER = (
    'teacher_checkpoint', 'teacher_weights', 'teacher_mean', 'teacher_std', 'teacher_img_size', 'teacher_classes',
    'teacher_dtype', 'teacher_standardize', 'nd_class_means')


def _check_teachers(args: argparse.Namespace) -> None:
    """Check the names of several teachers where they stand in other flags."""
    names = list(teachers_of(args.teacher))
    kwargs_by_teacher(args.teacher_kwargs, args.teacher)
    for flag in _PER_TEACHER:
        value = getattr(args, flag)
        for name in value if isinstance(value, dict) else ():
            if name not in names:
                known = ', '.join(names).strip() or 'none'
                raise UsageError(
                    f"{_flag(flag)} {name}={value[name]}: there is no teacher '{name}'; --teacher names {known}")
    if args.teacher_cache and len(names) > 1:
        raise UsageError(
            f'--teacher-cache {args.teacher_cache} holds the targets of one teacher, and --teacher names '
            f'{len(names)}: leave one of the two out')
    if args.data and args.data_dir and not os.path.exists(args.data):
        raise UsageError(
            f"'{args.data}' is no folder, and --data-dir {args.data_dir} names one: leave it out. Several teachers "
            'have names, --teacher a=NAME b=NAME')
