"""Preparation of a run: measuring, restoring and wrapping between its building and its first epoch."""
import logging
import os
from functools import partial
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn as nn
from timm.scheduler import PlateauLRScheduler

from ..args.per_teacher import describe_teachers, model_of, value_for
from ..checkpoint.rank_state import restore_rank
from ..checkpoint.resume import done_batches, resume_task
from ..data import create_pass_loader
from ..errors import UsageError
from ..report.predictions import PredictionRecorder
from ..teacher.class_means import cached_class_means, class_means_key, compute_class_means, load_class_means
from ..teacher.several import describe_name, live_teachers
from ..teacher.teacher import Teacher
from ..utils._compat import allow_retained_graphs
from ..utils.text import model_file_name
from .state import Run
from .target_statistics import measure_targets
from .unchanged import check_unchanged, forget_data
from .validation import count_samples, has_single_predictions, validate

_logger = logging.getLogger(__name__)


def prepare_run(run: Run, checkpoint: Optional[Dict[str, Any]]) -> Tuple[int, Optional[Dict[str, Any]]]:
    """Bring a built run to its first update: the one door of a checkpoint that `--resume` read.

    Returns:
        The first epoch, and this rank's position inside it; None at the start of one.

    Raises:
        UsageError: If the checkpoint does not fit the run.
    """
    has_other_data = checkpoint is not None and check_unchanged(run, checkpoint)
    report_teacher(run)
    if checkpoint is None or has_other_data:
        prepare_class_means(run)  # else the checkpoint holds them
    if checkpoint is not None and has_other_data:
        forget_data(run, checkpoint)
    start_epoch = resume(run, checkpoint)
    measure_targets(run)  # else the checkpoint holds the statistics
    prepare_for_device(run)
    # last: all of the above draws random numbers
    return start_epoch, restore_rank(run.task, run.loaders, checkpoint) if checkpoint is not None else None


def report_teacher(run: Run) -> None:
    """Print the teacher's accuracy first, so that nobody distils from a broken one."""
    args = run.args
    if run.probes is not None and args.teacher_eval is not False:
        metrics = run.probes.measure_teacher()
        if metrics and args.rank == 0:
            _logger.info(
                f'Teacher {describe_teachers(args.teacher)} '
                + ', '.join(f'{name}: {value:.3f}' for name, value in metrics.items()))
    if run.loaders.eval is None or args.teacher_eval is False or args.no_labels:
        return
    for name, teacher in live_teachers(run.task.teacher).items():
        _report_accuracy(run, name, teacher)


def _report_accuracy(run: Run, name: str, teacher: Teacher) -> None:
    """Print the accuracy of one of the teachers, and keep its predictions."""
    args = run.args
    model = model_of(args.teacher, name)
    who = f"'{name}' ({model})" if name else model
    if teacher.num_classes != args.num_classes:
        _logger.warning(
            f'T{describe_name(name)[1:]} has {teacher.num_classes} classes and the data {args.num_classes}: '
            'its accuracy cannot be measured here.')
        return
    recorder = PredictionRecorder(_TeacherLogits(teacher))
    metrics = validate(run, recorder, f'Teacher {name}'.strip())
    if has_single_predictions(args):
        run.teacher_predictions[name] = recorder.read(count_samples(run.loaders.eval))
    if args.rank == 0:
        top1 = metrics.get('top1', 100.)
        accuracy = f'top-1: {top1:.3f}' if 'top1' in metrics else f"mAP: {metrics['map']:.3f}"
        _logger.info(f'Teacher {who} {accuracy}')
        if top1 < 200 / teacher.num_classes:
            _logger.warning(
                f'That is near chance ({100 / teacher.num_classes:.3f}): are its weights right, is the '
                'order of its classes that of the data, and are its images what it was trained on '
                f'(--teacher-mean, --teacher-std, --teacher-img-size)? They are {teacher.preprocessing}.')


class _TeacherLogits(nn.Module):
    def __init__(self, teacher: Teacher):
        super().__init__()
        self.teacher = teacher

    def forward(self, images: torch.Tensor) -> Optional[torch.Tensor]:
        return self.teacher(images).logits


def prepare_class_means(run: Run) -> None:
    """Give the methods that need them the teacher's class means: from a file, from the cache, or from a pass."""
    shapes = run.task.class_means_shapes
    ignored = [path for name, path in _named_paths(run).items() if name not in shapes and path]
    if ignored:
        _logger.warning(f'--nd-class-means {ignored[0]} is ignored: no method of --kd reads class means.')
    for name, shape in shapes.items():
        path = value_for(run.args.nd_class_means, name)
        means = load_class_means(path, shape) if path else _compute_class_means(run, name, shape)
        run.task.set_class_means(means, name)


def _named_paths(run: Run) -> Dict[str, str]:
    """Return the files of `--nd-class-means` by the name of their teacher."""
    given = run.args.nd_class_means
    if not isinstance(given, dict) and len(run.task.class_means_shapes) > 1 and given:
        raise UsageError(
            f'--nd-class-means {given} holds the class means of one teacher, and those of '
            f'{", ".join(run.task.class_means_shapes)} are read: give NAME=FILE for each')
    if isinstance(given, dict):
        return given
    return dict.fromkeys(run.task.class_means_shapes or [''], given)


def _compute_class_means(run: Run, name: str, shape: Tuple[int, int]) -> torch.Tensor:
    """Return the class means of one of the teachers, from the cache or from a pass."""
    args, task = run.args, run.task
    teacher = live_teachers(task.teacher).get(name)
    if teacher is None:
        raise UsageError(
            f'--kd {args.kd} reads class means of the teacher, which --teacher-cache does not hold: give --teacher, or '
            'their file with --nd-class-means, as a run with --teacher leaves it in class_means of its --output')
    training = args.nd_class_means_transform == 'train'
    loader = create_pass_loader(
        args, run.data_config, run.loaders.train.dataset, run.device, training,
        model_dtype=run.precision.model_dtype, distributed=args.distributed)
    settings = [
        sorted(run.data_config.items()), loader.dataset.transform, args.input_img_mode, run.precision.model_dtype,
        args.amp and args.amp_dtype, *([args.seed] if training else [])]
    key = class_means_key(teacher, loader.dataset, settings) if args.rank == 0 else ''
    model = model_of(args.teacher, name)
    folder = os.path.join(args.output or './output/train', 'class_means')
    return cached_class_means(
        os.path.join(folder, f'{model_file_name(model)}-{key}.safetensors'),
        shape,
        partial(
            compute_class_means, teacher, loader, shape[0], run.device, run.precision.model_dtype,
            run.precision.autocast, args.distributed),
        metadata={'teacher': model, 'transform': args.nd_class_means_transform},
        device=run.device,
        distributed=args.distributed,
    )


def resume(run: Run, checkpoint: Optional[Dict[str, Any]]) -> int:
    """Create the EMA, restore what `--resume` holds and return the first epoch."""
    args = run.args
    if args.model_ema:
        # after the model is on its device, before DDP
        run.task.setup_ema(
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device=torch.device('cpu') if args.model_ema_force_cpu else None,
        )
    start_epoch = 0
    if checkpoint is not None:
        with_optimizer = not args.no_resume_opt
        start_epoch = resume_task(
            run.task,
            args.resume,
            optimizer=run.optimizer if with_optimizer else None,
            loss_scaler=run.precision.loss_scaler if with_optimizer else None,
            lr_scheduler=run.scheduler if with_optimizer else None,
            checkpoint=checkpoint,
        )
    if args.start_epoch is not None:
        start_epoch = args.start_epoch
    start_schedule(run, start_epoch, checkpoint)
    return start_epoch


def start_schedule(run: Run, start_epoch: int, checkpoint: Optional[Dict[str, Any]]) -> None:
    """Bring the learning rate to where the run begins; a plateau schedule goes on from what the checkpoint held."""
    done = done_batches(checkpoint)
    if run.scheduler is None or not (start_epoch or done) or isinstance(run.scheduler, PlateauLRScheduler):
        return
    if run.args.sched_on_updates:
        steps = run.args.grad_accum_steps
        run.scheduler.step_update(start_epoch * -(-len(run.loaders.train) // steps) + -(-done // steps))
    else:
        run.scheduler.step(start_epoch)


def prepare_for_device(run: Run) -> None:
    """Compile, then wrap in DDP: that order keeps DDP out of the compiled graph."""
    if run.args.torchcompile and (run.args.log_grad_norm or run.args.kd_optimizer):
        allow_retained_graphs()
    if run.args.torchcompile:
        run.task.compile(backend=run.args.torchcompile, mode=run.args.torchcompile_mode)
    if run.args.distributed:
        run.task.prepare_distributed(device_ids=[run.device], broadcast_buffers=not run.args.no_ddp_bb)
