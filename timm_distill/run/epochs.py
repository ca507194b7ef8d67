"""Epochs of a run."""
import argparse
import logging
import os
import signal
from typing import Any, Callable, Dict, Iterator, Optional

import torch
import torchvision

from ..checkpoint.file import why_unwritten
from ..data import DataLoaders, set_loader_epoch
from ..engine.meters import NonFiniteLossError
from ..engine.train import EpochHooks, LogSpec, UpdateSpec, train_one_epoch
from ..errors import UsageError
from .cached import begin_epoch, end_epoch
from .divergence import MAX_BAD_UPDATES
from .recorder import Recorder
from .state import Run
from .stopping import LoaderStalled, StopRequested, StopSignals
from .validation import share_batch_norm, validate_student

_logger = logging.getLogger(__name__)


def fit(run: Run, recorder: Recorder, start_epoch: int, position: Optional[Dict[str, Any]]) -> None:
    """Run the epochs, the first from `position` where an earlier process stopped inside it."""
    try:
        for epoch in range(start_epoch, run.last_epoch):
            run_epoch(run, epoch, recorder, position)
            position = None
    except UsageError:
        recorder.discard()
        raise
    except NonFiniteLossError as e:
        path = recorder.save_bad_batch(e)
        raise NonFiniteLossError(f'{e} The batch is in {path}.' if path else str(e)) from e
    except StopRequested as e:
        recorder.signals.note_only()
        if isinstance(e, LoaderStalled):
            recorder.save_stalled()
        recorder.result.stopped_by = e.number
        _logger.warning(f'Stopped by {e}. {recorder.how_to_resume()}')
    except KeyboardInterrupt:  # a second Ctrl-C, before the first was acted upon
        recorder.signals.note_only()
        recorder.result.stopped_by = signal.SIGINT
        _logger.warning(f'Interrupted inside an update, which is lost. {recorder.how_to_resume()}')


def run_epoch(run: Run, epoch: int, recorder: Recorder, position: Optional[Dict[str, Any]] = None) -> None:
    """Train, validate, step the schedule and save once."""
    args = run.args
    set_loader_epoch(run.loaders.train, epoch)
    if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
        disable_mixup(run.loaders)
    recorder.begin_epoch(position)
    begin_epoch(run, epoch)
    last_update = -(-len(run.loaders.train) // args.grad_accum_steps) - 1
    train_metrics = train_one_epoch(
        run.task,
        StoppableLoader(run.loaders.train, recorder.signals),
        run.optimizer,
        run.compute,
        epoch=epoch,
        update=UpdateSpec(
            run.precision.loss_scaler, args.clip_grad, args.clip_mode, args.grad_accum_steps, run.loaders.batch_scale,
            max_streak=None if args.on_nan == 'skip' else MAX_BAD_UPDATES),
        mixup_fn=run.loaders.mixup_fn,
        lr_scheduler=run.scheduler,
        streak=run.streak,
        hooks=EpochHooks(
            recorder.roll_back if args.on_nan == 'rollback' else None,
            create_update_hook(args, run.device, recorder.result.output_dir),
            lambda i, get_position: recorder.after_update(epoch, i == last_update, i, get_position)),
        position=position,
        log=LogSpec(
            run.num_epochs, args.log_interval, args.log_grad_norm, run.task.changes_terms(epoch), run.progress,
            run.timing),
    )
    end_epoch(run, epoch)
    share_batch_norm(args, run.task.get_trainable_module())
    metric = None
    validating = (epoch + 1) % args.val_interval == 0 or epoch + 1 in (run.last_epoch, *args.save_epochs)
    validating = validating or run.probes is not None and run.probes.is_due(epoch)
    if validating:
        with recorder.interruptible(epoch, last_update):
            eval_metrics = validate_student(run, epoch)
        if recorder.metric == 'ranking_loss':
            (eval_metrics or train_metrics)['ranking_loss'] = run.task.unscheduled_loss(train_metrics)
        metric = recorder.rank(train_metrics, eval_metrics)
        recorder.summarize(epoch, train_metrics, eval_metrics)
    if run.scheduler is not None:
        run.scheduler.step(epoch + 1, metric)  # before saving, so that a resumed schedule knows this epoch
    recorder.save(epoch, metric)


class StoppableLoader:
    """A loader that a signal ends while a batch does not come."""

    def __init__(self, loader: Any, signals: StopSignals):
        self.loader = loader
        self.signals = signals

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        with self.signals.waiting():
            batches = iter(self.loader)
        while True:
            with self.signals.waiting():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


def create_update_hook(
        args: argparse.Namespace,
        device: torch.device,
        output_dir: str,
) -> Optional[Callable[[int, Any, bool], None]]:
    """Return what `--synchronize-step` and `--save-images` do after an update, None for nothing."""
    synchronizes = args.synchronize_step and device.type != 'cpu'
    saves_images = args.save_images and bool(output_dir)
    if not synchronizes and not saves_images:
        return None

    def after_update(batch_idx: int, images: Any, logged: bool) -> None:
        if synchronizes:
            torch.accelerator.synchronize(device)
        if saves_images and logged and isinstance(images, torch.Tensor):
            path = os.path.join(output_dir, f'train-batch-{batch_idx}.jpg')
            try:
                torchvision.utils.save_image(images, path, padding=0, normalize=True)
            except OSError as e:
                _logger.error(f'--save-images: {path} could not be written ({why_unwritten(e)}).')

    return after_update


def disable_mixup(loaders: DataLoaders) -> None:
    if loaders.mixup_fn is not None:
        loaders.mixup_fn.mixup_enabled = False  # type: ignore[attr-defined]
    elif hasattr(loaders.train, 'mixup_enabled') and loaders.train.mixup_enabled:
        loaders.train.mixup_enabled = False
