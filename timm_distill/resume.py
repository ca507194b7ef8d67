"""Continuing a run: which checkpoint, whether it fits the flags, and putting everything back.

A run that stopped anywhere and is resumed with the flags it had ends with the bits of one that never stopped, on the
CPU and with the same number of processes. Knows the task only through `load_checkpoint_state`.
"""
import argparse
import logging
import os
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.distributed as dist
from timm.models import clean_state_dict, safe_model_name
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask

from .checkpoint import PLATEAU_COUNTERS, get_rank_buffers
from .errors import UsageError
from .optimizer_state import load_optimizer_state, set_hidden_state
from .rng import set_rng_state
from .storage import DamagedFileError, read_checkpoint, read_metadata

_logger = logging.getLogger(__name__)

__all__ = ['check_same_run', 'done_batches', 'find_newest', 'resolve_resume', 'restore_rank', 'resume_task']

_EXTENSION = '.pth.tar'
# What a checkpoint is about. Another value makes another run, which can start from the weights at most.
_IDENTITY = ('model', 'model_kwargs', 'num_classes', 'in_chans', 'kd', 'kd_kwargs', 'kd_tap', 'teacher',
             'teacher_kwargs')
_WITHOUT_EFFECT = {'resume', 'resume_data_changed', 'no_resume_opt', 'start_epoch', 'output', 'experiment',
                   'log_interval', 'device', 'rank', 'local_rank', 'world_size', 'distributed', 'teacher_eval',
                   'recovery_interval', 'checkpoint_hist', 'pin_mem', 'initial_checkpoint', 'pretrained',
                   'pretrained_path', 'dry_run', 'list_kd', 'demo', 'demo_dir', 'config', 'max_bad_images', 'on_nan',
                   'teacher_checkpoint', 'stop_epoch', 'save_epochs', 'report', 'push_to_hub',
                   'synchronize_step', 'save_images', 'nd_class_means'}


def resolve_resume(args: argparse.Namespace) -> Optional[Dict[str, Any]]:
    """Read what `--resume` names; for `auto` the newest good checkpoint of the run's folder, if there is one.

    Sets `args.resume` to the file, and with `auto` also `args.output` and `args.experiment` to its folder. Without
    `--experiment` that is `--output` itself, or the newest run of the student in it.

    Raises:
        UsageError: The file cannot be read, or it is damaged and no former one beside it is good.
    """
    if not args.resume:
        return None
    if args.resume != 'auto':
        args.resume, checkpoint = _read_or_fall_back(args.resume)
        return checkpoint
    for folder in _run_folders(args):
        newest = find_newest(folder)
        if newest is not None:
            args.resume, checkpoint = newest
            args.output, args.experiment = os.path.split(os.path.abspath(folder))
            return checkpoint
    _logger.info('--resume auto: there is no checkpoint yet, this is a new run.')
    args.resume = ''
    return None


def _run_folders(args: argparse.Namespace) -> List[str]:
    root = args.output or './output/train'
    if args.experiment:
        return [os.path.join(root, args.experiment)]
    if not os.path.isdir(root):
        return []
    if any(name.endswith(_EXTENSION) for name in os.listdir(root)):
        return [root]
    runs = [name for name in os.listdir(root) if f'-{safe_model_name(args.model)}-' in name]
    return [os.path.join(root, name) for name in sorted(runs, reverse=True)]  # names begin with the time


def find_newest(folder: str) -> Optional[Tuple[str, Dict[str, Any]]]:
    """Return path and content of the newest checkpoint that is not damaged; warns of those that are."""
    names = [name for name in os.listdir(folder) if name.endswith(_EXTENSION)] if os.path.isdir(folder) else []
    candidates = []
    for name in sorted(names):
        if name.startswith(('tmp', 'recovery_tmp', 'unmerged', 'bad-batch')):
            continue
        path = os.path.join(folder, name)
        try:
            # hard links share what they hold: `last` comes before its own numbered name
            candidates.append((_progress(read_metadata(path)), name == f'last{_EXTENSION}', path))
        except UsageError as e:
            _logger.warning(f'Left out: {e}')
    for _, _, path in sorted(candidates, reverse=True):
        try:
            return path, read_checkpoint(path)
        except UsageError as e:
            _logger.warning(f'Falling back to an earlier checkpoint: {e}')
    return None


def _read_or_fall_back(path: str) -> Tuple[str, Dict[str, Any]]:
    """Read a file; where it is damaged, warn and read the newest good one of its folder."""
    try:
        return path, read_checkpoint(path)
    except DamagedFileError as e:
        newest = find_newest(os.path.dirname(path) or '.')
        if newest is None:
            raise
        _logger.warning(f'{e} Going on from {newest[0]} instead.')
        return newest


def _progress(checkpoint: Dict[str, Any]) -> Tuple[int, int]:
    """Return the epoch to start with and the batches of it that are done."""
    position = _positions(checkpoint)[:1]
    epoch = int(checkpoint.get('epoch', -1))
    if position:
        return epoch, position[0]['data']['num_batches']
    return (epoch + 1 if checkpoint.get('version', 1) > 1 else epoch), 0  # timm's version 1 counted up before saving


def done_batches(checkpoint: Optional[Dict[str, Any]]) -> int:
    """Return how many batches of its epoch a checkpoint has behind it, 0 at the start of one."""
    return _progress(checkpoint)[1] if checkpoint else 0


def _positions(checkpoint: Dict[str, Any]) -> List[Dict[str, Any]]:
    return [rank['position'] for rank in checkpoint.get('ranks', []) if rank.get('position') is not None]


def check_same_run(args: argparse.Namespace, checkpoint: Dict[str, Any], teacher_hash: str = '') -> None:
    """Compare this run's flags with those that the checkpoint was written with; warns of what changes the course.

    Args:
        args: Flags of this run.
        checkpoint: As read.
        teacher_hash: Of this run's teacher, wherever its weights come from.

    Raises:
        UsageError: For another student, teacher or distillation; lists the differences.
    """
    saved = vars(checkpoint['args']) if isinstance(checkpoint.get('args'), argparse.Namespace) else {}
    now = vars(args)
    differing = [name for name in now if name in saved and not _same(now[name], saved[name])]
    refused = [name for name in differing if name in _IDENTITY]
    if refused:
        raise UsageError(f'{args.resume!r} is of another run: {_differences(refused, saved, now)}. Give the flags of '
                         'that run, or start a new one from its weights with --initial-checkpoint.')
    saved_hash = checkpoint.get('provenance', {}).get('teacher', {}).get('sha256 of its weights')
    if saved_hash and teacher_hash and saved_hash != teacher_hash:
        raise UsageError(f'{args.resume!r} was distilled from a teacher with other weights (SHA-256 {saved_hash[:12]}, '
                         f'here {teacher_hash[:12]}). Give its --teacher-checkpoint.')
    if 'opt' in differing and not args.no_resume_opt:
        raise UsageError(f"{args.resume!r} holds the state of another optimizer: --opt {saved['opt']} -> {now['opt']}. "
                         'Give the flag of that run, or --no-resume-opt to start the optimizer afresh.')
    changed = [name for name in differing if name not in _WITHOUT_EFFECT and not name.startswith(('log_', 'wandb_'))]
    if changed:
        _logger.warning(f'Flags differ from those of the checkpoint: {_differences(changed, saved, now)}. The run goes '
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


def restore_rank(task: TrainingTask, loaders: Any, checkpoint: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """Put back what only this rank knew. Comes last: building loaders and models draws random numbers.

    Args:
        task: Gets its running statistics.
        loaders: Get the generators of their processes, which must not run yet.
        checkpoint: As read.

    Returns:
        This rank's position inside the epoch; None at the start of one.
    """
    ranks = checkpoint.get('ranks')
    if not ranks:
        return None
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if len(ranks) != world_size:
        return _position_for_other_world(ranks, world_size)
    state = ranks[rank]
    for key, buffers in state.get('buffers', {}).items():
        own = get_rank_buffers(task).get(key, {})
        for name in own.keys() & buffers.keys():
            own[name].copy_(buffers[name])
    position = state['position']
    if loaders is not None:
        # inside an epoch the loader is run again from the epoch's start
        is_inside = position is not None and position['data']['num_batches'] < len(loaders.train)
        loaders.load_state_dict(position['loaders'] if is_inside else state.get('loaders'))
    set_rng_state(state['rng'])
    return position


def _position_for_other_world(ranks: List[Dict[str, Any]], world_size: int) -> Optional[Dict[str, Any]]:
    _logger.warning(f'The checkpoint was written by {len(ranks)} processes, these are {world_size}: the run goes on, '
                    'but not as if it had never stopped.')
    position = ranks[0]['position']
    if position is None:
        return None
    done = position['data']['num_batches'] * len(ranks) // world_size
    return {**position, 'data': {**position['data'], 'num_batches': done}}


def _load_scheduler_state(lr_scheduler: Scheduler, state: Dict[str, Any]) -> None:
    """Restore what a scheduler remembers. What it was configured with is left to the flags of this run."""
    if isinstance(lr_scheduler, PlateauLRScheduler):
        for name in PLATEAU_COUNTERS:
            setattr(lr_scheduler.lr_scheduler, name, state.get(name, getattr(lr_scheduler.lr_scheduler, name)))
        lr_scheduler.restore_lr = state.get('restore_lr')
        return
    # all other timm schedules are functions of the epoch or update alone
    new = lr_scheduler.state_dict()
    changed = [f'{k} {state[k]} -> {new[k]}' for k in new if k != 'metric' and k in state and state[k] != new[k]]
    if changed:
        _logger.warning(f"The learning rate schedule differs from the checkpoint's: {', '.join(changed)}.")


def _load_weights(task: TrainingTask, checkpoint: Dict[str, Any], path: str) -> List[str]:
    """Load the student with all that belongs to the task, and its EMA. Returns what was missing, in words."""
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


def _group_keys(group: Dict[str, Any]) -> List[str]:
    # switches (bool or None) come and go with torch versions, the numbers belong to the kind of optimizer; 'step' is
    # counted by some from their first update on
    return sorted(
        k for k, v in group.items()
        if k not in ('params', 'initial_lr', 'lr_scale', 'param_names', 'step')
        and isinstance(v, (float, int, tuple, list)) and not isinstance(v, bool))


def _load_optimizer(optimizer: torch.optim.Optimizer, state: Dict[str, Any], path: str) -> None:
    groups, saved_groups = optimizer.param_groups, state['param_groups']
    sizes, saved_sizes = [len(g['params']) for g in groups], [len(g['params']) for g in saved_groups]
    advice = 'pass the flags of that run, or --no-resume-opt to start the optimizer afresh.'
    if sizes != saved_sizes:
        raise UsageError(f'The optimizer in {path!r} has groups of {saved_sizes} parameters, here {sizes}: {advice}')
    for group, saved_group in zip(groups, saved_groups):
        keys, saved_keys = _group_keys(group), _group_keys(saved_group)
        if keys != saved_keys:
            raise UsageError(
                f'The optimizer in {path!r} is of another kind, it has {saved_keys} and here it is {keys}: {advice}')
    load_optimizer_state(optimizer, state)


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
        _load_optimizer(optimizer, checkpoint['optimizer'], path)
        set_hidden_state(optimizer, checkpoint.get('hidden', {}).get('optimizer', {}))
    if task.has_ema():
        set_hidden_state(task.get_trainable_module(ema=True), checkpoint.get('hidden', {}).get('ema', {}))
    if loss_scaler is not None and _has(checkpoint, loss_scaler.state_dict_key, missing):
        loss_scaler.load_state_dict(checkpoint[loss_scaler.state_dict_key])
    if lr_scheduler is not None and _has(checkpoint, 'lr_scheduler', missing):
        _load_scheduler_state(lr_scheduler, checkpoint['lr_scheduler'])
    missing += [key for key in ('ranks', 'epoch') if key not in checkpoint]
    if missing:
        _logger.warning(f"{path!r} lacks: {'; '.join(missing)}. The run continues, but not as if it had never stopped.")
    start_epoch, num_batches = _progress(checkpoint) if 'epoch' in checkpoint else (0, 0)
    behind = f' behind its batch {num_batches - 1}' if num_batches else ''
    _logger.info(f'Resumed {path!r}, starting with epoch {start_epoch}{behind}.')
    return start_epoch
