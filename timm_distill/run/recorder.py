"""Recorder of a run: checkpoints, `args.yaml`, `summary.csv`; also on a signal or a divergence.

All ranks have a recorder, since a checkpoint holds the state of all of them; the first rank alone writes.
"""
import logging
import math
import os
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch.distributed as dist

from ..checkpoint.choice import belongs_to
from ..checkpoint.file import describe_space, read_checkpoint, why_unwritten, write_text
from ..checkpoint.lock import LOCK_NAME, FolderLock
from ..checkpoint.rank_state import gather_rank_states, get_rank_state
from ..checkpoint.resume import done_batches, resume_task
from ..checkpoint.run_files import remove_temporary
from ..checkpoint.saver import DistillCheckpointSaver
from ..engine.meters import NonFiniteLossError
from ..errors import LostStateError, UsageError
from ..report.trackers import Summary, start_trackers
from .divergence import MAX_ROLLBACKS, choose_rollback, write_bad_batch
from .ending import check_complete, check_student, rank_epochs, release_student, why_lost
from .folder import check_has_epochs, create_folder
from .state import Run, RunResult
from .stopping import StopRequested, StopSignals
from .validation import describe_metric, ranking_metric

_logger = logging.getLogger(__name__)


class Recorder:
    """Writes what a run leaves behind.

    Args:
        run: The run.
        args_text: The flags as given, as YAML.
        checkpoint: What `--resume` read, None for a new run.
        start_epoch: First epoch of the run.
        signals: Asked after each update.
        info: More entries of every checkpoint.
        lock: Taken on the folder.

    Raises:
        UsageError: If the output folder cannot be written.
    """

    def __init__(
            self,
            run: Run,
            args_text: str,
            checkpoint: Optional[Dict[str, Any]],
            start_epoch: int,
            signals: StopSignals,
            info: Dict[str, Any],
            lock: FolderLock,
    ):
        self.run = run
        self.signals = signals
        self.metric = ranking_metric(run.args, run.loaders, run.task)
        self.info = {**info, 'metric_name': describe_metric(self.metric, run.loaders)}
        self.saver: Optional[DistillCheckpointSaver] = None
        self.trackers: List[Any] = []
        self.result = RunResult(param_count=sum(p.numel() for p in run.task.module.student.parameters()))
        self._loaders_at_start: Dict[str, Any] = {}  # of the epoch
        self._save_due = False  # although no interval is over
        self._updates_since_rollback = 0  # or since the start
        self._newest_update: Optional[Tuple[int, int, Callable[[], Dict[str, Any]]]] = None
        self._end_of_training: Optional[Dict[str, Any]] = None  # this rank's state before validation
        run.streak.length = int(((checkpoint or {}).get('run') or {}).get('streak', 0))
        check_has_epochs(run, checkpoint, start_epoch)
        if run.args.rank != 0:
            return
        try:
            self.result.output_dir = create_folder(run.args, run.data_config['input_size'][-1], checkpoint, lock)
            self._open(args_text, checkpoint, start_epoch)
        except OSError as e:
            folder = self.result.output_dir or run.args.output or './output/train'
            space = describe_space(folder) if os.path.isdir(folder) else ''
            if self.result.output_dir:
                self._remove_unused_folder()
            raise UsageError(f'--output {folder} cannot be written ({why_unwritten(e)}). {space}'.strip()) from e

    def _open(self, args_text: str, checkpoint: Optional[Dict[str, Any]], start_epoch: int) -> None:
        """Begin the files of a run, or take over those of a stopped one."""
        run = self.run
        name = os.path.basename(self.result.output_dir)
        if checkpoint is not None and self._continues(checkpoint):
            remove_temporary(self.result.output_dir)  # their room may be what the files below need
        self.trackers = start_trackers(run.args, name, self.result.output_dir, start_epoch)
        write_text(args_text, self._path('args.yaml'))
        self.summary = Summary(self._path('summary.csv'), start_epoch)
        self.saver = self._create_saver()
        if checkpoint is not None and checkpoint.get('saver') and self._continues(checkpoint):
            self.saver.continue_from(run.args.resume, checkpoint)
            if start_epoch >= run.last_epoch:
                self.saver.keep_as_last(run.args.resume)
            self.result.best_metric, self.result.best_epoch = self.saver.best_metric, self.saver.best_epoch
            milestone = self._path(f'milestone-{start_epoch}{self.saver.extension}')
            if not done_batches(checkpoint) and not os.path.exists(milestone):
                self._save_milestone(start_epoch)  # a kill came before it

    def _create_saver(self) -> DistillCheckpointSaver:
        return DistillCheckpointSaver(
            model=self.run.task.trainable_module,
            optimizer=self.run.optimizer,
            lr_scheduler=self.run.scheduler,
            info=self.info,
            args=self.run.args,
            amp_scaler=self.run.precision.loss_scaler,
            checkpoint_dir=self.result.output_dir,
            recovery_dir=self.result.output_dir,
            decreasing=self.metric in ('loss', 'ranking_loss'),
            max_history=self.run.args.checkpoint_hist,
            task=self.run.task,
        )

    def _continues(self, checkpoint: Dict[str, Any]) -> bool:
        return belongs_to(self.result.output_dir, self.run.args.resume, checkpoint)

    @property
    def best_path(self) -> str:
        """The best checkpoint, else the last; '' where there is none."""
        paths = (self._path('model_best.pth.tar'), self.saver.last_path) if self.saver is not None else ()
        return next((path for path in paths if os.path.exists(path)), '')

    @property
    def summary_path(self) -> str:
        return self._path('summary.csv')

    def _path(self, name: str) -> str:
        return os.path.join(self.result.output_dir, name)

    def discard(self) -> None:
        """Remove what a run wrote that could not even save its first checkpoint."""
        if self.saver is not None:
            self._remove_unused_folder()

    def _remove_unused_folder(self) -> None:
        folder = self.result.output_dir
        if not os.path.isdir(folder) or not set(os.listdir(folder)) <= {'args.yaml', LOCK_NAME}:
            return
        for name in os.listdir(folder):
            os.remove(self._path(name))
        os.rmdir(folder)

    def begin_epoch(self, position: Optional[Dict[str, Any]]) -> None:
        """Note how the loaders stand at the start of an epoch, from which it would be loaded again."""
        self._loaders_at_start = position['loaders'] if position else self.run.loaders.state_dict()

    def after_update(
            self,
            epoch: int,
            is_last: bool,
            update_idx: int,
            get_position: Callable[[], Dict[str, Any]],
    ) -> None:
        """Save inside the epoch where that is due; stop after saving where a signal asks for it.

        Raises:
            StopRequested: After the save, on all ranks.
        """
        self._updates_since_rollback += 1
        self.signals.hold()  # from the first update on there is something to save
        self._newest_update = epoch, update_idx, get_position
        if is_last:
            position = {**get_position(), 'loaders': self._loaders_at_start}
            self._end_of_training = get_rank_state(self.run.task, self.run.loaders, position)
        number = self.signals.poll()
        interval = self.run.args.recovery_interval
        # after the last update too, so that a kill during validation does not cost the epoch
        if number or self._save_due or interval and (is_last or (update_idx + 1) % interval == 0):
            self._gather({**get_position(), 'loaders': self._loaders_at_start})
            if self.saver is not None:
                self.saver.save_recovery(epoch, update_idx)
            self._save_due = False
        if number:
            raise StopRequested(number)

    @contextmanager
    def interruptible(self, epoch: int, update_idx: int) -> Iterator[None]:
        """Around validation: a signal ends it at once, and what is saved is the state before it.

        Several ranks finish it, since they have to stop together.

        Raises:
            StopRequested: After the save.
        """
        if dist.is_initialized() or self._end_of_training is None or self.saver is None:
            yield
            return
        try:
            self.signals.let_go()
            yield
            self.signals.hold()
        except StopRequested:
            self.signals.note_only()
            self.saver.ranks = [self._end_of_training]
            self.saver.save_recovery(epoch, update_idx)
            raise
        finally:
            self._end_of_training = None

    def save_stalled(self) -> None:
        """Save the state behind the newest update, where the loop waited for a batch that did not come."""
        if self.saver is None or self._newest_update is None:
            return
        epoch, update_idx, get_position = self._newest_update
        if dist.is_initialized() or get_position()['data']['num_batches'] % self.run.args.grad_accum_steps:
            self.saver.unsaved = 'the data loader did not bring the batches of an update that had begun'
            return
        self._gather({**get_position(), 'loaders': self._loaders_at_start})
        self.saver.save_recovery(epoch, update_idx)

    def _gather(self, position: Optional[Dict[str, Any]] = None) -> None:
        ranks = gather_rank_states(get_rank_state(self.run.task, self.run.loaders, position))
        if self.saver is not None:
            self.saver.ranks = ranks
            inside = [rank['position']['losses']['streak'] for rank in ranks if rank['position'] is not None]
            self.saver.streak = max(inside, default=self.run.streak.length)
            if self._updates_since_rollback > 0 and not self.saver.streak:
                self.saver.copy_of = 0

    def rank(self, train_metrics: Dict[str, float], eval_metrics: Optional[Dict[str, float]]) -> float:
        """Return the value that ranks an epoch; nan where its loss is not finite, whatever the accuracy then says."""
        metrics = {**train_metrics, **(eval_metrics or {})}
        return metrics[self.metric] if math.isfinite(metrics.get('loss', 0.)) else math.nan

    def summarize(
            self,
            epoch: int,
            train_metrics: Dict[str, float],
            eval_metrics: Optional[Dict[str, float]],
    ) -> None:
        """Write an epoch's row of `summary.csv`."""
        entry: Dict[str, Any] = {'epoch': epoch, 'train': dict(train_metrics)}
        if eval_metrics is not None:
            entry['validation'] = dict(eval_metrics)
        self.result.history.append(entry)
        if self.saver is not None:
            lrs = [group['lr'] for group in self.run.optimizer.param_groups]
            lr = sum(lrs) / len(lrs)
            self.summary.add({
                'epoch': epoch,
                **{f'train_{name}': value for name, value in train_metrics.items()},
                **{f'eval_{name}': value for name, value in (eval_metrics or {}).items()},
                'lr': lr,
            })
            for tracker in self.trackers:
                try:
                    tracker.log(epoch, train_metrics, eval_metrics, lr)
                except OSError as e:  # TensorBoard writes files, too
                    _logger.error(f'The metrics of epoch {epoch} could not be logged: {why_unwritten(e)}.')

    def save(self, epoch: int, metric: Optional[float]) -> None:
        """Write the checkpoints of an epoch; without a metric only if a signal asks the run to stop.

        Raises:
            StopRequested: After the save, on all ranks.
        """
        number = self.signals.settle()
        if metric is not None or number:
            self._gather()
            if self.saver is not None:
                self.result.best_metric, self.result.best_epoch = self.saver.save_checkpoint(epoch, metric=metric)
                self._save_milestone(epoch + 1)
        if number:
            raise StopRequested(number)

    def _save_milestone(self, completed_epochs: int) -> None:
        if self.saver is not None and not self.saver.unsaved and completed_epochs in self.run.args.save_epochs:
            self.saver.save_milestone(completed_epochs)

    def roll_back(self, error: NonFiniteLossError) -> None:
        """Put weights and optimizer back to the newest good checkpoint; data and random numbers go on.

        Where the run diverges again before another save it is an earlier one. The state is saved after the update, so
        that a resumed run goes on behind the rollback and remembers it.

        Raises:
            NonFiniteLossError: Where there is no checkpoint, or after too many attempts.
        """
        choice: List[Any] = ['', 0]
        if self.saver is not None:
            choice = [choose_rollback(self.saver, self.result.output_dir), self.saver.num_rollbacks]
        if dist.is_initialized():
            dist.broadcast_object_list(choice)
        path, count = choice
        if not path:
            raise error
        _logger.warning(f'{error} Rolling back to {path} ({count} of at most {MAX_ROLLBACKS}).')
        self._save_due, self._updates_since_rollback = True, -1  # this very update is counted, too
        lrs = [group['lr'] for group in self.run.optimizer.param_groups]
        resume_task(
            self.run.task, path, self.run.optimizer, self.run.precision.loss_scaler, checkpoint=read_checkpoint(path))
        for group, lr in zip(self.run.optimizer.param_groups, lrs):
            group['lr'] = lr

    def save_bad_batch(self, error: NonFiniteLossError) -> str:
        """Write the batch of a divergence, where the loop had it at hand, for a replay; returns its path or ''."""
        return write_bad_batch(error, self._path('bad-batch.pth')) if self.result.output_dir else ''

    def check_saved(self) -> None:
        """Find out whether the newest state of the run is on disk. All ranks call this together.

        Raises:
            LostStateError: If it is not, on all ranks.
        """
        reasons: List[Any] = [self._why_lost()]
        if dist.is_initialized():
            dist.broadcast_object_list(reasons)
        if reasons[0]:
            raise LostStateError(reasons[0])

    def _why_lost(self) -> str:
        return '' if self.saver is None else why_lost(self.saver, self.result.output_dir, self._resume_flags())

    def how_to_resume(self) -> str:
        """Return what to tell the user of an interrupted run."""
        if self.saver is None or self.saver.unsaved:  # what is lost is told at the end
            return ''
        if not self.saver.newest:
            self.discard()
            return 'Nothing new is to be saved: start the same command again.'
        return self._resume_flags()

    def when_unfinished(self) -> str:
        """Return what to tell the user where a signal comes behind the last epoch."""
        return f'all epochs are trained and saved, report and hub folder are not. {self._resume_flags()}'

    def _resume_flags(self) -> str:
        folder = self.result.output_dir
        return (
            f'To go on, give the same flags with --output {os.path.dirname(folder)} '
            f'--experiment {os.path.basename(folder)} --resume auto')

    def finish(self, seconds: float) -> RunResult:
        """Return the run's result, its epochs ranked as timm prints them: the best last.

        Raises:
            NonFiniteLossError: The run ends with a student that is no good, which is not released.
        """
        self.result.seconds = seconds
        for tracker in self.trackers:
            tracker.finish()
        if self.saver is None:
            return self.result
        best = self._path('model_best.pth.tar')
        self.result.checkpoint = best if os.path.exists(best) else ''
        if self.result.best_metric is not None:
            _logger.info(f'*** Best metric: {self.result.best_metric} (epoch {self.result.best_epoch})')
        if not self.result.stopped_by:
            best_epoch = self.best_path if self.result.best_metric is not None else ''
            check_student(self.saver, self.result.history, self.run.streak.length, best_epoch)
            release_student(self.best_path, self.result.output_dir, self.run.args)
        if not self.result.stopped_by:
            check_complete(self.saver, self.summary, self._why_lost())
        self.result.history = rank_epochs(self.result.history, self.metric, self.saver.decreasing)
        return self.result
