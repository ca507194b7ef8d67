"""Evaluation loop: metrics of a model over a loader."""
import logging
import time
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Dict, Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.task import (
    ClassificationEvaluator,
    MultiLabelClassificationEvaluator,
    evaluation_sample_limit,
)
from tqdm import tqdm

from .train_log import progress_bar

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComputeSpec:
    """Device and precision of a loop.

    Attributes:
        device: Where the model lives.
        model_dtype: Input dtype, where the loader does not set it.
        amp_autocast: Makes the context of each forward pass.
        channels_last: Compute in channels-last memory format.
        prefetcher: The loader already transfers, converts and mixes.
        distributed: Count, or average, over all ranks.
    """
    device: torch.device
    model_dtype: Optional[torch.dtype] = None
    amp_autocast: Callable = nullcontext
    channels_last: bool = False
    prefetcher: bool = True
    distributed: bool = False

    def prepare_batch(
            self,
            input: torch.Tensor,
            target: torch.Tensor,
            mixup_fn: Optional[Callable] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Do what a prefetching loader has done already (transfer, dtype, mixup), and set the memory format."""
        if not self.prefetcher:
            input, target = input.to(device=self.device, dtype=self.model_dtype), target.to(device=self.device)
            if mixup_fn is not None:
                input, target = mixup_fn(input, target)
        if self.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        return input, target


def _log_evaluation(
        log_name: str,
        batch_idx: int,
        num_batches: int,
        evaluator: ClassificationEvaluator,
        seconds: float,
        bar: tqdm,
) -> None:
    metrics = evaluator.summary()
    name = 'top1' if 'top1' in metrics else 'loss'  # multi-label metrics need all predictions
    bar.set_postfix({name: f'{metrics[name]:.2f}'}, refresh=False)
    accuracy = f"  Acc@1: {metrics['top1']:.3f}  Acc@5: {metrics['top5']:.3f}" if 'top1' in metrics else ''
    _logger.info(
        f'{log_name}: [{batch_idx:>4d}/{num_batches - 1:>4d}]  '
        f'Time: {seconds / (batch_idx + 1):.3f}s, {evaluator.num_samples / max(seconds, 1e-9):.1f} images/s  '
        f"Loss: {metrics['loss']:.4f}{accuracy}")


def _merge_views(output: torch.Tensor, target: torch.Tensor, tta: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Average the logits of each image's views, which follow one another in the batch."""
    return output.unflatten(0, (-1, tta)).mean(dim=1), target[::tta]


def evaluator_class(task: str, threshold: float = 0.5) -> Callable[..., ClassificationEvaluator]:
    """Return the class of the metrics for a kind of targets, 'classification' or 'multilabel'.

    Args:
        task: Kind of targets.
        threshold: Probability from which a label of several counts as predicted.
    """
    if task == 'multilabel':
        return partial(MultiLabelClassificationEvaluator, threshold=threshold)
    return ClassificationEvaluator


@torch.inference_mode()
def evaluate(
        model: nn.Module,
        loader: Any,
        compute: ComputeSpec,
        *,
        tta: int = 0,
        create_evaluator: Callable[..., ClassificationEvaluator] = ClassificationEvaluator,
        on_output: Optional[Callable] = None,
        log_interval: int = 50,
        log_name: str = 'Test',
        progress: Optional[bool] = None,
) -> OrderedDict[str, float]:
    """Evaluate a classifier, each image counted once whatever the batches and the number of ranks.

    Args:
        model: Gives logits, or a tuple that begins with them; is put in eval mode and left there.
        loader: Yields (input, class index).
        compute: Where and how.
        tta: Views of an image that follow one another in a batch and are averaged, 0 or 1 for none.
        create_evaluator: Class of the metrics, called with the device and `max_samples`.
        on_output: Called with the logits and targets of each batch.
        log_interval: Batches between log lines. Only there does the loop wait for the device.
        log_name: First word of the log lines.
        progress: Show a progress bar; None shows one where stderr is a terminal.

    Returns:
        The evaluator's metrics: 'loss' (cross-entropy), 'top1' and 'top5' (percent).
    """
    model.eval()
    max_samples, views = evaluation_sample_limit(loader), max(tta, 1)
    evaluator = create_evaluator(compute.device, max_samples=None if max_samples is None else max_samples // views)
    primary = not compute.distributed or dist.get_rank() == 0
    start = time.perf_counter()
    with progress_bar(loader, log_name, progress if primary else False) as bar:
        for batch_idx, (input, target) in enumerate(bar):
            input, target = compute.prepare_batch(input, target)
            with compute.amp_autocast():
                output = model(input)
            if isinstance(output, (tuple, list)):
                output = output[0]
            if views > 1:
                output, target = _merge_views(output, target, views)
            evaluator.update(output, target)
            if on_output is not None:
                on_output(output, target)
            if primary and (batch_idx % log_interval == 0 or batch_idx == len(loader) - 1):
                _log_evaluation(log_name, batch_idx, len(loader), evaluator, time.perf_counter() - start, bar)
    return evaluator.compute(compute.distributed)


@torch.no_grad()
def evaluate_terms(
        measure: Callable[[torch.Tensor], Dict[str, torch.Tensor]],
        loader: Any,
        compute: ComputeSpec,
        *,
        log_name: str = 'Test',
        progress: Optional[bool] = None,
) -> OrderedDict[str, float]:
    """Return the averages of loss terms over images that are not trained on.

    Args:
        measure: Gives the terms of a batch by name.
        loader: Yields (input, target); the target is not read.
        compute: Where and how.
        log_name: First word of the log line.
        progress: Show a progress bar; None shows one where stderr is a terminal.
    """
    left = evaluation_sample_limit(loader)
    sums: Dict[str, torch.Tensor] = {}
    count = torch.zeros((), dtype=torch.float64, device=compute.device)
    primary = not compute.distributed or dist.get_rank() == 0
    with progress_bar(loader, log_name, progress if primary else False) as bar:
        for input, target in bar:
            input, target = compute.prepare_batch(input, target)
            with compute.amp_autocast():
                terms = measure(input)
            # all images of a batch or none are measured: what a sampler repeats is in the last one
            number = len(input) if left is None else max(0, min(len(input), left))
            left = None if left is None else left - number
            for name, term in terms.items():
                sums[name] = sums.get(name, torch.zeros_like(count)) + number * term.detach().to(count.dtype)
            count += number
    if compute.distributed:
        for value in (*sums.values(), count):
            dist.all_reduce(value)
    averages = OrderedDict((name, (value / count).item()) for name, value in sums.items())
    if primary and averages:
        _logger.info(f'{log_name}: ' + '  '.join(f'{name}: {value:.4f}' for name, value in averages.items()))
    return averages
