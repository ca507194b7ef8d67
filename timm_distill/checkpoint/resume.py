"""Resume of a run: the choice of its checkpoint, the comparison with the flags, and the restored state.

A run that stopped anywhere and is resumed with the flags it had ends with the bits of one that never stopped, on the
CPU and with the same number of processes. Knows the task only through `load_checkpoint_state`.
"""
import argparse
import logging
import os
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.distributed as dist
from timm.models import clean_state_dict
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask

from ..errors import UsageError
from ..utils.random import set_rng_state
from ..utils.text import model_file_name
from .file import DamagedFileError, read_checkpoint
from .lock import FolderLock
from .optimizer_state import load_optimizer_state, set_hidden_state
from .run_files import (
    RunFile,
    checkpoint_progress,
    describe_checkpoint,
    is_unmerged,
    list_run_files,
    nonfinite_tensors,
    own_files,
    used_by,
    weights_of,
)
from .saver import PLATEAU_COUNTERS, get_rank_buffers

_logger = logging.getLogger(__name__)

__all__ = [
    'belongs_to', 'check_same_run', 'done_batches', 'find_newest', 'find_rollback', 'resolve_resume', 'restore_rank',
    'resume_task',
]

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
    'synchronize_step', 'save_images', 'nd_class_means', 'overwrite'}


def resolve_resume(args: argparse.Namespace, lock: Optional[FolderLock] = None) -> Optional[Dict[str, Any]]:
    """Read what `--resume` names; for `auto` the newest good checkpoint of the run's folder, if there is one.

    Sets `args.resume` to the file, and with `auto` also `args.output` and `args.experiment` to its folder. Without
    `--experiment` that is `--output` itself, or the newest run of the student in it.

    Args:
        args: Flags of this run.
        lock: Takes the folder before anything is read there.

    Raises:
        UsageError: The file cannot be read, or it is damaged and no former one beside it is good; another process
            uses the folder.
    """
    if not args.resume:
        return None
    if args.resume != 'auto':
        args.resume, checkpoint = _read_or_fall_back(args.resume)
        _check_named(args.resume, checkpoint)
        return checkpoint
    for folder in _run_folders(args):
        if lock is not None and os.path.isdir(folder):
            lock.acquire(folder)
        newest = find_newest(folder)
        if newest is not None:
            args.resume, checkpoint = newest
            args.output, args.experiment = os.path.split(os.path.abspath(folder))
            return checkpoint
        used = used_by(folder)
        if used:
            raise UsageError(
                f'--resume auto: {folder!r} holds {", ".join(used[:4])}{", ..." if len(used) > 4 else ""} '
                'and no good checkpoint to go on from, see the messages above. Name one with --resume '
                'FILE, or begin again with --overwrite or another --experiment.')
    _logger.info('--resume auto: there is no checkpoint yet, this is a new run.')
    args.resume = ''
    return None


def _run_folders(args: argparse.Namespace) -> List[str]:
    root = args.output or './output/train'
    if args.experiment:
        return [os.path.join(root, args.experiment)]
    if not os.path.isdir(root):
        return []
    if used_by(root):
        return [root]
    runs = [name for name in os.listdir(root) if f'-{model_file_name(args.model)}-' in name]
    return [os.path.join(root, name) for name in sorted(runs, reverse=True)]  # names begin with the time


def _check_named(path: str, checkpoint: Dict[str, Any]) -> None:
    """Refuse weights that are not finite, warn of other marks: somebody asked for this very file."""
    nonfinite = _nan_weights(checkpoint)
    if nonfinite:
        raise UsageError(
            f'--resume {path}: its weights are not finite ({nonfinite}), nothing can be trained from '
            'them. Name an earlier checkpoint, or --resume auto for the newest good one.')
    diverged = describe_checkpoint(path, checkpoint).diverged
    if diverged:
        _logger.warning(
            f'{path!r} was written while the run diverged ({diverged}); --resume auto takes the newest '
            'good checkpoint instead.')


def _nan_weights(checkpoint: Dict[str, Any]) -> str:
    """Return the names of weights that are not finite, '' for none."""
    run = checkpoint.get('run')
    if run and run.get('finite', True):  # looked at when it was written
        return ''
    return ', '.join(nonfinite_tensors(weights_of(checkpoint), constant=None)[:3])


def find_newest(folder: str) -> Optional[Tuple[str, Dict[str, Any]]]:
    """Return path and content of the newest good checkpoint of the folder's own run; warns of what is left out.

    Newest is what was written last, whatever its epoch. Good is what is neither damaged, nor written while updates
    were not finite, nor holds weights that are not.
    """
    return _first_good(own_files(list_run_files(folder)))


def find_rollback(folder: str, origin: int, end: int) -> Optional[Tuple[str, Dict[str, Any]]]:
    """Return path and content of the checkpoint to go back to: the newest good one, and if the run diverged again
    right behind the one of the last time, an earlier one.

    Args:
        folder: Folder of the run.
        origin: Number of the save that the run went back to the last time, 0 for none.
        end: Number of the newest save at that time.
    """
    files = own_files(list_run_files(folder))
    first = [file for file in files if not file.copy_of and (file.save > end or file.save < origin)]
    return _first_good([*first, *(file for file in files if file not in first)])


def _first_good(files: List[RunFile]) -> Optional[Tuple[str, Dict[str, Any]]]:
    for file in files:
        if file.diverged:
            _logger.warning(f'Passed over: {file.path!r} was written while the run diverged ({file.diverged}).')
            continue
        try:
            checkpoint = read_checkpoint(file.path)
        except UsageError as e:
            _logger.warning(f'Falling back to an earlier checkpoint: {e}')
            continue
        nonfinite = _nan_weights(checkpoint)
        if not nonfinite:
            return file.path, checkpoint
        _logger.warning(f'Passed over: the weights in {file.path!r} are not finite ({nonfinite}).')
    return None


def belongs_to(folder: str, path: str, checkpoint: Dict[str, Any]) -> bool:
    """Return whether a checkpoint lies in a folder and is of the run whose files are there."""
    if os.path.dirname(os.path.realpath(path)) != os.path.realpath(folder):
        return False
    files = own_files(list_run_files(folder, quiet=True), quiet=True)
    return not files or files[0].run_id == describe_checkpoint(path, checkpoint).run_id


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


def done_batches(checkpoint: Optional[Dict[str, Any]]) -> int:
    """Return how many batches of its epoch a checkpoint has behind it, 0 at the start of one."""
    return checkpoint_progress(checkpoint)[1] if checkpoint else 0


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
        raise UsageError(
            f'{args.resume!r} is of another run: {_differences(refused, saved, now)}. Give the flags of '
            'that run, or start a new one from its weights with --initial-checkpoint.')
    saved_hash = checkpoint.get('provenance', {}).get('teacher', {}).get('sha256 of its weights')
    if saved_hash and teacher_hash and saved_hash != teacher_hash:
        raise UsageError(
            f'{args.resume!r} was distilled from a teacher with other weights (SHA-256 {saved_hash[:12]}, '
            f'here {teacher_hash[:12]}). Give its --teacher-checkpoint.')
    if 'opt' in differing and not args.no_resume_opt:
        raise UsageError(
            f"{args.resume!r} holds the state of another optimizer: --opt {saved['opt']} -> {now['opt']}. "
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
    _logger.warning(
        f'The checkpoint was written by {len(ranks)} processes, these are {world_size}: the run goes on, '
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
    start_epoch, num_batches = checkpoint_progress(checkpoint) if 'epoch' in checkpoint else (0, 0)
    behind = f' behind its batch {num_batches - 1}' if num_batches else ''
    _logger.info(f'Resumed {path!r}, starting with epoch {start_epoch}{behind}.')
    return start_epoch
