"""End-of-run report: predictions, figures and the page."""
import argparse
import logging
import os
import time
from typing import Dict, Sequence

import torch.distributed as dist
import torch.nn as nn

from ..args.per_teacher import teachers_of
from ..checkpoint.file import read_checkpoint, why_unwritten
from ..data import class_names
from ..pair import time_teacher
from ..report.html import ReportData, can_draw, write_report
from ..report.predictions import Predictions, collect_predictions
from ..report.trackers import read_summary
from ..teacher.several import live_teachers
from ..utils.distributed import share_weights
from .recorder import Recorder
from .state import Run, RunResult
from .stopping import StopRequested, end_child_processes
from .validation import count_samples, has_single_predictions

_logger = logging.getLogger(__name__)


def close(
        run: Run,
        recorder: Recorder,
        start: float,
        command: str = '',
        warnings: Sequence[str] = (),
) -> RunResult:
    """Write the report and the student to release, where no signal stopped the run before, and return its result.

    Args:
        run: The run.
        recorder: Knows what was saved.
        start: When the run began, by `time.monotonic`.
        command: How it was started, for the report.
        warnings: What its log warned of, likewise.
    """
    signals = recorder.signals
    try:
        if not recorder.result.stopped_by:
            signals.last_words = recorder.when_unfinished()
            signals.let_go()
            write_run_report(run, recorder, command, warnings)
        if run.args.distributed:
            dist.destroy_process_group()
        recorder.finish(time.monotonic() - start)
        signals.hold()
    except StopRequested as e:
        signals.note_only()
        recorder.result.stopped_by = e.number
        _logger.warning(f'Stopped by {e}: {signals.last_words}.')
    if recorder.result.stopped_by:
        end_child_processes()  # a frozen one would be waited for
    return recorder.result


def write_run_report(run: Run, recorder: Recorder, command: str = '', warnings: Sequence[str] = ()) -> None:
    """Write `report.html` and `report.png` of the best student beside the checkpoints.

    Args:
        run: The run.
        recorder: What it left behind.
        command: How it was started.
        warnings: What its log warned of.
    """
    args = run.args
    if not args.report or not can_draw():
        if args.report and args.rank == 0:
            _logger.info("No report: pip install 'timm_distill[report]' draws one, --no-report leaves it out.")
        return
    student = teacher = None
    if run.loaders.eval is not None and has_single_predictions(args) and not args.no_labels:
        num_samples = count_samples(run.loaders.eval)
        student = collect_predictions(
            best_student(run, recorder), run.loaders.eval, run.device, run.precision.autocast,
            run.precision.model_dtype, num_samples)
        teachers = {name: Predictions(*own, student.labels) for name, own in run.teacher_predictions.items()}
        teacher = teachers.get('', teachers)
    if recorder.saver is None:
        return
    data = ReportData(
        title=f'{args.model} distilled from {title_of(args)}' if run.task.teacher is not None else str(args.model),
        rows=read_summary(recorder.summary_path) if os.path.exists(recorder.summary_path) else [],
        student=student,
        teacher=teacher,
        class_names=class_names(run.loaders.eval.dataset, args.num_classes) if run.loaders.eval is not None else (),
        times=split_step_time(run),
        facts=recorder.info['provenance'],
        best_epoch=recorder.result.best_epoch,
        ema=run.task.has_ema(),
        command=command,
        warnings=warnings,
    )
    try:
        paths = write_report(data, recorder.result.output_dir)
    except Exception as e:  # a figure must not cost a finished run
        reason = why_unwritten(e) if isinstance(e, OSError) else f'{type(e).__name__}: {e}'
        _logger.warning(f'The report could not be written: {reason}')
        return
    _logger.info(f'Report: {paths[0]}')


def title_of(args: argparse.Namespace) -> str:
    """Return the teachers' models in words."""
    return ' and '.join(teachers_of(args.teacher).values()) or 'cached targets'


def best_student(run: Run, recorder: Recorder) -> nn.Module:
    """Return the best student, the same on every rank."""
    model = run.task.module.merged_copy()
    path = recorder.best_path
    if path:
        checkpoint = read_checkpoint(path)
        model.load_state_dict(checkpoint.get('state_dict_ema', checkpoint['state_dict']))
    if run.args.distributed:
        share_weights(model, run.device)
    return model


def split_step_time(run: Run) -> Dict[str, float]:
    """Return the seconds of a training step by part: the teacher's share is measured on a batch of noise."""
    if not run.timing.batches:
        return {}
    data = run.timing.data_seconds / run.timing.batches
    total = run.timing.seconds / run.timing.batches
    teachers = live_teachers(run.task.teacher)
    if not teachers or run.task.targets is not None:
        return {'student': max(total - data, 0.), 'data': data}
    if any(teacher.is_sharded for teacher in teachers.values()):  # all processes would have to run it
        return {'student': max(total - data, 0.), 'data': data}
    seconds = time_teacher(run.task, run.args.batch_size, run.precision.autocast)
    return {'teacher': seconds, 'student': max(total - data - seconds, 0.), 'data': data}
