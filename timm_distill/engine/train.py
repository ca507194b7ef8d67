"""Training loop: one epoch of a task over a loader."""
import math
import time
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Callable, Dict, Iterator, Optional, Tuple, Union

import torch
import torch.nn as nn
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad
from tqdm import tqdm

from ..data.resumable import EpochData
from ..errors import UsageError
from .dot import DistillationOrientedSGD, backward_apart, clip_together, split_loss, step_apart
from .evaluate import ComputeSpec
from .grad_norms import GradientNorms, GradientShares
from .meters import LossMeter, NonFiniteLossError, Streak
from .nonfinite import UpdateGuard
from .train_log import StepTiming, TrainLog, progress_bar


def accumulation_plan(num_batches: int, grad_accum_steps: int) -> Iterator[Tuple[int, bool]]:
    """For each batch: how many batches share its optimizer update, and whether it is the last of them."""
    for start in range(0, num_batches, grad_accum_steps):
        group_size = min(grad_accum_steps, num_batches - start)
        for i in range(group_size):
            yield group_size, i == group_size - 1


@dataclass(frozen=True)
class UpdateSpec:
    """Settings of an optimizer update.

    Attributes:
        loss_scaler: Called like `timm.utils.NativeScaler`, replaces backward, clipping and the optimizer's step.
        clip_grad: Gradient clipping value, None for none.
        clip_mode: One of timm's clipping modes ('norm', 'value', 'agc').
        grad_accum_steps: Batches per optimizer update; the last group of an epoch may be smaller.
        batch_scale: Gives the factor on the gradients of a batch by its size; None where all batches count alike.
        max_streak: Updates in a row that may be skipped for gradients that are not finite, None for any number.
    """
    loss_scaler: Optional[Callable] = None
    clip_grad: Optional[float] = None
    clip_mode: str = 'norm'
    grad_accum_steps: int = 1
    batch_scale: Optional[Callable] = None
    max_streak: Optional[int] = 10

    def scale_of(self, batch_size: int) -> Union[float, torch.Tensor, None]:
        """Return the factor on the gradients of a batch, None for none."""
        return None if self.batch_scale is None else self.batch_scale(batch_size)


@dataclass(frozen=True)
class EpochHooks:
    """Functions called while an epoch goes on.

    Attributes:
        on_diverged: With the error when `max_streak` updates were skipped; training goes on when it returns. None
            raises it.
        on_update: After each update with the index of the newest batch, its images, and whether a line was logged.
        after_update: When an update is complete, with its index and a function that gives this rank's position for
            `position`; may save, or end the epoch by raising.
    """
    on_diverged: Optional[Callable[[NonFiniteLossError], None]] = None
    on_update: Optional[Callable] = None
    after_update: Optional[Callable[[int, Callable[[], Dict[str, Any]]], None]] = None


@dataclass(frozen=True)
class LogSpec:
    """Logs and measurements of an epoch; training is the same.

    Attributes:
        num_epochs: Length of the run, shown in the progress bar.
        log_interval: Updates between log lines. Only there do the loops wait for the device.
        log_grad_norm: Updates between measurements of each term's gradient norm, 0 for none.
        log_shares: Log each term's weight and share in the gradient at the first two log lines.
        progress: Show a progress bar; None shows one where stderr is a terminal.
        timing: Where to add the time of the epoch.
    """
    num_epochs: Optional[int] = None
    log_interval: int = 50
    log_grad_norm: int = 0
    log_shares: bool = False
    progress: Optional[bool] = None
    timing: Optional[StepTiming] = None


def _share(loss: torch.Tensor, group_size: int, scale: Union[float, torch.Tensor, None]) -> torch.Tensor:
    """Return the part of a batch's loss in its update."""
    loss = loss / group_size if group_size > 1 else loss
    return loss if scale is None else scale * loss


def _backward_and_step(
        loss: torch.Tensor,
        task: TrainingTask,
        guard: UpdateGuard,
        need_update: bool,
        update: UpdateSpec,
) -> None:
    """Backward pass and, at the end of an accumulation group, clipping and the optimizer's step."""
    create_graph = getattr(guard.optimizer, 'is_second_order', False)
    clip_grad, clip_mode = update.clip_grad, update.clip_mode
    parameters = None if clip_grad is None else task.get_clip_parameters(exclude_head='agc' in clip_mode)
    if update.loss_scaler is not None:
        guard.check([loss])  # gradients that only the scale lets overflow are the scaler's business
        update.loss_scaler(
            loss,
            guard.optimizer,
            clip_grad=clip_grad,
            clip_mode=clip_mode,
            parameters=parameters,
            create_graph=create_graph,
            need_update=need_update,
        )
        if need_update:
            guard.restore_buffers()
        return
    loss.backward(create_graph=create_graph)
    if need_update:
        guard.check(guard.gradients())
        if clip_grad is not None:
            dispatch_clip_grad(parameters, value=clip_grad, mode=clip_mode)
        guard.step()


def _backward_and_step_apart(
        result: Dict[str, torch.Tensor],
        share: Callable[[torch.Tensor], torch.Tensor],
        task: TrainingTask,
        guard: UpdateGuard,
        need_update: bool,
        update: UpdateSpec,
        distributed: bool,
) -> None:
    """Do the same with the gradients of label loss and distillation apart."""
    optimizer, scaler = guard.optimizer, update.loss_scaler
    assert isinstance(optimizer, DistillationOrientedSGD)
    losses = split_loss(task, result)
    if scaler is not None:
        guard.check(losses[:2])
    backward_apart(losses, _trainable_module(task), optimizer, share, scaler)
    if not need_update:
        return

    def clip() -> None:
        if update.clip_grad is not None:
            parameters = task.get_clip_parameters(exclude_head='agc' in update.clip_mode)
            clip_together(parameters, optimizer, update.clip_grad, update.clip_mode)

    step_apart(guard, optimizer, clip, scaler, distributed)


def _start_epoch(task: TrainingTask, loader: Any, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    if len(loader) == 0:
        raise UsageError('The training data gives no batch: it has fewer images than one batch, lower --batch-size.')
    set_epoch = getattr(task, 'set_epoch', None)  # weight schedules; timm's own tasks have none
    if set_epoch is not None:
        set_epoch(epoch)
    _trainable_module(task).train()
    optimizer.zero_grad()


def _trainable_module(task: TrainingTask) -> nn.Module:
    module = task.get_trainable_module()
    assert module is not None  # for mypy: only the EMA module may be missing
    return module


class _EpochState:
    """State of an epoch that changes from update to update, task and optimizer aside, and how it is saved."""
    log: TrainLog

    def __init__(
            self,
            task: TrainingTask,
            loader: Any,
            optimizer: torch.optim.Optimizer,
            epoch: int,
            losses: LossMeter,
            norms: GradientNorms,
            grad_accum_steps: int,
    ):
        self.task = task
        self.epoch = epoch
        self.losses = losses
        self.norms = norms
        self.data = EpochData(loader)
        self.guard = UpdateGuard(_trainable_module(task), optimizer)
        self.grad_accum_steps = grad_accum_steps
        self.num_updates = math.ceil(len(loader) / grad_accum_steps)
        self.update_idx = 0  # of the update to come

    def position(self) -> Dict[str, Any]:
        """Return where this rank stands, behind a complete update."""
        return {
            'data': self.data.state_dict(),
            'losses': self.losses.state_dict(),
            'norms': self.norms.state_dict(),
            'logged_loss': self.log.loss,
        }

    def load_position(self, position: Dict[str, Any]) -> None:
        """Continue behind the update after which `position` was called."""
        self.data = EpochData(self.data.loader, position['data'])
        self.losses.load_state_dict(position['losses'])
        self.norms.load_state_dict(position['norms'])
        self.log.loss = position['logged_loss']
        self.update_idx = math.ceil(self.data.num_batches / self.grad_accum_steps)

    def end_update(
            self,
            batch: Tuple[torch.Tensor, torch.Tensor],
            bar: tqdm,
            lr_scheduler: Optional[Any],
            on_diverged: Optional[Callable[[NonFiniteLossError], None]],
    ) -> bool:
        """Do what follows an optimizer update: EMA, log line, learning rate. Returns whether a line was logged."""
        logged = True
        num_updates = self.epoch * self.num_updates + self.update_idx + 1
        self.guard.optimizer.zero_grad()
        if self.guard.was_applied(batch):
            self.task.update_ema(step=num_updates)
        self.norms.finish_update()
        self.losses.end_update(self.guard.finite)
        try:
            logged = self.log.update(self.update_idx, self.guard.optimizer, bar)
            if logged:
                self.guard.watching = self.losses.streak > 0
        except NonFiniteLossError as error:
            error.batch = self.guard.bad_batch
            if on_diverged is None:
                raise
            on_diverged(error)
            self.losses.forgive()
        if lr_scheduler is not None:
            lr_scheduler.step_update(num_updates=num_updates, metric=self.log.loss)
        self.update_idx += 1
        return logged


def train_one_epoch(
        task: TrainingTask,
        loader: Any,
        optimizer: torch.optim.Optimizer,
        compute: ComputeSpec,
        *,
        epoch: int,
        update: UpdateSpec = UpdateSpec(),
        mixup_fn: Optional[Callable] = None,
        lr_scheduler: Optional[Any] = None,
        streak: Optional[Streak] = None,
        hooks: EpochHooks = EpochHooks(),
        position: Optional[Dict[str, Any]] = None,
        log: LogSpec = LogSpec(),
) -> OrderedDict[str, float]:
    """Train the task for one epoch.

    Args:
        task: Gives the loss of a batch and its terms; owns the trainable module and its EMA.
        loader: Yields (input, target); its length is the number of batches.
        optimizer: Holds the task's trainable parameters.
        compute: Where and how.
        epoch: Index of the epoch, from 0. Update counts (EMA warmup, schedules) follow from it.
        update: How gradients become an update.
        mixup_fn: Applied to each batch, where the loader does not prefetch.
        lr_scheduler: A timm scheduler, told about each update.
        streak: Skipped updates in a row before this epoch; brought up to date at its end.
        hooks: What is called meanwhile.
        position: Where an earlier process stopped inside this epoch; the generators must be restored already.
        log: What is said and measured.

    Returns:
        'loss' and each '*_loss' term of the task, averaged over the epoch's samples, and with `log_grad_norm`
        'grad_norm_*' of each term, averaged over its measurements.
    """
    _start_epoch(task, loader, optimizer, epoch)
    norms = GradientNorms(task, log.log_grad_norm, update.loss_scaler, compute.distributed)
    losses = LossMeter(compute.device, compute.distributed, streak)
    state = _EpochState(task, loader, optimizer, epoch, losses, norms, update.grad_accum_steps)
    state.log = TrainLog(
        state.losses, epoch, state.num_updates, log.log_interval, update.max_streak, norms, log.num_epochs)
    shared = {0, log.log_interval} if log.log_shares and state.log.primary else set()
    shares = GradientShares(task, shared, update.loss_scaler)
    if position is not None:
        state.load_position(position)
    plan = islice(accumulation_plan(len(loader), update.grad_accum_steps), state.data.num_batches, None)
    desc = f"epoch {epoch}{f' of 0-{log.num_epochs - 1}' if log.num_epochs else ''} train"
    begins_update = True
    num_done, epoch_start = state.data.num_batches, time.perf_counter()
    with progress_bar(state.data, desc, log.progress if state.log.primary else False, state.data.num_batches) as bar:
        data_start = time.perf_counter()
        for batch_idx, ((input, target), (group_size, need_update)) in enumerate(zip(bar, plan), num_done):
            input, target = compute.prepare_batch(input, target, mixup_fn)
            data_time = time.perf_counter() - data_start
            if log.timing is not None:
                log.timing.data_seconds += data_time
            if begins_update:
                state.guard.note()
            with nullcontext() if need_update else task.no_sync():
                with compute.amp_autocast():
                    result = task(input, target)
                state.log.add(result, target.shape[0], data_time)
                norms.add(result, group_size, state.update_idx)
                shares.add(result, state.update_idx)
                share = partial(_share, group_size=group_size, scale=update.scale_of(target.shape[0]))
                if isinstance(optimizer, DistillationOrientedSGD):
                    _backward_and_step_apart(
                        result, share, task, state.guard, need_update, update, compute.distributed)
                else:
                    _backward_and_step(share(result['loss']), task, state.guard, need_update, update)
            begins_update = need_update
            if need_update:
                logged = state.end_update((input, target), bar, lr_scheduler, hooks.on_diverged)
                if logged:
                    shares.log()
                if hooks.on_update is not None:
                    hooks.on_update(batch_idx, input, logged)
                if hooks.after_update is not None:
                    hooks.after_update(state.update_idx - 1, state.position)
            data_start = time.perf_counter()
    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()
    average = state.losses.read()[0]  # waits for the device: what was timed is over
    if streak is not None:
        streak.length, streak.reason = losses.streak, losses.reason
    if log.timing is not None:
        log.timing.batches += state.data.num_batches - num_done
        log.timing.seconds += time.perf_counter() - epoch_start
    return OrderedDict(**average, **norms.average())
