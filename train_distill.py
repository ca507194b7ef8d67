#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Train a timm model, alone or distilled from a frozen teacher, and save plain timm checkpoints.

    train_distill.py --data-dir DIR --teacher resnet50 --student mobilenetv2_100 --kd norm

Flags of timm's `train.py` keep their names, defaults and meanings; `--list-kd` shows the methods, `--demo` a complete
run on data that it brings along.
"""
import argparse
import json
import logging
import os
import signal
import sys
import time
from collections import OrderedDict
from dataclasses import replace
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
import torchvision
from timm import utils
from timm.data import resolve_data_config
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.models import safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import PlateauLRScheduler, create_scheduler_v2, scheduler_kwargs

import timm_distill
from timm_distill import DistillTask, MergeError, Teacher, UsageError, check_pair, create_distill_task
from timm_distill.analysis import PredictionRecorder, Predictions, agreement, collect_predictions
from timm_distill.args import (
    args_to_yaml,
    check_train_args,
    create_train_parser,
    parse_args,
    translate_timm_distillation,
)
from timm_distill.class_means import cached_class_means, class_means_key, compute_class_means, load_class_means
from timm_distill.composition import check_mixing, methods_of
from timm_distill.data import (
    DataLoaders,
    IndexedDataset,
    class_names,
    create_loaders,
    create_pass_loader,
    create_train_loss,
    read_labels,
    set_loader_epoch,
    user_message,
)
from timm_distill.demo import run_demo
from timm_distill.device import (
    Precision,
    enable_fast_math,
    import_device_modules,
    resolve_device_name,
    resolve_dtype,
    resolve_precision,
)
from timm_distill.engine import NonFiniteLossError, evaluate, evaluator_class, train_one_epoch
from timm_distill.gradients import allow_retained_graphs
from timm_distill.methods import describe_methods, list_methods, load_method_file
from timm_distill.pair import time_teacher
from timm_distill.probing import CANNOT_RUN, random_images, runnable_size
from timm_distill.recorder import Recorder
from timm_distill.report import ReportData, can_draw, read_summary, write_report
from timm_distill.resume import check_same_run, done_batches, resolve_resume, restore_rank, resume_task
from timm_distill.run import Run, RunResult, describe_run
from timm_distill.stopping import StopRequested, StopSignals, exit_code
from timm_distill.storage import read_checkpoint

_logger = logging.getLogger('train')

PROGRESS = {'auto': None, 'bar': True, 'lines': False}  # by --log-style

MAX_BAD_UPDATES = 10  # in a row, before --on-nan acts


def main(argv: Optional[Sequence[str]] = None) -> Optional[RunResult]:
    """Run the script and return what it leaves behind; None for `--list-kd` and `--demo`.

    Raises:
        UsageError: For anything that the user can put right.
    """
    args = parse_args(create_train_parser(), argv)
    for path in args.kd_module:
        load_method_file(path)
    if args.list_kd:
        print(describe_methods())
        return None
    if args.demo:
        run_demo(main, args.demo_dir)
        return None
    translate_timm_distillation(args, list_methods())
    check_train_args(args)
    check_mixing(args.kd, mixing_flags(args))
    if args.dry_run:
        dry_run(args)
        return None
    return train(args)


def mixing_flags(args: argparse.Namespace) -> List[str]:
    """Return the flags in use that mix images."""
    values = {'--mixup': args.mixup, '--cutmix': args.cutmix, '--cutmix-minmax': args.cutmix_minmax}
    return [f'{flag} {value}' for flag, value in values.items() if value]


def dry_run(args: argparse.Namespace) -> None:
    """Print what `check_pair` finds for the flags; nothing is downloaded and no data is read.

    Raises:
        UsageError: If the pair does not work.
    """
    device = torch.device(resolve_device_name(args.device))
    args.pretrained, args.rank = False, 0
    student = build_student(args)
    data_config = fit_input_size(args, student, resolve_data_config(vars(args), model=student))
    report = check_pair(
        args.teacher,
        student,
        args.kd,
        teacher_kwargs=args.teacher_kwargs,
        teacher_pretrained=args.teacher_pretrained,
        teacher_checkpoint=args.teacher_checkpoint,
        teacher_dtype=resolve_dtype(args.teacher_dtype),
        kd_weight=args.kd_weight,
        kd_kwargs=args.kd_kwargs,
        kd_schedule=args.kd_schedule,
        kd_tap=args.kd_tap,
        num_epochs=count_epochs(args),
        num_samples=args.train_num_samples,
        input_size=data_config['input_size'],
        device=device,
    )
    if not report.ok:
        raise UsageError(report.reason)
    print(replace(report, student=args.model))


def train(args: argparse.Namespace) -> RunResult:
    """Train as the flags say. The output folder is made when everything else stands."""
    start = time.monotonic()
    args_text = args_to_yaml(args)
    checkpoint = resolve_resume(args)
    run = build_run(args)
    if checkpoint is not None:
        # a teacher without weights is another one on every rank
        check_same_run(args, checkpoint, getattr(run.task.teacher, 'digest', '') if args.rank == 0 else '')
    report_teacher(run)
    if checkpoint is None:
        prepare_class_means(run)  # a checkpoint holds them
    start_epoch = resume(run, checkpoint)
    prepare_for_device(run)
    with StopSignals(args.distributed) as signals:
        recorder = Recorder(
            run, args_text, checkpoint, start_epoch, signals, describe_run(run, timm_distill.__version__))
        position = restore_rank(run.task, run.loaders, checkpoint) if checkpoint is not None else None
        fit(run, recorder, start_epoch, position)
        if not recorder.result.stopped_by:
            write_run_report(run, recorder)
    if args.distributed:
        torch.distributed.destroy_process_group()
    return recorder.finish(time.monotonic() - start)


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
        recorder.result.stopped_by = e.number
        _logger.warning(f'Stopped by {e}. {recorder.how_to_resume()}')
    except KeyboardInterrupt:  # a second Ctrl-C, before the first was acted upon
        recorder.result.stopped_by = signal.SIGINT
        _logger.warning(f'Interrupted inside an update, which is lost. {recorder.how_to_resume()}')


def build_run(args: argparse.Namespace) -> Run:
    """Build everything that can fail before anything is written."""
    device, precision = setup_device(args)
    utils.random_seed(args.seed, args.rank)
    student = build_student(args)
    data_config = resolve_data_config(vars(args), model=student, verbose=args.rank == 0)
    data_config = fit_input_size(args, student, data_config)
    with_indices = any(method.needs_indices for method in methods_of(args.kd).values())
    if with_indices and args.task == 'multilabel':
        raise UsageError(f'--kd {args.kd} reads one label per image: it does not go with --task multilabel')
    check_train_sizes(args, student, data_config)
    patch_size = find_patch_size(student) if args.naflex_loader else None
    loaders = create_loaders(
        args, data_config, args.num_classes, device, precision.model_dtype, args.distributed, with_indices, patch_size)
    task = build_task(args, student, data_config, device, precision, loaders)
    optimizer = build_optimizer(args, task, loaders.batch_size)
    scheduler, num_epochs = build_scheduler(args, optimizer, loaders)
    return Run(args, device, precision, data_config, loaders, task, optimizer, scheduler, num_epochs)


def setup_device(args: argparse.Namespace) -> Tuple[torch.device, Precision]:
    """Choose device and precision, and join the process group."""
    import_device_modules(args.device_modules or ())
    args.device = resolve_device_name(args.device)
    enable_fast_math()
    device = utils.init_distributed_device(args)
    if args.fuser:
        utils.set_jit_fuser(args.fuser)
    if args.fast_norm:
        set_fast_norm()
    _logger.info(f'Process {args.rank} of {args.world_size} on {device}.')
    return device, resolve_precision(device, args.amp, args.amp_dtype, args.model_dtype)


def build_student(args: argparse.Namespace) -> nn.Module:
    """Create the student as timm's script creates its model."""
    if args.initial_checkpoint and not os.path.isfile(args.initial_checkpoint):
        raise UsageError(f'--initial-checkpoint {args.initial_checkpoint}: there is no such file.')
    if not args.model.startswith(('hf-hub:', 'hf_hub:', 'local-dir:')) and not timm.is_model(args.model):
        similar = timm.list_models(f'*{args.model[:6]}*')[:5]
        hint = f' (similar: {", ".join(similar)})' if similar else ''
        raise UsageError(f"Unknown student '{args.model}'{hint}. --student takes a timm architecture.")
    try:
        student = timm.create_model(args.model, **_student_kwargs(args))
    except Exception as e:  # a hub, a file and a constructor each raise their own errors
        raise UsageError(f"The student '{args.model}' cannot be built with these --pretrained, --initial-checkpoint, "
                         f'--model-kwargs: {type(e).__name__}: {" ".join(str(e).split())[:300]}') from e
    init_head(args, student)
    if args.grad_checkpointing:
        student.set_grad_checkpointing(enable=True)
    if args.num_classes is None:
        args.num_classes = student.num_classes
    if args.split_bn:
        student = convert_splitbn_model(student, max(args.aug_splits, 2))
    return student


def fit_input_size(args: argparse.Namespace, student: nn.Module, data_config: Dict[str, Any]) -> Dict[str, Any]:
    """Return the data config with a size that the student runs at: its own, where it takes no other.

    Raises:
        UsageError: If it runs at neither.
    """
    wanted = data_config['input_size']
    size, reason = runnable_size(student, wanted)
    if reason:
        raise UsageError(f"The student '{args.model}' cannot run on the input {list(wanted)}: {reason}. Change "
                         '--img-size, --in-chans or --model-kwargs img_size=N.')
    if size is None:
        return data_config
    _logger.warning(f"The student '{args.model}' takes {size[0]}x{size[1]} alone: images are loaded at that size, not "
                    f'at {wanted[1]}x{wanted[2]}. --model-kwargs img_size=N builds some models for other sizes.')
    return {**data_config, 'input_size': (wanted[0], *size)}


def check_train_sizes(args: argparse.Namespace, student: nn.Module, data_config: Dict[str, Any]) -> None:
    """Reject `--train-img-sizes` that the student cannot run at."""
    channels = data_config['input_size'][0]
    for size in args.train_img_sizes or ():
        other, reason = runnable_size(student, (channels, size, size))
        if reason or other is not None:
            raise UsageError(f"The student '{args.model}' cannot run at {size}x{size}, one of --train-img-sizes. "
                             '--model-kwargs dynamic_img_size=True lets many models take any size.')


def find_patch_size(student: nn.Module) -> Tuple[int, int]:
    """Return the patch size (height, width) of a student that reads patch sequences."""
    get_patch_size = getattr(student, 'get_patch_size', None)
    if get_patch_size is None:
        raise UsageError(f'--naflex-loader gives sequences of patches, which {type(student).__name__} cannot read: '
                         'choose a naflexvit model as --student, or leave it out')
    height, width = get_patch_size()
    return height, width


def _student_kwargs(args: argparse.Namespace) -> Dict[str, Any]:
    kwargs = dict(
        pretrained=args.pretrained,
        in_chans=args.in_chans or (args.input_size[0] if args.input_size else 3),
        num_classes=args.num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        drop_block_rate=args.drop_block,
        global_pool=args.gp,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
        checkpoint_path=args.initial_checkpoint,
        **args.model_kwargs,
    )
    if args.pretrained_path:
        # num_classes=-1 adapts the head to this run's classes
        kwargs['pretrained_cfg_overlay'] = dict(file=args.pretrained_path, num_classes=-1)
    return kwargs


@torch.no_grad()
def init_head(args: argparse.Namespace, student: nn.Module) -> None:
    """Apply `--head-init-scale` and `--head-init-bias`."""
    if args.head_init_scale is None and args.head_init_bias is None:
        return
    classifier = student.get_classifier()
    if args.head_init_scale is not None:
        classifier.weight.mul_(args.head_init_scale)
        classifier.bias.mul_(args.head_init_scale)
    if args.head_init_bias is not None:
        nn.init.constant_(classifier.bias, args.head_init_bias)


def build_task(
        args: argparse.Namespace,
        student: nn.Module,
        data_config: Dict[str, Any],
        device: torch.device,
        precision: Precision,
        loaders: DataLoaders,
) -> DistillTask:
    """Create the task, with EMA, from the student and the distillation flags."""
    dataset = loaders.train.dataset
    indexed = isinstance(dataset, IndexedDataset)
    if args.rank == 0:
        parameters = sum(p.numel() for p in student.parameters())
        _logger.info(f'Student {safe_model_name(args.model)}: {parameters:,} parameters.')
    task = create_distill_task(
        student,
        args.teacher,
        kd=args.kd,
        kd_weight=args.kd_weight,
        kd_kwargs=args.kd_kwargs,
        kd_schedule=args.kd_schedule,
        kd_tap=args.kd_tap,
        criterion=create_train_loss(args, device, args.num_classes),
        task_loss_weight=args.task_loss_weight,
        distill_loss_weight=args.distill_loss_weight,
        num_epochs=count_epochs(args),
        num_samples=len(dataset) if indexed else None,
        sample_labels=read_labels(dataset) if indexed else None,
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        teacher_checkpoint=args.teacher_checkpoint,
        teacher_pretrained=args.teacher_pretrained,
        teacher_kwargs=args.teacher_kwargs,
        teacher_dtype=resolve_dtype(args.teacher_dtype),
        teacher_stream=args.teacher_stream,
        teacher_device=torch.device('cpu') if args.teacher_fsdp else None,
        device=device,
        dtype=precision.model_dtype,
        verbose=args.rank == 0,
    )
    check_task(args, task)
    if args.channels_last:
        task.to(memory_format=torch.channels_last)
    if args.teacher_fsdp and task.teacher is not None:
        task.teacher.shard(device)
    if args.distributed and args.sync_bn:
        args.dist_bn = ''  # synchronised statistics need no distribution after the epoch
        task.trainable_module = convert_sync_batchnorm(task.trainable_module)
    return task


def check_task(args: argparse.Namespace, task: DistillTask) -> None:
    """Reject methods that cannot read what these flags give them."""
    on_logits = [name for name, method in task.module.methods.items() if 'logits' in method.teacher_outputs]
    if on_logits and args.task == 'multilabel':
        raise UsageError(f'--kd {"+".join(on_logits)} compares logits as distributions over classes, of which a '
                         'multi-label model has none: use a method that reads features alone (--list-kd)')
    if task.teacher is None:
        return
    for size in args.train_img_sizes or ():
        try:
            task.teacher_features(random_images(task.teacher, (task.input_size[0], size, size)))
        except CANNOT_RUN as e:
            raise UsageError(f"The teacher '{args.teacher}' cannot run at {size}x{size}, one of --train-img-sizes: "
                             f'{" ".join(str(e).split())[:200]}. --teacher-kwargs dynamic_img_size=True lets many '
                             'models take any size.') from e


def validate(run: Run, model: nn.Module, log_name: str = 'Test') -> 'OrderedDict[str, float]':
    """Evaluate a model on the validation data."""
    return evaluate(
        model,
        run.loaders.eval,
        device=run.device,
        model_dtype=run.precision.model_dtype,
        amp_autocast=run.precision.autocast,
        channels_last=run.args.channels_last,
        prefetcher=not run.args.no_prefetcher,
        distributed=run.args.distributed,
        tta=run.args.tta,
        create_evaluator=evaluator_class(run.args.task, run.args.multilabel_threshold),
        log_interval=run.args.log_interval,
        log_name=log_name,
        progress=PROGRESS[run.args.log_style],
    )


def count_samples(loader: Any) -> Optional[int]:
    """Return the images of a loader's set, over all ranks; None where that is unknown."""
    return len(loader.dataset) if hasattr(loader.dataset, '__len__') else None


def has_single_predictions(args: argparse.Namespace) -> bool:
    """Whether a model's output is one prediction per image: views are averaged after it, labels may be several."""
    return not args.tta and args.task == 'classification' and not args.naflex_loader


class _TeacherLogits(nn.Module):
    def __init__(self, teacher: Teacher):
        super().__init__()
        self.teacher = teacher

    def forward(self, images: torch.Tensor) -> Optional[torch.Tensor]:
        return self.teacher(images).logits


def report_teacher(run: Run) -> None:
    """Print the teacher's accuracy first, so that nobody distils from a broken one."""
    args, teacher = run.args, run.task.teacher
    if teacher is None or run.loaders.eval is None or args.teacher_eval is False:
        return
    if teacher.num_classes != args.num_classes:
        _logger.warning(f'The teacher has {teacher.num_classes} classes and the data {args.num_classes}: '
                        'its accuracy cannot be measured here.')
        return
    recorder = PredictionRecorder(_TeacherLogits(teacher))
    metrics = validate(run, recorder, 'Teacher')
    if has_single_predictions(args):
        run.teacher_predictions = recorder.read(count_samples(run.loaders.eval))
    if args.rank == 0:
        top1 = metrics.get('top1', 100.)
        accuracy = f'top-1: {top1:.3f}' if 'top1' in metrics else f"mAP: {metrics['map']:.3f}"
        _logger.info(f'Teacher {args.teacher} {accuracy}')
        if top1 < 200 / teacher.num_classes:
            _logger.warning(f'That is near chance ({100 / teacher.num_classes:.3f}): are its weights right, and is the '
                            'order of its classes that of the data?')


def prepare_class_means(run: Run) -> None:
    """Give the methods that need them the teacher's class means: from a file, from the cache, or from a pass."""
    args, task, shape = run.args, run.task, run.task.class_means_shape
    if shape is None:
        if args.nd_class_means:
            _logger.warning(f'--nd-class-means {args.nd_class_means} is ignored: no method of --kd reads class means.')
        return
    if args.nd_class_means:
        task.set_class_means(load_class_means(args.nd_class_means, shape))
        return
    assert task.teacher is not None
    training = args.nd_class_means_transform == 'train'
    loader = create_pass_loader(args, run.data_config, run.loaders.train.dataset, run.device, training,
                                model_dtype=run.precision.model_dtype, distributed=args.distributed)
    transform = [sorted(run.data_config.items()), loader.dataset.transform, *([args.seed] if training else [])]
    key = class_means_key(task.teacher, loader.dataset, transform) if args.rank == 0 else ''
    folder = os.path.join(args.output or './output/train', 'class_means')
    task.set_class_means(cached_class_means(
        os.path.join(folder, f'{safe_model_name(args.teacher)}-{key}.safetensors'),
        shape,
        partial(compute_class_means, task.teacher, loader, shape[0], run.device, run.precision.model_dtype,
                run.precision.autocast, args.distributed),
        metadata={'teacher': args.teacher, 'transform': args.nd_class_means_transform},
        device=run.device,
        distributed=args.distributed,
    ))


def build_optimizer(args: argparse.Namespace, task: DistillTask, batch_size: float) -> torch.optim.Optimizer:
    """Create the optimizer over everything that trains: student, adapter and methods."""
    if not args.lr:
        args.lr = scale_learning_rate(args, batch_size)
    return create_optimizer_v2(task.trainable_module, **optimizer_kwargs(cfg=args), **args.opt_kwargs)


def scale_learning_rate(args: argparse.Namespace, batch_size: float) -> float:
    """Compute the learning rate from `--lr-base` and the global batch size, as timm does."""
    global_batch_size = batch_size * args.world_size * args.grad_accum_steps
    ratio = global_batch_size / args.lr_base_size
    if not args.lr_base_scale:
        adaptive = any(name in args.opt.lower() for name in ('ada', 'lamb'))
        args.lr_base_scale = 'sqrt' if adaptive else 'linear'
    lr = args.lr_base * (ratio ** 0.5 if args.lr_base_scale == 'sqrt' else ratio)
    if args.rank == 0:
        _logger.info(f'Learning rate {lr:g}: --lr-base {args.lr_base} scaled ({args.lr_base_scale}) from a batch of '
                     f'{args.lr_base_size} to {global_batch_size:g}.')
    return lr


def build_scheduler(
        args: argparse.Namespace,
        optimizer: torch.optim.Optimizer,
        loaders: DataLoaders,
) -> Tuple[Any, int]:
    """Create the learning rate schedule; returns it and the number of epochs."""
    decreasing = loaders.eval is None or args.eval_metric == 'loss'
    try:
        scheduler, num_epochs = create_scheduler_v2(
            optimizer,
            **scheduler_kwargs(args, decreasing_metric=decreasing),
            updates_per_epoch=-(-len(loaders.train) // args.grad_accum_steps),
        )
    except ValueError as e:  # lengths that do not fit into one another
        raise UsageError(f'--sched {args.sched}: {e}') from e
    if args.rank == 0:
        _logger.info(f'Scheduled epochs: {num_epochs}.')
    return scheduler, num_epochs


def count_epochs(args: argparse.Namespace) -> int:
    """Return the length of the run, as timm's schedule extends `--epochs` by warmup prefix and cooldown."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.)  # the schedule wants one, its length does not depend on it
    kwargs = scheduler_kwargs(args)
    return create_scheduler_v2(optimizer, **{**kwargs, 'step_on_epochs': True})[1]


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
    if run.args.torchcompile and run.args.log_grad_norm:
        allow_retained_graphs()
    if run.args.torchcompile:
        run.task.compile(backend=run.args.torchcompile, mode=run.args.torchcompile_mode)
    if run.args.distributed:
        run.task.prepare_distributed(device_ids=[run.device], broadcast_buffers=not run.args.no_ddp_bb)


def run_epoch(run: Run, epoch: int, recorder: Recorder, position: Optional[Dict[str, Any]] = None) -> None:
    """Train, validate, step the schedule and save once."""
    args = run.args
    set_loader_epoch(run.loaders.train, epoch)
    if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
        disable_mixup(run.loaders)
    recorder.begin_epoch(position)
    last_update = -(-len(run.loaders.train) // args.grad_accum_steps) - 1
    train_metrics = train_one_epoch(
        run.task,
        run.loaders.train,
        run.optimizer,
        epoch=epoch,
        num_epochs=run.num_epochs,
        device=run.device,
        model_dtype=run.precision.model_dtype,
        amp_autocast=run.precision.autocast,
        loss_scaler=run.precision.loss_scaler,
        clip_grad=args.clip_grad,
        clip_mode=args.clip_mode,
        grad_accum_steps=args.grad_accum_steps,
        mixup_fn=run.loaders.mixup_fn,
        prefetcher=not args.no_prefetcher,
        channels_last=args.channels_last,
        lr_scheduler=run.scheduler,
        max_streak=None if args.on_nan == 'skip' else MAX_BAD_UPDATES,
        on_diverged=recorder.roll_back if args.on_nan == 'rollback' else None,
        after_update=lambda i, get_position: recorder.after_update(epoch, i == last_update, i, get_position),
        position=position,
        log_interval=args.log_interval,
        progress=PROGRESS[args.log_style],
        log_grad_norm=args.log_grad_norm,
        distributed=args.distributed,
        timing=run.timing,
        batch_scale=run.loaders.batch_scale,
        on_update=create_update_hook(args, run.device, recorder.result.output_dir),
    )
    share_batch_norm(args, run.task.get_trainable_module())
    metric = None
    validating = (epoch + 1) % args.val_interval == 0 or epoch + 1 in (run.last_epoch, *args.save_epochs)
    if validating:
        eval_metrics = validate_student(run)
        metric = recorder.rank(train_metrics, eval_metrics)
        recorder.summarize(epoch, train_metrics, eval_metrics)
    if run.scheduler is not None:
        run.scheduler.step(epoch + 1, metric)  # before saving, so that a resumed schedule knows this epoch
    recorder.save(epoch, metric)


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
            torchvision.utils.save_image(images, path, padding=0, normalize=True)

    return after_update


def disable_mixup(loaders: DataLoaders) -> None:
    if loaders.mixup_fn is not None:
        loaders.mixup_fn.mixup_enabled = False  # type: ignore[attr-defined]
    elif hasattr(loaders.train, 'mixup_enabled') and loaders.train.mixup_enabled:
        loaders.train.mixup_enabled = False


def share_batch_norm(args: argparse.Namespace, module: Optional[nn.Module]) -> None:
    """Give all ranks the same running statistics after an epoch, by `--dist-bn`."""
    if module is not None and args.distributed and args.dist_bn in ('broadcast', 'reduce'):
        utils.distribute_bn(module, args.world_size, args.dist_bn == 'reduce')


def validate_student(run: Run) -> Optional['OrderedDict[str, float]']:
    """Validate the merged student and its EMA; the EMA's numbers count where there are any, as in timm."""
    if run.loaders.eval is None:
        return None
    metrics = validate_with_agreement(run, run.task.get_eval_model())  # type: ignore[arg-type]
    if run.task.has_ema() and not run.args.model_ema_force_cpu:
        share_batch_norm(run.args, run.task.get_trainable_module(ema=True))
        student_top1 = metrics['top1']
        metrics = validate_with_agreement(run, run.task.get_eval_model(ema=True), 'Test (EMA)')  # type: ignore[arg-type]
        metrics['student_top1'] = student_top1
    return metrics


def validate_with_agreement(run: Run, model: nn.Module, log_name: str = 'Test') -> 'OrderedDict[str, float]':
    """Validate a model, and measure how often it predicts what the teacher does, where that is known."""
    if run.teacher_predictions is None:
        return validate(run, model, log_name)
    recorder = PredictionRecorder(model)
    metrics = validate(run, recorder, log_name)
    classes, _ = recorder.read(count_samples(run.loaders.eval))
    metrics['agreement'] = agreement(classes, run.teacher_predictions[0])
    return metrics


def write_run_report(run: Run, recorder: Recorder) -> None:
    """Write `report.html` and `report.png` of the best student beside the checkpoints."""
    args = run.args
    if not args.report or not can_draw():
        if args.report and args.rank == 0:
            _logger.info("No report: pip install 'timm_distill[report]' draws one, --no-report leaves it out.")
        return
    student = teacher = None
    if run.loaders.eval is not None and has_single_predictions(args):
        num_samples = count_samples(run.loaders.eval)
        student = collect_predictions(
            best_student(run, recorder), run.loaders.eval, run.device, run.precision.autocast,
            run.precision.model_dtype, num_samples)
        if run.teacher_predictions is not None:
            teacher = Predictions(*run.teacher_predictions, student.labels)
    if recorder.saver is None:
        return
    data = ReportData(
        title=f'{args.model} distilled from {args.teacher}' if run.task.teacher is not None else str(args.model),
        rows=read_summary(recorder.summary_path) if os.path.exists(recorder.summary_path) else [],
        student=student,
        teacher=teacher,
        class_names=class_names(run.loaders.eval.dataset, args.num_classes) if run.loaders.eval is not None else (),
        times=split_step_time(run),
        facts=describe_run(run, timm_distill.__version__)['provenance'],
    )
    try:
        paths = write_report(data, recorder.result.output_dir)
    except Exception as e:  # a figure must not cost a finished run
        _logger.warning(f'The report could not be written: {type(e).__name__}: {e}')
        return
    _logger.info(f'Report: {paths[0]}')


def best_student(run: Run, recorder: Recorder) -> nn.Module:
    """Return the best student, the same on every rank."""
    model = run.task.module.merged_copy()
    path = recorder.best_path
    if path:
        checkpoint = read_checkpoint(path)
        model.load_state_dict(checkpoint.get('state_dict_ema', checkpoint['state_dict']))
    if run.args.distributed:
        for tensor in model.state_dict().values():
            torch.distributed.broadcast(tensor, src=0)
    return model


def split_step_time(run: Run) -> Dict[str, float]:
    """Return the seconds of a training step by part: the teacher's share is measured on a batch of noise."""
    if not run.timing.batches:
        return {}
    data = run.timing.data_seconds / run.timing.batches
    total = run.timing.seconds / run.timing.batches
    if run.task.teacher is None:
        return {'student': max(total - data, 0.), 'data': data}
    if run.task.teacher.is_sharded:  # which all processes would have to run
        return {'student': max(total - data, 0.), 'data': data}
    teacher = time_teacher(run.task, run.args.batch_size, run.precision.autocast)
    return {'teacher': teacher, 'student': max(total - data - teacher, 0.), 'data': data}


def cli() -> int:
    """Run from the command line: 0 on success, 2 for what the user can put right, 1 where training fails.

    A run that a signal stopped has saved its state and exits with 75, after Ctrl-C with 130.
    """
    utils.setup_default_logging()
    try:
        result = main()
    except UsageError as e:
        print(f'train_distill.py: error: {user_message(e)}', file=sys.stderr)
        return 2
    except (NonFiniteLossError, MergeError) as e:
        print(f'train_distill.py: stopped: {e}', file=sys.stderr)
        return 1
    if result is not None and result.stopped_by:
        return exit_code(result.stopped_by)
    if result is not None and result.output_dir:
        print(f'--result\n{json.dumps(result.history[-10:], indent=4)}')  # what timm's runner scripts look for
    return 0


if __name__ == '__main__':
    sys.exit(cli())
