"""Build phases of a run: all that can fail before anything is written."""
import argparse
import logging
import math
from dataclasses import fields
from typing import Any, Dict, List, Sequence, Tuple

import torch
import torch.nn as nn
from timm import utils
from timm.data import resolve_data_config
from timm.layers import convert_sync_batchnorm, set_fast_norm
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import PlateauLRScheduler, create_scheduler_v2, scheduler_kwargs

from ..args.per_teacher import kwargs_by_teacher, model_of, teacher_argument, teachers_of
from ..data import DataLoaders, IndexedDataset, create_loaders, create_train_loss, known_names, read_labels
from ..data.views import ViewDataset
from ..engine.dot import create_dot
from ..errors import UsageError, flags_in_messages
from ..factory import DataSpec, create_distill_task
from ..features.inputs import CANNOT_RUN, find_patch_size, random_images
from ..methods import Recipe
from ..methods._composition import methods_of
from ..task import DistillTask
from ..teacher.several import live_teachers
from ..teacher.targets import teacher_outputs
from ..utils._compat import get_learning_rates
from ..utils.distributed import share_weights
from ..utils.settings import settle
from ..utils.text import model_file_name
from .cache_teacher import resolve_teacher
from .cached import attach_targets, count_views
from .device import (
    Precision,
    enable_fast_math,
    import_device_modules,
    resolve_device_name,
    resolve_dtype,
    resolve_precision,
)
from .labels import settle_labels
from .models import build_student, check_train_sizes, comes_with_weights, fit_input_size
from .probing import Probes
from .state import Run
from .unchanged import check_equal_data
from .validation import ranking_metric

_logger = logging.getLogger(__name__)


def build_run(args: argparse.Namespace) -> Run:
    """Build everything that can fail before anything is written."""
    device, precision = setup_device(args)
    utils.random_seed(args.seed, args.rank)
    settle_labels(args, recipe_of(args))
    student = build_student(args)
    data_config = resolve_data_config(vars(args), model=student, verbose=args.rank == 0)
    data_config = fit_input_size(args, student, data_config)
    with_indices = any(method.needs_indices for method in methods_of(args.kd).values())
    if with_indices and args.task == 'multilabel':
        raise UsageError(f'--kd {args.kd} reads one label per image: it does not go with --task multilabel')
    check_train_sizes(args, student, data_config)
    patch_size = find_patch_size(student) if args.naflex_loader else None
    loaders = create_loaders(
        args, data_config, args.num_classes, device, precision.model_dtype, args.distributed, with_indices, patch_size,
        num_views=count_views(args))
    check_equal_data(args, loaders.fingerprints)
    task = build_task(args, student, data_config, device, precision, loaders)
    optimizer = build_optimizer(args, task, loaders.batch_size)
    scheduler, num_epochs = build_scheduler(args, optimizer, loaders, task)
    run = Run(args, device, precision, data_config, loaders, task, optimizer, scheduler, num_epochs)
    run.probes = Probes(args, data_config, loaders, run.compute, task)
    return run


def setup_device(args: argparse.Namespace) -> Tuple[torch.device, Precision]:
    """Choose device and precision, and join the process group."""
    import_device_modules(args.device_modules or ())
    settle(args, device=resolve_device_name(args.device))
    enable_fast_math()
    device = utils.init_distributed_device(args)
    if args.sync_bn and args.distributed and device.type == 'cpu':
        raise UsageError(
            '--sync-bn needs GPUs, torch synchronises no batch norm on the CPU: leave it out (--dist-bn '
            'shares the statistics after every epoch)')
    if args.fuser:
        utils.set_jit_fuser(args.fuser)
    if args.fast_norm:
        set_fast_norm()
    _logger.info(f'Process {args.rank} of {args.world_size} on {device}.')
    return device, resolve_precision(device, args.amp, args.amp_dtype, args.model_dtype)


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
    indexed = isinstance(dataset, (IndexedDataset, ViewDataset))
    kwargs = distill_kwargs(args, data_config, known_names(dataset, args.num_classes))
    if loaders.grid is not None:
        teacher = resolve_teacher(args, data_config, loaders, device, precision)
        others = {name: value for name, value in kwargs.items() if not name.startswith('teacher')}
        names = [name for name in teachers_of(args.teacher) if name]
        kwargs = {**others, 'teacher': {names[0]: teacher} if names else teacher}
    if args.rank == 0:
        parameters = sum(p.numel() for p in student.parameters())
        _logger.info(f'Student {model_file_name(args.model)}: {parameters:,} parameters.')
    with flags_in_messages():
        task = create_distill_task(
            student,
            **kwargs,
            criterion=None if args.no_labels else create_train_loss(args, device, args.num_classes),
            has_labels=not args.no_labels,
            num_samples=len(dataset) if indexed else None,
            sample_labels=read_labels(dataset) if indexed and has_single_labels(args) else None,
            student_pretrained=comes_with_weights(args),
            teacher_device=torch.device('cpu') if args.teacher_fsdp else None,
            device=device,
            dtype=precision.model_dtype,
            verbose=args.rank == 0,
        )
        if loaders.grid is not None:
            attach_targets(args, task, data_config, loaders, precision)
    check_task(args, task)
    if args.channels_last:
        task.to(memory_format=torch.channels_last)
    if task.teacher is not None and args.distributed:
        share_weights(task.teacher, device)
    for teacher in live_teachers(task.teacher).values() if args.teacher_fsdp else ():
        teacher.shard(device)
    if args.distributed and args.sync_bn:
        settle(args, dist_bn='')  # synchronised statistics need no distribution after the epoch
        task.trainable_module = convert_sync_batchnorm(task.trainable_module)
    return task


def has_single_labels(args: argparse.Namespace) -> bool:
    """Whether each training image has one label."""
    return args.task != 'multilabel' and not args.no_labels


def distill_kwargs(
        args: argparse.Namespace,
        data_config: Dict[str, Any],
        class_names: Sequence[str] = (),
) -> Dict[str, Any]:
    """Map the distillation flags to arguments of `create_distill_task`, as timm's `optimizer_kwargs` does."""
    names = (
        'teacher_checkpoint', 'teacher_pretrained', 'teacher_weights', 'teacher_mean', 'teacher_std',
        'teacher_img_size', 'teacher_standardize')
    dtypes: Any = args.teacher_dtype
    if isinstance(dtypes, dict):
        dtypes = {name: resolve_dtype(dtype) for name, dtype in dtypes.items()}
    return dict(
        kd=recipe_of(args),
        data=DataSpec(
            data_config['input_size'], data_config['mean'], data_config['std'], class_names=class_names, fits=True),
        teacher=teacher_argument(args.teacher),
        teacher_kwargs=kwargs_by_teacher(args.teacher_kwargs, args.teacher),
        teacher_dtype=dtypes if isinstance(dtypes, dict) else resolve_dtype(dtypes),
        teacher_classes=args.teacher_classes or None,
        **{name: getattr(args, name) for name in names},
    )


def recipe_of(args: argparse.Namespace) -> Recipe:
    """Return the methods, with options and weights, as the flags say."""
    recipe = {field.name: getattr(args, field.name) for field in fields(Recipe) if field.name != 'num_epochs'}
    return Recipe(**recipe, num_epochs=count_epochs(args))


def check_task(args: argparse.Namespace, task: DistillTask) -> None:
    """Reject methods that cannot read what these flags give them."""
    on_logits = [name for name, method in task.module.methods.items() if 'logits' in method.teacher_outputs]
    if on_logits and args.task == 'multilabel':
        raise UsageError(
            f'--kd {"+".join(on_logits)} compares logits as distributions over classes, of which a '
            'multi-label model has none: use a method that reads features alone (--list-kd)')
    if task.teacher is None:
        return
    if not task.trains_classifier and args.num_classes and args.rank == 0:
        _logger.warning(
            f'--task-loss-weight 0 and no weighted method of --kd {args.kd} reads the logits: nothing '
            'trains the classifier, which is saved and released as it began. Its accuracy says nothing, '
            'so that model_best is chosen by the distillation loss, not by --eval-metric '
            f'{args.eval_metric}. --task-loss-weight 1 trains it; so does a method on logits, e.g. kd.')
    for name, teacher in live_teachers(task.teacher).items():
        for size in args.train_img_sizes or ():
            try:
                teacher(random_images(teacher, (task.input_size[0], size, size)), teacher_outputs(task.module, name))
            except CANNOT_RUN as e:
                raise UsageError(
                    f"The teacher '{model_of(args.teacher, name)}' cannot run at {size}x{size}, one of "
                    f'--train-img-sizes: {" ".join(str(e).split())[:200]}. --teacher-kwargs dynamic_img_size=True lets '
                    'many models take any size.') from e


def build_optimizer(args: argparse.Namespace, task: DistillTask, batch_size: float) -> torch.optim.Optimizer:
    """Create the optimizer over everything that trains: student, adapter and methods."""
    if not args.lr:
        settle(args, **scale_learning_rate(args, batch_size))
    try:
        optimizer = create_optimizer_v2(task.trainable_module, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    except Exception as e:  # every optimizer checks its arguments in its own way
        raise UsageError(
            f'--opt {args.opt} cannot be built with these --opt-kwargs, --opt-betas, --opt-eps, --lr and '
            f'--momentum: {type(e).__name__}: {" ".join(str(e).split())[:300]}') from e
    if args.kd_optimizer and task.module.methods:
        optimizer = create_dot(optimizer, args.dot_delta)
    if args.kd_lr_mult != 1.:
        scale_added_rates(optimizer, task, args.kd_lr_mult, scheduled=args.sched != 'none')
    return optimizer


def scale_added_rates(
        optimizer: torch.optim.Optimizer,
        task: DistillTask,
        factor: float,
        scheduled: bool = True,
) -> None:
    """Give what distillation adds to the student parameter groups with a learning rate of their own.

    Args:
        optimizer: Fresh; its groups are split.
        task: Its student, adapters and methods.
        factor: On the rate of their groups, times that of timm's layer decay.
        scheduled: A schedule of timm's follows, which applies a group's `lr_scale`.
    """
    student = {id(parameter) for parameter in task.module.student.parameters()}
    groups: List[Dict[str, Any]] = []
    for group in optimizer.param_groups:
        added = [parameter for parameter in group['params'] if id(parameter) not in student]
        kept = [parameter for parameter in group['params'] if id(parameter) in student]
        rate = {'lr_scale': factor * group.get('lr_scale', 1.)}
        if not scheduled:
            rate['lr'] = factor * group['lr']
        groups += [{**group, 'params': kept}] * bool(kept) + [{**group, **rate, 'params': added}] * bool(added)
    if all(len(old['params']) == len(new['params']) for old, new in zip(optimizer.param_groups, groups)):
        _logger.warning('--kd-lr-mult has no effect: --kd adds nothing to the student that trains.')
    optimizer.param_groups[:] = groups  # in place: optimizers that wrap others share the list


def scale_learning_rate(args: argparse.Namespace, batch_size: float) -> Dict[str, Any]:
    """Compute the learning rate from `--lr-base` and the global batch size, as timm does; return what flags it sets."""
    global_batch_size = batch_size * args.world_size * args.grad_accum_steps
    ratio = global_batch_size / args.lr_base_size
    adaptive = any(name in args.opt.lower() for name in ('ada', 'lamb'))
    scale = args.lr_base_scale or ('sqrt' if adaptive else 'linear')
    lr = args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)
    if args.rank == 0:
        _logger.info(
            f'Learning rate {lr:g}: --lr-base {args.lr_base} scaled ({scale}) from a batch of '
            f'{args.lr_base_size} to {global_batch_size:g}.')
    return dict(lr=lr, lr_base_scale=scale)


def build_scheduler(
        args: argparse.Namespace,
        optimizer: torch.optim.Optimizer,
        loaders: DataLoaders,
        task: DistillTask,
) -> Tuple[Any, int]:
    """Create the learning rate schedule; returns it and the number of epochs."""
    decreasing = ranking_metric(args, loaders, task) in ('loss', 'ranking_loss')
    try:
        scheduler, num_epochs = create_scheduler_v2(
            optimizer,
            **scheduler_kwargs(args, decreasing_metric=decreasing),
            updates_per_epoch=-(-len(loaders.train) // args.grad_accum_steps),
        )
    except ValueError as e:  # lengths that do not fit into one another
        raise UsageError(f'--sched {args.sched}: {e}') from e
    check_rates(args, scheduler, num_epochs, -(-len(loaders.train) // args.grad_accum_steps))
    if args.rank == 0:
        _logger.info(f'Scheduled epochs: {num_epochs}.')
    return scheduler, num_epochs


def check_rates(args: argparse.Namespace, scheduler: Any, num_epochs: int, updates_per_epoch: int) -> None:
    """Compute the learning rate of every epoch, of ten thousand where there are more, before any is trained.

    Raises:
        UsageError: If one is not finite, is negative or cannot be computed: it would be at that epoch otherwise.
    """
    if scheduler is None or isinstance(scheduler, PlateauLRScheduler):  # which knows none in advance
        return
    scale = updates_per_epoch if args.sched_on_updates else 1
    for epoch in [*range(0, num_epochs, max(1, num_epochs // 10_000)), num_epochs]:
        try:
            rates = get_learning_rates(scheduler, epoch * scale)
            problem = '' if all(0 <= rate < math.inf for rate in rates) else f'is {rates[0]}'
        except (ArithmeticError, TypeError, ValueError) as e:
            problem = f'cannot be computed ({type(e).__name__}: {e})'
        if problem:
            raise UsageError(
                f'--sched {args.sched}: the learning rate of epoch {epoch} of {num_epochs} {problem}: '
                'change --lr-cycle-mul, --lr-cycle-decay, --lr-k-decay, --decay-rate or --cooldown-epochs')


def count_epochs(args: argparse.Namespace) -> int:
    """Return the length of the run, as timm's schedule extends `--epochs` by warmup prefix and cooldown."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.)  # the schedule wants one, its length does not depend on it
    kwargs = scheduler_kwargs(args)
    return create_scheduler_v2(optimizer, **{**kwargs, 'step_on_epochs': True})[1]
