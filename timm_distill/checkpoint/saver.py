"""Saver of training checkpoints.

The files are timm's: `state_dict` (and `state_dict_ema`) load into the plain timm student, everything else is for
`--resume`. Knows the task only through `get_checkpoint_state`.
"""
import logging
import math
import os
import shutil
import uuid
from dataclasses import replace
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import CheckpointSaver

from ..errors import MergeError
from ..utils.random import unchanged_randomness
from .file import (
    DISK_FULL,
    checkpoint_size,
    describe_space,
    put_in_place,
    why_unwritten,
    write_checkpoint,
)
from .optimizer_state import get_hidden_state, get_scheduler_state
from .rank_state import get_rank_state
from .run_files import (
    PREVIOUS,
    RunFile,
    constant_infinities,
    describe_checkpoint,
    duplicate,
    nonfinite_tensors,
    remove_temporary,
    set_others_aside,
    weights_of,
)

_logger = logging.getLogger(__name__)

__all__ = ['DistillCheckpointSaver']

_COUNTS = {  # attributes of the saver and their names in the 'run' entry
    'streak': 'streak', 'num_rollbacks': 'rollbacks', 'rollback_origin': 'rollback_origin',
    'rollback_end': 'rollback_end', 'copy_of': 'copy_of',
}


class DistillCheckpointSaver(CheckpointSaver):
    """timm's saver with files that survive a crash, all that an exact resume needs, and a rescue for failed merges.

    `last`, `model_best` and the numbered files are each replaced in one step by a file that is already on disk, so a
    kill at any moment leaves either the former or the new one. `last.pth.tar.previous` is the `last` before. Where the
    disk is full the files stay as they are and training goes on; the next save tries again. A file written while the
    run diverges is marked, ranks among no others and replaces no good one but `last`.

    Args:
        model: As for timm; names the architecture where `args` does not.
        optimizer: Saved for resume.
        lr_scheduler: Saved for resume.
        info: More entries of every file, plain values: what exporting needs to know of the run.
        **kwargs: Arguments of timm's `CheckpointSaver`; `task` is required.

    Attributes:
        ranks: States of all ranks (`gather_rank_states`) for the next save.
        unsaved: Why the newest save failed, '' where it did not.
        run_id: Of the run, in all its files.
        streak: Updates in a row that were not finite, up to the next save.
        num_rollbacks: How often the run went back so far.
        rollback_origin: Number of the save that it went back to the last time.
        rollback_end: Number of the newest save at that time.
        copy_of: `rollback_origin` too, until something was trained since.
        diverged: Why the newest save is marked, '' where it is not.
        finite: Whether the weights of the newest save were finite.
        newest: Path of the newest file that was written, '' for none.
    """

    def __init__(
            self,
            model: torch.nn.Module,
            optimizer: torch.optim.Optimizer,
            *,
            lr_scheduler: Optional[Scheduler] = None,
            info: Optional[Mapping[str, Any]] = None,
            **kwargs: Any,
    ):
        super().__init__(model, optimizer, **kwargs)
        self.lr_scheduler = lr_scheduler
        self.ranks: List[Dict[str, Any]] = []
        self.unsaved = ''
        self.newest = ''
        self._needed = 0  # bytes of a file that did not find room
        self.info = dict(info or {})
        self.run_id = uuid.uuid4().hex
        self.num_saves = 0
        self.streak = self.num_rollbacks = self.rollback_origin = self.rollback_end = self.copy_of = 0
        self.diverged = ''
        self.finite = True
        self._constant = constant_infinities(model)
        self._recoveries: List[RunFile] = []  # of this run, the oldest first
        self._last_is_good = True

    @property
    def last_path(self) -> str:
        """Path of the newest checkpoint at the end of an epoch."""
        return self._path('last')

    @property
    def _path_of_previous(self) -> str:
        return os.path.join(self.checkpoint_dir, PREVIOUS)

    def _path(self, name: str) -> str:
        return os.path.join(self.checkpoint_dir, name + self.extension)

    def save_checkpoint(self, epoch: int, metric: Optional[float] = None) -> Tuple[Optional[float], Optional[int]]:
        """Save as `last` and, if it earns a place, as a numbered file and as the best; returns best metric and epoch.

        As timm's, except that a file system that takes no more is reported and survived, and that weights or a metric
        that are not finite earn no place.
        """
        try:
            saved = self._save(self._path('tmp'), epoch, metric)
            if self._last_is_good and os.path.exists(self.last_path):
                self._duplicate(self.last_path, self._path_of_previous)
            self._replace(self._path('tmp'), self.last_path)
            self.newest = self.last_path
            self._last_is_good = not saved.diverged
            if self._earns_place(metric):
                self._keep(self.last_path, epoch, metric)
            self.unsaved = ''
        except OSError as e:
            self._survive(e)
        return self.best_metric, self.best_epoch

    def _earns_place(self, metric: Optional[float]) -> bool:
        return self.finite and (metric is None or math.isfinite(metric))

    def save_recovery(self, epoch: int, batch_idx: int = 0) -> None:
        """Save inside an epoch, after the update `batch_idx`; the two newest such files that are good are kept."""
        path = os.path.join(self.recovery_dir, f'{self.recovery_prefix}-{epoch}-{batch_idx}{self.extension}')
        temporary = os.path.join(self.recovery_dir, f'recovery_tmp{self.extension}')
        try:
            saved = self._save(temporary, epoch, recovery=True)
            self._replace(temporary, path)
            self._recoveries = [file for file in self._recoveries if file.path != path]
            self._recoveries.append(replace(saved, path=path))
            self.newest = path
            self._remove_recoveries(keep=2)
            self.unsaved = ''
        except OSError as e:
            self._survive(e)

    def save_milestone(self, completed_epochs: int) -> None:
        """Keep `last` for good, as timm does; a file system that takes no more is reported and survived."""
        try:
            super().save_milestone(completed_epochs)
        except OSError as e:
            self._survive(e)

    def _write(self, state: Dict[str, Any], path: str) -> None:
        """Write a file; where the disk is full, once more without what newer files have made useless."""
        try:
            write_checkpoint(state, path)
        except OSError as e:
            self._needed = checkpoint_size(state)
            if e.errno not in DISK_FULL or not self._free_obsolete():
                raise
            write_checkpoint(state, path)

    def _free_obsolete(self) -> bool:
        """Remove recoveries that newer files replace; returns whether there were any.

        The newest goes, too, where `last` is left to fall back to and its room suffices.
        """
        before = os.listdir(self.recovery_dir)
        has_last = self._last_is_good and os.path.isfile(self.last_path)
        is_needed = self.newest != self.last_path or not has_last
        self._remove_recoveries(keep=1 if is_needed else 0)
        if is_needed and has_last and os.path.isfile(self.newest):
            free = shutil.disk_usage(self.recovery_dir).free
            if free < self._needed <= free + os.path.getsize(self.newest):
                self._remove_recoveries(keep=0)
        freed = sorted(set(before) - set(os.listdir(self.recovery_dir)))
        if freed:
            _logger.warning(f'The disk is full: {", ".join(freed)} gave way to a newer state.')
        return bool(freed)

    def _remove_recoveries(self, keep: int, spare: str = '') -> None:
        """Remove this run's older recoveries; of those from inside a streak the newest is kept beside the good ones."""
        good = [file for file in self._recoveries if not file.diverged]
        chosen = [*good[-keep:], self._recoveries[-1]] if keep and self._recoveries else []
        kept = [file for file in self._recoveries if file in chosen or file.path == spare]
        for file in self._recoveries:
            if file not in kept and os.path.exists(file.path):
                os.remove(file.path)
        self._recoveries = kept

    def _survive(self, error: OSError) -> None:
        self.unsaved = why_unwritten(error)
        _logger.error(
            f'The checkpoint could not be written ({self.unsaved}). The former files stay, training goes on, '
            f'and the next save tries again. {self.space()}')

    def space(self) -> str:
        """Return where the space of the folder went."""
        return describe_space(self.checkpoint_dir, self._needed)

    def _keep(self, source: str, epoch: int, metric: Optional[float]) -> None:
        """Give a checkpoint its place among the best or newest, by timm's rules. May be repeated after a kill."""
        worst = self.checkpoint_files[-1] if self.checkpoint_files else None
        full = len(self.checkpoint_files) >= self.max_history
        if full and worst is not None and worst[1] is not None and (metric is None or not self.cmp(metric, worst[1])):
            return
        if full:
            self._cleanup_checkpoints(1)
        path = self._checkpoint_path(epoch)
        if os.path.realpath(source) != os.path.realpath(path):
            self._duplicate(source, path)
        self._track_checkpoint(path, epoch, metric, update_best_file=False)
        if self.best_epoch == epoch:
            self._duplicate(path, self._path('model_best'))

    def continue_from(self, source: str, checkpoint: Dict[str, Any]) -> None:
        """Take over the history of the checkpoint `source` in this folder, and finish what a kill interrupted.

        What the run wrote after `source`, files that cannot be read and those of other runs get other names: they are
        no part of the course that begins here.

        Args:
            source: Path of the checkpoint that was resumed.
            checkpoint: Its content.
        """
        remove_temporary(self.checkpoint_dir)
        start = describe_checkpoint(source, checkpoint)
        self._load_run_state(checkpoint.get('run') or {}, start)
        files, self.num_saves = set_others_aside(self.checkpoint_dir, start)
        names = {file.name for file in files}
        self._last_is_good = not any(file.diverged for file in files if file.path == self.last_path)
        state = checkpoint['saver']
        pending = state.get('pending', (None, None))
        kept = [entry for entry in state.get('checkpoint_files', []) if entry[0] in names]
        self.load_state_dict({**state, 'checkpoint_files': kept, 'pending': (None, None)})
        self._recoveries = [file for file in reversed(files) if file.name.startswith(f'{self.recovery_prefix}-')]
        self._remove_recoveries(keep=2, spare=source)
        if pending[0] is not None:
            self._keep(source, *pending)
        self._restore_best()
        former = self._path('previous')  # its name in former versions
        if os.path.exists(former) and not os.path.exists(self._path_of_previous):
            self._replace(former, self._path_of_previous)

    def keep_as_last(self, source: str) -> None:
        """Make a checkpoint `last` where there is none: a run that has no epoch left writes no other."""
        if not os.path.exists(self.last_path):
            self._duplicate(source, self.last_path)

    def note_rollback(self, path: str, checkpoint: Dict[str, Any]) -> None:
        """Count a rollback to a checkpoint of this run; the next save holds its weights again."""
        file = describe_checkpoint(path, checkpoint)
        self.num_rollbacks += 1
        self.rollback_origin = self.copy_of = file.copy_of or file.save
        self.rollback_end = self.num_saves

    def _load_run_state(self, run: Mapping[str, Any], start: RunFile) -> None:
        self.run_id = start.run_id
        for attribute, key in _COUNTS.items():
            setattr(self, attribute, int(run.get(key, 0)))
        self.diverged, self.finite = start.diverged, bool(run.get('finite', True))

    def _restore_best(self) -> None:
        """Make `model_best` the file that the history calls the best, where it was that of an abandoned course."""
        best = self._checkpoint_path(self.best_epoch)
        if self.best_epoch is not None and not os.path.exists(self._path('model_best')) and os.path.exists(best):
            self._duplicate(best, self._path('model_best'))

    def _save(self, save_path: str, epoch: int, metric: Optional[float] = None, recovery: bool = False) -> RunFile:
        with unchanged_randomness():  # verifying a merge may draw random numbers
            state = {**self._run_state(epoch), **self._task_state(epoch)}
        self._mark(nonfinite_tensors(weights_of(state), self._constant))
        state['optimizer'] = self.optimizer.state_dict()
        state['hidden'] = self._hidden_state()
        if self.amp_scaler is not None:
            state[self.amp_scaler.state_dict_key] = self.amp_scaler.state_dict()
        if self.lr_scheduler is not None:
            state['lr_scheduler'] = get_scheduler_state(self.lr_scheduler)
        if metric is not None and math.isfinite(metric):
            state['metric'] = metric
        ranked = not recovery and self._earns_place(metric)
        state['saver'] = self.state_dict(epoch if ranked else None, metric if ranked else None)
        state['ranks'] = self.ranks or [get_rank_state(self.task, None)]
        self.num_saves += 1
        state['run'] = self._identity()
        self._write(state, save_path)
        return describe_checkpoint(save_path, state)

    def _mark(self, nonfinite: List[str]) -> None:
        """Note whether the state to save is one that nobody should go on from."""
        self.finite = not nonfinite
        streak = f'the newest {self.streak} updates were not finite' if self.streak else ''
        weights = f"its weights are not finite ({', '.join(nonfinite[:3])}{', ...' if len(nonfinite) > 3 else ''})"
        self.diverged = weights if nonfinite else streak
        if nonfinite:
            _logger.error(f'The state that is saved now is no good: {weights}.')

    def _identity(self) -> Dict[str, Any]:
        return {
            'id': self.run_id,
            'save': self.num_saves,
            'finite': self.finite,
            'diverged': self.diverged,
            **{key: getattr(self, attribute) for attribute, key in _COUNTS.items()},
        }

    def _hidden_state(self) -> Dict[str, Any]:
        """What optimizer and EMA remember outside of their state dicts."""
        holders = {'optimizer': self.optimizer, 'ema': getattr(self.task, 'trainable_module_ema', None)}
        return {name: get_hidden_state(holder) for name, holder in holders.items() if holder is not None}

    def _run_state(self, epoch: int) -> Dict[str, Any]:
        """Entries that say what the file is."""
        state = {**self.info, 'epoch': epoch, 'version': 2, 'arch': type(self.model).__name__.lower()}
        if self.args is not None:
            state.update(arch=self.args.model, args=self.args)
        return state

    def _task_state(self, epoch: int) -> Dict[str, Any]:
        """Merged weights and task state; where merging fails the raw tensors are written before giving up."""
        try:
            state = self._verified_entries(ema=False)
            return {**state, **self._verified_entries(ema=True)} if self.task.has_ema() else state
        except MergeError as e:
            path = os.path.join(self.checkpoint_dir, f'unmerged-{epoch}{self.extension}')
            # under keys that no reader of weights takes for a student's
            raw = {f'unmerged_{name}': value for name, value in e.raw_state.items()}
            try:
                write_checkpoint({**self._run_state(epoch), **raw}, path + '.tmp')
                self._replace(path + '.tmp', path)
            except OSError as error:
                raise MergeError(
                    f'{e} (the unmerged tensors could not be written: {why_unwritten(error)})', e.raw_state) from e
            raise MergeError(f'{e} (the unmerged tensors are in {path})', e.raw_state) from e

    def _verified_entries(self, ema: bool) -> Dict[str, Any]:
        """Return the entries of a student; of one that is not finite as it was trained as they are, to be marked."""
        try:
            entries: Dict[str, Any] = self.task.get_checkpoint_state(ema=ema, unwrap_fn=self.unwrap_fn)
        except MergeError as e:
            if e.spoiled_state is None:
                raise
            return e.spoiled_state
        return entries

    def _replace(self, src: str, dst: str) -> None:
        put_in_place(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        duplicate(src, dst)
