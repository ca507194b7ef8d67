"""Resume of a run: the comparison of a checkpoint with the flags, and the restored state.

A run that stopped anywhere and is resumed with the flags it had ends with the bits of one that never stopped, on the
CPU and with the same number of processes. Knows the task only through `load_checkpoint_state`.
"""
import argparse
import logging
from typing import Any, Dict, List, Mapping, Optional, Union

import torch
from timm.models import clean_state_dict
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask

from ..errors import UsageError
from .file import read_checkpoint
from .optimizer_state import load_optimizer, load_scheduler_state, set_hidden_state
from .run_files import checkpoint_progress, is_unmerged

_logger = logging.getLogger(__name__)

__all__ = ['check_same_run', 'done_batches', 'resume_task']

# What a checkpoint is about. Another value makes another run, which can start from the weights at most.
_IDENTITY = (
    'model', 'model_kwargs', 'num_classes', 'in_chans', 'kd', 'kd_kwargs', 'kd_tap', 'teacher',
    'teacher_kwargs')
_WITHOUT_EFFECT = {
    'resume', 'resume_data_changed', 'no_resume_opt', 'start_epoch', 'output', 'experiment',
    'log_interval', 'device', 'rank', 'local_rank', 'world_size', 'distributed', 'teacher_eval',
    'recovery_interval', 'checkpoint_hist', 'pin_mem', 'initial_checkpoint', 'pretrained',
    'pretrained_path', 'dry_run', 'list_kd', 'demo', 'demo_dir', 'config', 'max_bad_images', 'on_nan',
    'teacher_checkpoint', 'stop_epoch', 'save_epochs', 'report', 'push_to_hub',
    'synchronize_step', 'save_images', 'nd_class_means', 'overwrite', 'cache_check',
    'teacher_classes', 'teacher_standardize'}  # what comes of them is compared, not how it was asked for


def done_batches(checkpoint: Optional[Dict[str, Any]]) -> int:
    """Return how many batches of its epoch a checkpoint has behind it, 0 at the start of one."""
    return checkpoint_progress(checkpoint)[1] if checkpoint else 0


def check_same_run(
        args: argparse.Namespace,
        checkpoint: Dict[str, Any],
        teacher_hash: Union[str, Mapping[str, str]] = '',
) -> None:
    """Compare this run's flags with those that the checkpoint was written with; warns of what changes the course.

    Args:
        args: Flags of this run.
        checkpoint: As read.
        teacher_hash: Of this run's teacher, wherever its weights come from; of several by name.

    Raises:
        UsageError: For another student, teacher or distillation; lists the differences.
    """
    saved = vars(checkpoint['args']) if isinstance(checkpoint.get('args'), argparse.Namespace) else {}
    now = vars(args)
    differing = [name for name in now if name in saved and not _same(now[name], saved[name])]
    refused = [name for name in differing if name in _IDENTITY]
    if refused:
        raise UsageError(
            f'{args.resume!r} is of another run: {_differences(refused, saved, now)}. Give the flags of '
            'that run, or start a new one from its weights with --initial-checkpoint.')
    saved_hash = checkpoint.get('provenance', {}).get('teacher', {}).get('sha256 of its weights')
    before, here = (value if isinstance(value, Mapping) else {'': value or ''} for value in (saved_hash, teacher_hash))
    for name in [name for name in here if here[name] and before.get(name) and here[name] != before[name]]:
        raise UsageError(
            f"{args.resume!r} was distilled from a teacher {f'{name!r} ' if name else ''}with other weights (SHA-256 "
            f'{before[name][:12]}, here {here[name][:12]}). Give its --teacher-checkpoint.')
    other_optimizer: List[str] = [name for name in ('opt', 'kd_optimizer') if name in differing]
    if other_optimizer and not args.no_resume_opt:
        raise UsageError(
            f'{args.resume!r} holds the state of another optimizer: {_differences(other_optimizer, saved, now)}. '
            'Give the flag of that run, or --no-resume-opt to start the optimizer afresh.')
    factors = [getattr(values, 'kd_lr_mult', 1.) for values in (checkpoint.get('args'), args)]
    if factors[0] != factors[1] and not args.no_resume_opt:  # the optimizer's state has the factor
        raise UsageError(
            f'{args.resume!r} holds the state of an optimizer with --kd-lr-mult {factors[0]:g}, not {factors[1]:g}. '
            'Give the flag of that run, or --no-resume-opt to start the optimizer afresh.')
    changed = [name for name in differing if name not in _WITHOUT_EFFECT and not name.startswith(('log_', 'wandb_'))]
    if changed:
        _logger.warning(
            f'Flags differ from those of the checkpoint: {_differences(changed, saved, now)}. The run goes '
            'on with the new ones, but not as if it had never stopped.')


def _same(a: Any, b: Any) -> bool:
    return _plain(a) == _plain(b)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value or None  # '' and {} mean 'not given' as None does


def _differences(names: List[str], saved: Dict[str, Any], now: Dict[str, Any]) -> str:
    def _flag(name: str) -> str:
        return '--student' if name == 'model' else '--' + name.replace('_', '-')
    return ', '.join(f'{_flag(name)} {saved[name]} -> {now[name]}' for name in names)


def _load_weights(task: TrainingTask, checkpoint: Dict[str, Any], path: str) -> List[str]:
    """Load the student with all that belongs to the task, and its EMA. Returns what was missing, in words."""
    if is_unmerged(checkpoint, path):
        raise UsageError(
            f'{path!r} holds the tensors of a student that could not be merged, for a look at them: '
            'resume from the checkpoint before it (--resume auto).')
    if 'state_dict' not in checkpoint and 'model' not in checkpoint:
        if not all(isinstance(v, torch.Tensor) for v in checkpoint.values()):
            raise UsageError(f"{path!r} holds no 'state_dict', --resume needs a training checkpoint.")
        checkpoint = {'state_dict': checkpoint}
    missing = []
    task_state = checkpoint.get('task_state')
    if task_state is None:
        missing.append('adapter and method state (task_state)')
    weights = clean_state_dict(checkpoint['state_dict' if 'state_dict' in checkpoint else 'model'])
    weights_ema = checkpoint.get('state_dict_ema', checkpoint.get('model_ema'))
    try:
        task.load_checkpoint_state(weights, task_state)
        if task.has_ema() and weights_ema is not None:
            task.load_checkpoint_state(clean_state_dict(weights_ema), checkpoint.get('task_state_ema'), ema=True)
        elif task.has_ema():
            missing.append('EMA weights, the average starts from the raw ones')
            task.load_checkpoint_state(weights, task_state, ema=True)
    except (KeyError, RuntimeError) as e:
        reason = ' '.join(str(e).split())
        raise UsageError(
            f"{path!r} (of {checkpoint.get('arch', 'an unnamed model')}) does not fit this run, --resume needs the "
            f'same --student, --kd and --kd-kwargs: {reason[:300]}') from e
    return missing


def _has(checkpoint: Dict[str, Any], key: str, missing: List[str]) -> bool:
    if not checkpoint.get(key):  # a disabled loss scaler saves an empty state
        missing.append(key)
    return key not in missing


def resume_task(
        task: TrainingTask,
        path: str,
        optimizer: Optional[torch.optim.Optimizer] = None,
        loss_scaler: Optional[Any] = None,
        lr_scheduler: Optional[Scheduler] = None,
        checkpoint: Optional[Dict[str, Any]] = None,
) -> int:
    """Continue a run from a training checkpoint of this package, or as far as possible from one of timm.

    To be called when EMA, scheduler and loss scaler exist. The random states are not touched: restore them last, with
    `restore_rank`, since building loaders and models draws random numbers.

    Args:
        task: Gets its student, its own state and its EMA.
        path: The checkpoint.
        optimizer: Gets its state, None to leave it.
        loss_scaler: Gets its state, None to leave it.
        lr_scheduler: Gets what it remembers; what it is configured with stays.
        checkpoint: What `read_checkpoint(path)` gave, where it has been read already.

    Returns:
        The epoch to start with.

    Raises:
        UsageError: The checkpoint cannot be read, or is of another student, method or optimizer.
    """
    checkpoint = read_checkpoint(path) if checkpoint is None else checkpoint
    missing = _load_weights(task, checkpoint, path)
    if optimizer is not None and _has(checkpoint, 'optimizer', missing):
        load_optimizer(optimizer, checkpoint['optimizer'], path)
        set_hidden_state(optimizer, checkpoint.get('hidden', {}).get('optimizer', {}))
    if task.has_ema():
        set_hidden_state(task.get_trainable_module(ema=True), checkpoint.get('hidden', {}).get('ema', {}))
    if loss_scaler is not None and _has(checkpoint, loss_scaler.state_dict_key, missing):
        loss_scaler.load_state_dict(checkpoint[loss_scaler.state_dict_key])
    if lr_scheduler is not None and _has(checkpoint, 'lr_scheduler', missing):
        load_scheduler_state(lr_scheduler, checkpoint['lr_scheduler'])
    missing += [key for key in ('ranks', 'epoch') if key not in checkpoint]
    if missing:
        _logger.warning(f"{path!r} lacks: {'; '.join(missing)}. The run continues, but not as if it had never stopped.")
    start_epoch, num_batches = checkpoint_progress(checkpoint) if 'epoch' in checkpoint else (0, 0)
    behind = f' behind its batch {num_batches - 1}' if num_batches else ''
    _logger.info(f'Resumed {path!r}, starting with epoch {start_epoch}{behind}.')
    return start_epoch
