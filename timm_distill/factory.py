"""Builds a distillation task from two names: student, tap and adapter, teacher, methods."""
import logging
import math
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Tuple, Union

import timm
import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .adapters import Adapter, create_adapter
from .errors import UsageError
from .features.inputs import count_flops, evaluation_mode, random_images, runnable_size
from .features.reader import FeatureReader
from .features.spec import FeatureSpec, PairSpec, Stage
from .features.stages import count_classes
from .methods import DistillMethod
from .methods._composition import Composition, create_composition
from .methods._schedules import ScheduleSpec
from .student.adapted import AdaptedStudent
from .student.tap import StudentTap
from .student.tap_search import resolve_student_tap
from .task import DistillTask
from .teacher.teacher import Teacher, create_teacher

_logger = logging.getLogger(__name__)

_UNEXPECTED = 1.5  # how far apart two sizes are, as the ratio of their sides, before somebody should be told


def create_distill_task(
        student: Union[str, nn.Module],
        teacher: Union[str, nn.Module, Teacher, None] = None,
        kd: str = 'norm',
        kd_weight: Optional[Mapping[str, float]] = None,
        kd_kwargs: Optional[Mapping[str, Any]] = None,
        kd_schedule: Optional[Mapping[str, ScheduleSpec]] = None,
        kd_tap: str = 'auto',
        criterion: Optional[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = None,
        task_loss_weight: Optional[float] = None,
        distill_loss_weight: Optional[float] = None,
        num_classes: Optional[int] = None,
        num_epochs: Optional[int] = None,
        num_samples: Optional[int] = None,
        sample_labels: Optional[torch.Tensor] = None,
        input_size: Optional[Sequence[int]] = None,
        class_means: Optional[torch.Tensor] = None,
        mean: Optional[Sequence[float]] = None,
        std: Optional[Sequence[float]] = None,
        student_kwargs: Optional[Dict[str, Any]] = None,
        student_pretrained: Optional[bool] = None,
        teacher_checkpoint: Optional[str] = None,
        teacher_pretrained: bool = True,
        teacher_kwargs: Optional[Dict[str, Any]] = None,
        teacher_weights: Optional[str] = None,
        teacher_mean: Optional[Sequence[float]] = None,
        teacher_std: Optional[Sequence[float]] = None,
        teacher_img_size: Optional[int] = None,
        teacher_dtype: Optional[torch.dtype] = None,
        teacher_device: Optional[torch.device] = None,
        device: Union[str, torch.device, None] = None,
        dtype: Optional[torch.dtype] = None,
        verbose: bool = True,
) -> DistillTask:
    """Build a distillation task from two timm names or modules.

    Args:
        student: timm architecture or module to train.
        teacher: timm architecture, `hf-hub:REPO`, `local-dir:FOLDER` or module; None with `kd='none'`.
        kd: 'none' or names of methods and presets joined by '+', e.g. 'norm+kd'.
        kd_weight: Weight of each method's terms; a preset's by default, else the method's published one.
        kd_kwargs: Options of the methods, `{'norm.segments': 8}` or `{'norm': {'segments': 8}}`.
        kd_schedule: Schedule of each method's weight over epochs, e.g. `{'norm': 'imagenet', 'nd': 'warmup:5'}`.
        kd_tap: Where an adapter sits: 'auto', 'features', 'pre_logits', or 'side' (read the last stage for the loss
            alone).
        criterion: Task loss of (logits, target); cross-entropy by default.
        task_loss_weight: Weight of the task loss; a preset's by default, else 1.
        distill_loss_weight: Factor on all methods' weights, 1 by default.
        num_classes: Class count of a student that is built by name.
        num_epochs: Length of the run, for schedules that span it.
        num_samples: Images of the training set, for methods that keep something of each; as many as `sample_labels`
            by default.
        sample_labels: Label of every image of the training set by index, [N], for methods that choose among them.
        input_size: (channels, height, width) that the student is fed; its own default otherwise.
        class_means: The teacher's mean pre-logits of every class, [K, D], for methods that need them; may be given to
            `task.set_class_means` later.
        mean: Normalisation of the input, per channel; the student's default otherwise.
        std: Likewise.
        student_kwargs: More arguments of `timm.create_model` for the student.
        student_pretrained: Build a student that is named with timm's pretrained weights. Of a module it says that it
            comes with weights, which nothing else tells: an adapter then starts without changing its logits.
        teacher_checkpoint: Weights of a teacher that is built by name.
        teacher_pretrained: Load timm's pretrained weights for it otherwise.
        teacher_kwargs: More arguments of `timm.create_model` for the teacher.
        teacher_weights: 'raw' or 'ema' of a training checkpoint; None takes the averaged ones where there are any.
        teacher_mean: The teacher's own normalisation, where it is not the one that its weights say; so for a teacher
            that is built by name, as the next two.
        teacher_std: Likewise.
        teacher_img_size: Height and width that the teacher is fed, likewise.
        teacher_dtype: Precision that the teacher computes in; that of the run, autocast included, by default.
        teacher_device: Where the teacher is built, `device` by default; the CPU for one that `Teacher.shard` moves.
        device: Device of everything.
        dtype: Dtype of everything.
        verbose: Log what was built.

    Raises:
        UsageError: If a name, an option or a combination is not possible; says what is.
    """
    device = torch.device(device or 'cpu')
    if isinstance(student, str) and student_pretrained is not None:
        student_kwargs = {'pretrained': student_pretrained, **(student_kwargs or {})}
    model = _create_student(student, num_classes, student_kwargs).to(device=device, dtype=dtype)
    config = getattr(model, 'pretrained_cfg', None) or {}
    input_size = tuple(input_size or config.get('input_size', (3, 224, 224)))
    composition = create_composition(
        kd, kd_weight, kd_kwargs, kd_schedule, task_loss_weight, distill_loss_weight, num_epochs)
    methods = composition.methods
    teacher_model = None
    if methods:
        teacher_model = _resolve_teacher(
            teacher, input_size, int(getattr(model, 'num_classes', 0)),
            mean or config.get('mean', IMAGENET_DEFAULT_MEAN), std or config.get('std', IMAGENET_DEFAULT_STD),
            checkpoint=teacher_checkpoint, pretrained=teacher_pretrained, model_kwargs=teacher_kwargs, verbose=verbose,
            source=dict(weights=teacher_weights, mean=teacher_mean, std=teacher_std, img_size=teacher_img_size),
            device=teacher_device or device, dtype=teacher_dtype or dtype, autocast=teacher_dtype is None)
        _check_class_counts(model, teacher_model, methods, input_size)
    module = _adapt_student(model, teacher_model, methods, input_size, kd_tap, verbose)
    _start_adapters(module, student, student_kwargs, student_pretrained, verbose)
    if teacher_model is not None:
        if verbose:
            _report_teacher_input(teacher_model, module, input_size)
        _build_methods(module, teacher_model, num_samples, sample_labels)
    if verbose and methods:
        _log_composition(kd, composition)
    criterion = criterion if criterion is not None else nn.CrossEntropyLoss()
    task = DistillTask(
        module.to(device=device, dtype=dtype), teacher_model, criterion, composition.weights,
        composition.task_loss_weight, input_size, composition.schedules, device, dtype, verbose)
    if class_means is not None:
        task.set_class_means(class_means)
    return task


def _create_student(student: Union[str, nn.Module], num_classes: Optional[int], kwargs: Optional[Dict]) -> nn.Module:
    if isinstance(student, nn.Module):
        return student
    if not timm.is_model(student):
        raise UsageError(f"Unknown student '{student}'. --student takes a timm architecture (timm.list_models()).")
    return timm.create_model(student, num_classes=num_classes, **(kwargs or {}))


def _resolve_teacher(
        teacher: Union[str, nn.Module, Teacher, None],
        input_size: Sequence[int],
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        checkpoint: Optional[str],
        pretrained: bool,
        model_kwargs: Optional[Dict[str, Any]],
        verbose: bool,
        source: Mapping[str, Any],
        **kwargs: Any,
) -> Teacher:
    if teacher is None:
        raise UsageError('Distillation needs a teacher: give --teacher NAME, or --kd none.')
    if isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, nn.Module):
        return Teacher(teacher, input_size, mean, std, **kwargs)
    return create_teacher(
        teacher, input_size, num_classes, checkpoint, pretrained, model_kwargs, mean, std,
        verbose=verbose, **source, **kwargs)


def _check_class_counts(
        student: nn.Module,
        teacher: Teacher,
        methods: Mapping[str, DistillMethod],
        input_size: Sequence[int],
) -> None:
    on_logits = [name for name, method in methods.items() if method.needs_equal_classes()]
    if not on_logits:
        return
    size, reason = runnable_size(student, input_size)
    if reason:
        return  # said where the student is adapted
    student_classes = count_classes(student, (input_size[0], *(size or input_size[1:])))
    if teacher.num_classes != student_classes:
        raise UsageError(
            f'--kd {"+".join(on_logits)} compares logits, but the teacher has {_describe_classes(teacher.num_classes)} '
            f'and the student {_describe_classes(student_classes)}. Give a teacher trained on these classes with '
            '--teacher-checkpoint, change --num-classes, or use a method that reads features alone (--list-kd).')


def _describe_classes(count: int) -> str:
    return f'{count} classes' if count else 'no classifier'


def _student_size(student: nn.Module, input_size: Sequence[int]) -> Optional[Tuple[int, int]]:
    """Return the size that the student's input has to be resized to, None where it runs as it comes."""
    size, reason = runnable_size(student, input_size)
    if reason:
        raise UsageError(
            f'The student {type(student).__name__} cannot run on the input {list(input_size)}: {reason}. '
            'Change --img-size, --in-chans or --model-kwargs img_size=N.')
    if size is not None:
        _logger.warning(
            f'The student takes {size[0]}x{size[1]} alone: its input of {input_size[1]}x{input_size[2]} is '
            'resized. --model-kwargs img_size=N builds some models for other sizes.')
    return size


def _adapt_student(
        student: nn.Module,
        teacher: Optional[Teacher],
        methods: Mapping[str, DistillMethod],
        input_size: Sequence[int],
        kd_tap: str,
        verbose: bool,
) -> AdaptedStudent:
    resize_to = _student_size(student, input_size)
    own_input = (input_size[0], *(resize_to or input_size[1:]))
    adapting = {name: method for name, method in methods.items() if method.adapter}
    if len(adapting) > 1:
        raise UsageError(f"--kd {'+'.join(adapting)}: only one of these can put an adapter on the student's path.")
    outputs = frozenset({'logits'}).union(*(method.student_outputs for method in methods.values()))
    if not adapting or teacher is None:
        if kd_tap != 'auto':
            _logger.warning(f'--kd-tap {kd_tap} is ignored: no method of --kd uses an adapter.')
        reader = FeatureReader(student, own_input, outputs)
        return AdaptedStudent(student, methods=methods, resize_to=resize_to, reader=reader)
    (method,) = adapting.values()
    tap = resolve_student_tap(student, own_input, kd_tap)
    reader = FeatureReader(student, own_input, outputs, whole=bool(tap.inside) and not outputs & {'feature', 'stages'})
    adapters = [
        create_adapter(
            str(method.adapter),
            site.layout.channels,
            teacher.tap_channels(tap.point),
            offset=site.offset,
            side=tap.point == 'side',
            **method.adapter_options,
        ) for site in tap.sites
    ]
    if verbose:
        _log_adapters(tap, adapters)
    return AdaptedStudent(student, adapters, tap, methods, resize_to, reader)


def _start_adapters(
        module: AdaptedStudent,
        student: Union[str, nn.Module],
        student_kwargs: Optional[Mapping[str, Any]],
        pretrained: Optional[bool],
        verbose: bool,
) -> None:
    """Let the adapters of a student that comes with weights leave it as it is."""
    if isinstance(student, str):
        pretrained = any((student_kwargs or {}).get(name) for name in ('pretrained', 'checkpoint_path'))
    elif pretrained is None and module.adapters and verbose:
        _logger.info(
            'The adapter starts as for a student without weights: student_pretrained=True says that a module '
            'comes with some.')
    if pretrained:
        for adapter in module.adapters:
            adapter.start_pretrained()


def _log_adapters(tap: StudentTap, adapters: Sequence[Adapter]) -> None:
    parameters = sum(p.numel() for adapter in adapters for p in adapter.parameters())
    sizes = ', '.join(f'{a.student_channels} -> {a.teacher_channels}' for a in adapters)
    fate = 'dropped' if tap.point == 'side' else 'merged away'
    _logger.info(f'Student tap: {tap}.')
    _logger.info(f'Adapter: {sizes} channels, {parameters:,} parameters that are {fate} at every save.')


def _log_composition(kd: str, composition: Composition) -> None:
    weights = ', '.join(f'{name}_weight={weight:g}' for name, weight in composition.weights.items())
    _logger.info(f'Distillation: kd={kd}, task_loss_weight={composition.task_loss_weight:g}, {weights}')


def _report_teacher_input(teacher: Teacher, module: AdaptedStudent, input_size: Sequence[int]) -> None:
    """Say what the teacher is fed and where that was taken from, and warn of a size that nobody may have meant."""
    fed, said = teacher.preprocessing.input_size[1:], teacher.trained_size
    _logger.info(f'Teacher input: {teacher.preprocessing}.')
    if teacher.preprocessing.sources['input_size'] == '--teacher-img-size':
        return
    if said is not None and not 1 / _UNEXPECTED < math.sqrt(math.prod(fed) / math.prod(said)) < _UNEXPECTED:
        _logger.warning(
            f'The teacher was trained on {said[0]}x{said[1]} images and is fed {fed[0]}x{fed[1]}: its features may be '
            f'far from those it learnt. --teacher-img-size {said[0]} resizes its images.')
    if math.sqrt(math.prod(fed) / math.prod(input_size[1:])) > _UNEXPECTED:
        share = _teacher_share(teacher, module, input_size)
        _logger.warning(
            f'The teacher is fed {fed[0]}x{fed[1]}, the student {input_size[1]}x{input_size[2]}: the teacher takes '
            f"{100 * share:.0f} % of a step's operations. --teacher-img-size N feeds it another size.")


def _teacher_share(teacher: Teacher, module: AdaptedStudent, input_size: Sequence[int]) -> float:
    """Return the teacher's part of a step's multiply-adds; those of a backward pass are twice the forward pass's."""
    images = random_images(module, input_size, batch_size=1)
    with evaluation_mode(module):
        teacher_flops, student_flops = (count_flops(model, images) for model in (teacher, module))
    return teacher_flops / max(teacher_flops + 3 * student_flops, 1)


def _build_methods(
        module: AdaptedStudent,
        teacher: Teacher,
        num_samples: Optional[int],
        sample_labels: Optional[torch.Tensor],
) -> None:
    """Let the methods create what they train, where they read more than logits."""
    student = module.reader.spec
    if student is None:
        return
    if num_samples is None and sample_labels is not None:
        num_samples = len(sample_labels)
    pair = PairSpec(student, _teacher_spec(teacher), num_samples, sample_labels)
    for method in module.methods.values():
        method.build(pair)


def _teacher_spec(teacher: Teacher) -> FeatureSpec:
    """Measure a teacher's features on the input that it is really fed, which may be another than the student's."""
    parameter = next(teacher.parameters())
    images = random_images(teacher, teacher.input_size).to(parameter.device, parameter.dtype)
    features = teacher(images, frozenset({'logits', 'feature', 'pre_logits'}))
    assert features.feature is not None and features.pre_logits is not None
    shape: Tuple[int, int, int] = tuple(features.feature.shape[1:])
    return FeatureSpec(
        num_classes=teacher.num_classes,
        feature=shape,
        pre_logits=features.pre_logits.shape[1],
        stages=teacher.stages or (Stage(-1, shape),),
        input_size=teacher.input_size,
        head=teacher.head_input.output if teacher.head_input is not None else '',
        non_negative=frozenset(
            name for name, x in (('feature', features.feature), ('pre_logits', features.pre_logits))
            if not (x < 0).any()),
    )
