"""Everything that a run writes and when: checkpoints, `args.yaml`, `summary.csv`; also on a signal or a divergence.

All ranks have a recorder, since a checkpoint holds the state of all of them; the first rank alone writes.
"""
import logging
import os
from datetime import datetime
from typing import Any, Callable, Dict, List, Optional

import torch.distributed as dist
from timm.models import safe_model_name
from timm.utils import get_outdir

from ..checkpoint import DistillCheckpointSaver, gather_rank_states, get_rank_state
from ..export import export_hub, load_release, push_to_hub
from ..meters import NonFiniteLossError
from ..resume import done_batches, find_newest, resume_task
from ..stopping import StopRequested, StopSignals
from ..storage import read_checkpoint, write_checkpoint, write_text
from ..summary import Summary
from ..tracking import start_trackers
from .parts import Run, RunResult

_logger = logging.getLogger(__name__)

_MAX_ROLLBACKS = 3


class Recorder:
    """Writes what a run leaves behind.

    Args:
        run: The run.
        args_text: The flags as given, as YAML.
        checkpoint: What `--resume` read, None for a new run.
        start_epoch: First epoch of the run.
        signals: Asked after each update.
        info: More entries of every checkpoint.
    """

    def __init__(
            self,
            run: Run,
            args_text: str,
            checkpoint: Optional[Dict[str, Any]],
            start_epoch: int,
            signals: StopSignals,
            info: Dict[str, Any],
    ):
        self.run = run
        self.info = info
        self.signals = signals
        self.metric = run.args.eval_metric if run.loaders.eval is not None else 'loss'
        self.saver: Optional[DistillCheckpointSaver] = None
        self.trackers: List[Any] = []
        self.result = RunResult(param_count=sum(p.numel() for p in run.task.module.student.parameters()))
        self._loaders_at_start: Dict[str, Any] = {}  # of the epoch
        self._num_rollbacks = 0
        if run.args.rank != 0:
            return
        name = _run_name(run)
        self.result.output_dir = get_outdir(run.args.output or './output/train', name)
        self.trackers = start_trackers(run.args, name, self.result.output_dir, start_epoch)
        write_text(args_text, self._path('args.yaml'))
        self.summary = Summary(self._path('summary.csv'), start_epoch)
        self.saver = self._create_saver()
        if checkpoint is not None and checkpoint.get('saver') and self._is_own_file(run.args.resume):
            self.saver.continue_from(run.args.resume, checkpoint['saver'])
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
            decreasing=self.metric == 'loss',
            max_history=self.run.args.checkpoint_hist,
            task=self.run.task,
        )

    def _is_own_file(self, path: str) -> bool:
        return os.path.dirname(os.path.realpath(path)) == os.path.realpath(self.result.output_dir)

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
        if self.saver is None or [name for name in os.listdir(self.result.output_dir) if name != 'args.yaml']:
            return
        os.remove(self._path('args.yaml'))
        os.rmdir(self.result.output_dir)

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
        number = self.signals.poll()
        interval = self.run.args.recovery_interval
        # after the last update too, so that a kill during validation does not cost the epoch
        if number or interval and (is_last or (update_idx + 1) % interval == 0):
            self._gather({**get_position(), 'loaders': self._loaders_at_start})
            if self.saver is not None:
                self.saver.save_recovery(epoch, update_idx)
        if number:
            raise StopRequested(number)

    def _gather(self, position: Optional[Dict[str, Any]] = None) -> None:
        ranks = gather_rank_states(get_rank_state(self.run.task, self.run.loaders, position))
        if self.saver is not None:
            self.saver.ranks = ranks

    def rank(self, train_metrics: Dict[str, float], eval_metrics: Optional[Dict[str, float]]) -> float:
        """Return the value that ranks an epoch."""
        return (eval_metrics or train_metrics)[self.metric]

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
                tracker.log(epoch, train_metrics, eval_metrics, lr)

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
        """Put weights and optimizer back to the newest checkpoint; data and random numbers go on.

        Raises:
            NonFiniteLossError: Where there is no checkpoint, or after too many attempts.
        """
        paths: List[Any] = [None]
        if self.saver is not None:
            newest = find_newest(self.result.output_dir)
            paths = [newest and newest[0]]
        if dist.is_initialized():
            dist.broadcast_object_list(paths)
        self._num_rollbacks += 1
        if paths[0] is None or self._num_rollbacks > _MAX_ROLLBACKS:
            raise error
        _logger.warning(f'{error} Rolling back to {paths[0]} ({self._num_rollbacks} of at most {_MAX_ROLLBACKS}).')
        lrs = [group['lr'] for group in self.run.optimizer.param_groups]
        resume_task(
            self.run.task, paths[0], self.run.optimizer, self.run.precision.loss_scaler,
            checkpoint=read_checkpoint(paths[0]))
        for group, lr in zip(self.run.optimizer.param_groups, lrs):
            group['lr'] = lr

    def save_bad_batch(self, error: NonFiniteLossError) -> str:
        """Write the batch of a divergence, where the loop had it at hand, for a replay; returns its path or ''."""
        if error.batch is None or not self.result.output_dir:
            return ''
        path = self._path('bad-batch.pth')
        input, target = error.batch
        images = {name: part.cpu() for name, part in input.items()} if isinstance(input, dict) else input.cpu()
        write_checkpoint({'input': images, 'target': target.cpu(), 'reason': str(error)}, path)
        return path

    def how_to_resume(self) -> str:
        """Return what to tell the user of an interrupted run."""
        if self.saver is None:
            return ''
        unsaved = f' The newest state could not be saved ({self.saver.unsaved}).' if self.saver.unsaved else ''
        folder = self.result.output_dir
        return (f'{unsaved} To go on, give the same flags with --output {os.path.dirname(folder)} '
                f'--experiment {os.path.basename(folder)} --resume auto').strip()

    def finish(self, seconds: float) -> RunResult:
        """Return the run's result, its epochs ranked as timm prints them: the best last."""
        self.result.seconds = seconds
        for tracker in self.trackers:
            tracker.finish()
        if self.saver is None:
            return self.result
        if self.saver.unsaved:
            _logger.error(f'The last checkpoint is missing: {self.saver.unsaved}.')
        best = self._path('model_best.pth.tar')
        self.result.checkpoint = best if os.path.exists(best) else ''
        if self.result.best_metric is not None:
            _logger.info(f'*** Best metric: {self.result.best_metric} (epoch {self.result.best_epoch})')
        if not self.result.stopped_by:
            self._release()
        self.result.history.sort(
            key=lambda x: x.get('validation', x['train'])[self.metric], reverse=self.saver.decreasing)
        return self.result

    def _release(self) -> None:
        """Write the best student in the hub's format beside the checkpoints, and push it where that is asked for."""
        if not self.best_path:
            return
        folder = export_hub(load_release(self.best_path), self._path('hub'))
        _logger.info(f"The student: timm.create_model('local-dir:{folder}', pretrained=True)")
        if self.run.args.push_to_hub:
            _logger.info(f'Pushed to {push_to_hub(folder, self.run.args.push_to_hub)}')


def _run_name(run: Run) -> str:
    parts = [datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(run.args.model)]
    return run.args.experiment or '-'.join([*parts, str(run.data_config['input_size'][-1])])


__all__ = ['Recorder']
