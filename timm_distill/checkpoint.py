"""Writing training checkpoints that survive a crash, and continuing from them.

The files are timm's: `state_dict` (and `state_dict_ema`) load into the plain timm student, everything else is for
`--resume`. Knows the task only through `get_checkpoint_state` and `load_checkpoint_state`. All that is stored loads
with `weights_only=True`: tensors, numbers, text, containers of these and the `argparse.Namespace` of the run.
"""
import argparse
import logging
import os
import pickle
import shutil
from typing import Any, Dict, List, Mapping, Optional

import torch
from timm.models import clean_state_dict
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import CheckpointSaver

from .errors import MergeError, UsageError
from .rng import get_rng_state, set_rng_state

_logger = logging.getLogger(__name__)

__all__ = ['DistillCheckpointSaver', 'get_rng_state', 'read_checkpoint', 'resume_task', 'set_rng_state']

_PLATEAU_COUNTERS = ('best', 'last_epoch', 'num_bad_epochs', 'cooldown_counter')


def _scheduler_state(lr_scheduler: Scheduler) -> Dict[str, Any]:
    state = lr_scheduler.state_dict()
    if isinstance(lr_scheduler, PlateauLRScheduler):
        state.update({name: getattr(lr_scheduler.lr_scheduler, name) for name in _PLATEAU_COUNTERS})
        state['restore_lr'] = lr_scheduler.restore_lr
    return state


def _load_scheduler_state(lr_scheduler: Scheduler, state: Dict[str, Any]) -> None:
    """Restore what a scheduler remembers. What it was configured with is left to the flags of this run."""
    if isinstance(lr_scheduler, PlateauLRScheduler):
        for name in _PLATEAU_COUNTERS:
            setattr(lr_scheduler.lr_scheduler, name, state.get(name, getattr(lr_scheduler.lr_scheduler, name)))
        lr_scheduler.restore_lr = state.get('restore_lr')
        return
    # all other timm schedules are functions of the epoch or update alone
    new = lr_scheduler.state_dict()
    changed = [f'{k} {state[k]} -> {new[k]}' for k in new if k != 'metric' and k in state and state[k] != new[k]]
    if changed:
        _logger.warning(f"The learning rate schedule differs from the checkpoint's: {', '.join(changed)}.")


def _fsync(path: str) -> None:
    flags = os.O_RDONLY if os.path.isdir(path) else os.O_RDWR
    try:
        handle = os.open(path, flags)
    except PermissionError:  # Windows cannot open folders, and needs no flush of them
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(state: Dict[str, Any], path: str) -> None:
    """Write a file and flush it to disk; nothing stays behind where that fails."""
    try:
        torch.save(state, path)
        _fsync(path)
    except BaseException:  # an interrupt too
        if os.path.exists(path):
            os.remove(path)
        raise


class DistillCheckpointSaver(CheckpointSaver):
    """timm's saver with atomic writes, random states, the scheduler's state, and a rescue file for failed merges.

    `last`, `model_best` and the numbered files are each replaced in one step by a file that is already on disk, so a
    kill at any moment leaves either the former or the new one.

    Args:
        model: As for timm; names the architecture where `args` does not.
        optimizer: Saved for resume.
        lr_scheduler: Saved for resume.
        loaders: Saved for resume: anything whose `state_dict` says where its random generators stand.
        info: More entries of every file, plain values: what exporting needs to know of the run.
        **kwargs: Arguments of timm's `CheckpointSaver`; `task` is required.
    """

    def __init__(
            self,
            model: torch.nn.Module,
            optimizer: torch.optim.Optimizer,
            *,
            lr_scheduler: Optional[Scheduler] = None,
            loaders: Optional[Any] = None,
            info: Optional[Mapping[str, Any]] = None,
            **kwargs: Any,
    ):
        super().__init__(model, optimizer, **kwargs)
        self.lr_scheduler = lr_scheduler
        self.loaders = loaders
        self.info = dict(info or {})

    def _save(self, save_path: str, epoch: int, metric: Optional[float] = None) -> None:
        state = {**self._run_state(epoch), **self._task_state(epoch)}
        state['optimizer'] = self.optimizer.state_dict()
        if self.amp_scaler is not None:
            state[self.amp_scaler.state_dict_key] = self.amp_scaler.state_dict()
        if self.lr_scheduler is not None:
            state['lr_scheduler'] = _scheduler_state(self.lr_scheduler)
        if metric is not None:
            state['metric'] = metric
        state['saver'] = self.state_dict(epoch, metric)
        if self.loaders is not None:
            state['loaders'] = self.loaders.state_dict()
        state['rng_state'] = get_rng_state()  # last: verifying a merge may draw random numbers
        _write(state, save_path)

    def _run_state(self, epoch: int) -> Dict[str, Any]:
        """Entries that say what the file is."""
        state = {**self.info, 'epoch': epoch, 'version': 2, 'arch': type(self.model).__name__.lower()}
        if self.args is not None:
            state.update(arch=self.args.model, args=self.args)
        return state

    def _task_state(self, epoch: int) -> Dict[str, Any]:
        """Merged weights and task state; where merging fails the raw tensors are written before giving up."""
        try:
            state = self.task.get_checkpoint_state(unwrap_fn=self.unwrap_fn)
            if self.task.has_ema():
                state.update(self.task.get_checkpoint_state(ema=True, unwrap_fn=self.unwrap_fn))
            return state
        except MergeError as e:
            path = os.path.join(self.checkpoint_dir, f'unmerged-{epoch}{self.extension}')
            _write({**self._run_state(epoch), **e.raw_state}, path + '.tmp')
            self._replace(path + '.tmp', path)
            raise MergeError(f'{e} (the unmerged tensors are in {path})', e.raw_state) from e

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)
        _fsync(os.path.dirname(dst) or '.')

    def _duplicate(self, src: str, dst: str) -> None:
        tmp = dst + '.tmp'
        if os.path.exists(tmp):  # left by a kill
            os.remove(tmp)
        try:
            os.link(src, tmp)
        except (OSError, NotImplementedError):
            shutil.copy2(src, tmp)
            _fsync(tmp)
        self._replace(tmp, dst)
        if os.path.exists(tmp):  # replacing a name by another name of the same file does nothing
            os.remove(tmp)


def read_checkpoint(path: str, flag: str = '--resume') -> Dict[str, Any]:
    """Read a checkpoint, tensors to the CPU, without ever running code from it.

    Args:
        path: A file written by torch.save that holds a dict.
        flag: The flag that named the file, for error messages.

    Raises:
        UsageError: The file is missing, unreadable, truncated, or holds something else.
    """
    if not os.path.isfile(path):
        raise UsageError(f'No checkpoint file at {path!r}, check {flag}.')
    try:
        # timm's checkpoints hold the flags of their run as a Namespace
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except PermissionError as e:
        raise UsageError(f'No permission to read {path!r}, check {flag}.') from e
    except Exception as e:  # damaged files fail with anything from EOFError to UnicodeDecodeError
        raise UsageError(f'Cannot read {path!r} as a checkpoint ({_why_unreadable(path)}), check {flag}.') from e
    if not isinstance(checkpoint, dict):
        raise UsageError(f'{path!r} holds a {type(checkpoint).__name__} and not a checkpoint, check {flag}.')
    return checkpoint


def _why_unreadable(path: str) -> str:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (EOFError, LookupError, OSError, RuntimeError, ValueError, pickle.UnpicklingError):  # damaged
        unsafe = []
    if unsafe:
        return f"it holds objects that only unsafe loading accepts: {', '.join(sorted(unsafe))}"
    return 'it is truncated, corrupt or of another format'


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
    # switches (bool or None) come and go with torch versions, the numbers belong to the kind of optimizer
    return sorted(
        k for k, v in group.items()
        if k not in ('params', 'initial_lr', 'lr_scale', 'param_names') and isinstance(v, (float, int, tuple, list))
        and not isinstance(v, bool))


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
    optimizer.load_state_dict(state)


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
    `set_rng_state(checkpoint['rng_state'])`, since building loaders and models draws random numbers.

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
    if loss_scaler is not None and _has(checkpoint, loss_scaler.state_dict_key, missing):
        loss_scaler.load_state_dict(checkpoint[loss_scaler.state_dict_key])
    if lr_scheduler is not None and _has(checkpoint, 'lr_scheduler', missing):
        _load_scheduler_state(lr_scheduler, checkpoint['lr_scheduler'])
    missing += [key for key in ('rng_state', 'epoch') if key not in checkpoint]
    if missing:
        _logger.warning(f"{path!r} lacks: {'; '.join(missing)}. The run continues, but not as if it had never stopped.")
    start_epoch = checkpoint.get('epoch', 0)
    if 'epoch' in checkpoint and checkpoint.get('version', 1) > 1:
        start_epoch += 1  # version 1 of timm's files counted up before saving
    _logger.info(f'Resumed {path!r}, starting with epoch {start_epoch}.')
    return start_epoch
