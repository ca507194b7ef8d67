"""Validation of a run's student, its average and its teacher."""
import argparse
import logging
from collections import OrderedDict
from typing import Any, Optional

import torch.nn as nn
from timm import utils

from ..args import PROBE_METRICS
from ..data import DataLoaders
from ..engine.evaluate import evaluate, evaluate_terms, evaluator_class
from ..methods._scopes import join_scope
from ..report.predictions import PredictionRecorder, agreement
from ..task import DistillTask
from .state import Run

_logger = logging.getLogger(__name__)


def validate_student(run: Run, epoch: int = 0) -> Optional['OrderedDict[str, float]']:
    """Validate the merged student and its EMA; the EMA's numbers count where there are any, as in timm.

    Without labels it is the loss terms on the held-out images that are measured. Probes of the features come with it.

    Args:
        run: The run.
        epoch: Which has ended, counted from 0.
    """
    metrics = None
    if run.loaders.eval is not None:
        metrics = validate_without_labels(run) if run.args.no_labels else validate_with_labels(run)
    probes = run.probes.measure(epoch, last=epoch + 1 == run.last_epoch) if run.probes is not None else {}
    if probes and run.args.rank == 0:
        _logger.info('Probes: ' + '  '.join(f'{name}: {value:.3f}' for name, value in probes.items()))
    return OrderedDict({**(metrics or {}), **probes}) or None


def validate_without_labels(run: Run) -> 'OrderedDict[str, float]':
    """Return the averages of the loss terms on the validation images, and 'loss', their sum without schedules."""
    ema = run.task.has_ema() and not run.args.model_ema_force_cpu
    if ema:
        share_batch_norm(run.args, run.task.get_trainable_module(ema=True))
    averages = evaluate_terms(
        lambda images: run.task.distill_terms(images, ema=ema), run.loaders.eval, run.compute,
        log_name='Test (EMA)' if ema else 'Test', progress=run.progress)
    if averages:
        averages['loss'] = run.task.unscheduled_loss(averages)
    return averages


def validate_with_labels(run: Run) -> 'OrderedDict[str, float]':
    """Validate the student and its EMA on labelled images."""
    metrics = validate_with_agreement(run, run.task.get_eval_model())  # type: ignore[arg-type]
    if run.task.has_ema() and not run.args.model_ema_force_cpu:
        share_batch_norm(run.args, run.task.get_trainable_module(ema=True))
        student_top1 = metrics['top1']
        metrics = validate_with_agreement(run, run.task.get_eval_model(ema=True), 'Test (EMA)')  # type: ignore[arg-type]
        metrics['student_top1'] = student_top1
    return metrics


def ranking_metric(args: argparse.Namespace, loaders: DataLoaders, task: DistillTask) -> str:
    """Return the name of the metric that ranks epochs: 'ranking_loss' where no metric of the student can.

    Accuracy says nothing of a classifier that nothing trains, and a training loss under a schedule is smallest where
    the schedule is.
    """
    if args.eval_metric in (*PROBE_METRICS, 'cosine'):
        return args.eval_metric
    if args.no_labels and loaders.eval is not None and task.measurable:
        return 'loss'
    if args.no_labels or not task.trains_classifier:
        return 'ranking_loss'
    if loaders.eval is not None:
        return args.eval_metric
    return 'ranking_loss' if task.is_scheduled else 'loss'


def describe_metric(metric: str, loaders: DataLoaders) -> str:
    """Return the name of a ranking metric for readers of a checkpoint: validated, or of the training images."""
    if metric in (*PROBE_METRICS, 'cosine'):
        return f'probe {metric}'
    if metric == 'ranking_loss':
        return 'training loss without schedules'
    return f'validation {metric}' if loaders.eval is not None else f'training {metric}'


def validate_with_agreement(run: Run, model: nn.Module, log_name: str = 'Test') -> 'OrderedDict[str, float]':
    """Validate a model, and measure how often it predicts what each teacher does, where that is known."""
    if not run.teacher_predictions:
        return validate(run, model, log_name)
    recorder = PredictionRecorder(model)
    metrics = validate(run, recorder, log_name)
    classes, _ = recorder.read(count_samples(run.loaders.eval))
    for name, (teacher_classes, _) in run.teacher_predictions.items():
        metrics[join_scope('agreement', name)] = agreement(classes, teacher_classes)
    return metrics


def validate(run: Run, model: nn.Module, log_name: str = 'Test') -> 'OrderedDict[str, float]':
    """Evaluate a model on the validation data."""
    return evaluate(
        model,
        run.loaders.eval,
        run.compute,
        tta=run.args.tta,
        create_evaluator=evaluator_class(run.args.task, run.args.multilabel_threshold),
        log_interval=run.args.log_interval,
        log_name=log_name,
        progress=run.progress,
    )


def count_samples(loader: Any) -> Optional[int]:
    """Return the images of a loader's set, over all ranks; None where that is unknown."""
    return len(loader.dataset) if hasattr(loader.dataset, '__len__') else None


def has_single_predictions(args: argparse.Namespace) -> bool:
    """Whether a model's output is one prediction per image: views are averaged after it, labels may be several."""
    return not args.tta and args.task == 'classification' and not args.naflex_loader


def share_batch_norm(args: argparse.Namespace, module: Optional[nn.Module]) -> None:
    """Give all ranks the same running statistics after an epoch, by `--dist-bn`."""
    if module is not None and args.distributed and args.dist_bn in ('broadcast', 'reduce'):
        utils.distribute_bn(module, args.world_size, args.dist_bn == 'reduce')
