"""Factory of distillation tasks: student, tap and adapter, teacher and methods from two names."""
import logging
from dataclasses import dataclass, fields, replace
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .adapters import Adapter, create_adapter
from .errors import UsageError, arguments_in_messages
from .features.classifier import check_classifier
from .features.inputs import runnable_size
from .features.parts import complete
from .features.spec import PairSpec
from .methods import DistillMethod
from .methods._composition import Composition, Recipe, check_labels, create_composition
from .methods._scopes import split_scope
from .models.external import is_external
from .models.named import create_model
from .student.adapted import AdaptedStudent
from .student.inspection import inspect_student
from .student.tap import StudentTap
from .student.tap_search import resolve_student_tap
from .task import DistillTask
from .teacher.build import (
    TEACHER_OPTIONS,
    AnyTeacher,
    build_teachers,
    check_class_counts,
    name_teachers,
    report_teacher_input,
)
from .teacher.several import Teachers, ask_each, teachers_by_name
from .teacher.standardize import choose_standardized
from .teacher.targets import teacher_outputs
from .teacher.teacher import Teacher

_logger = logging.getLogger(__name__)

TeacherChoice = Union[str, nn.Module, Teacher, None]

@dataclass(frozen=True)
class DataSpec:
    """Data that a task is trained on; of the input the student's own defaults otherwise.

    Attributes:
        input_size: (channels, height, width) that the student is fed.
        mean: Normalisation of the input, per channel.
        std: Likewise.
        num_classes: Class count of a student that is built by name.
        num_samples: Images of the training set, for methods that keep something of each; as many as `sample_labels`
            by default.
        sample_labels: Label of every image of the training set by index, [N], for methods that choose among them.
        class_names: Name of every class in the order of the labels, '' for one without, by which a teacher's classes
            are found.
        fits: The student is known to run at `input_size`, which is not measured again.
        has_labels: Whether targets say what class an image is of; without there is no task loss.
    """
    input_size: Optional[Sequence[int]] = None
    mean: Optional[Sequence[float]] = None
    std: Optional[Sequence[float]] = None
    num_classes: Optional[int] = None
    num_samples: Optional[int] = None
    sample_labels: Optional[torch.Tensor] = None
    class_names: Sequence[str] = ()
    fits: bool = False
    has_labels: bool = True


@arguments_in_messages({
    'model': 'student', 'model-kwargs': 'student_kwargs', 'initial-checkpoint': 'student_kwargs',
    'img-size': 'input_size', 'in-chans': 'input_size', 'list-kd': 'list_methods()', 'labels': 'has_labels'})
def create_distill_task(
        student: Union[str, nn.Module],
        teacher: Union[TeacherChoice, Mapping[str, TeacherChoice]] = None,
        kd: Union[str, Recipe] = 'norm',
        data: DataSpec = DataSpec(),
        criterion: Optional[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = None,
        class_means: Union[torch.Tensor, Mapping[str, torch.Tensor], None] = None,
        student_kwargs: Optional[Dict[str, Any]] = None,
        student_pretrained: Optional[bool] = None,
        device: Union[str, torch.device, None] = None,
        dtype: Optional[torch.dtype] = None,
        verbose: bool = True,
        **options: Any,
) -> DistillTask:
    """Build a distillation task from two timm names or modules.

    Args:
        student: timm architecture or module to train.
        teacher: timm architecture, `hf-hub:REPO`, `local-dir:FOLDER` or module; None with `kd='none'`. Several have
            names, `{'dino': 'vit_small_patch16_dinov3', 'sup': 'resnet50'}`: a method then is one with each of them, or
            with the one that stands behind its @.
        kd: Methods and presets joined by '+', e.g. 'norm+kd', 'norm@dino+kd@sup', 'none', or a recipe.
        data: What it is trained on.
        criterion: Task loss of (logits, target); cross-entropy by default.
        class_means: The teacher's mean pre-logits of every class, [K, D], for methods that need them, of several
            teachers by name; may be given to `task.set_class_means` later.
        student_kwargs: More arguments of `timm.create_model` for the student.
        student_pretrained: Build a student that is named with timm's pretrained weights. Of a module it says that it
            comes with weights, which nothing else tells: an adapter then starts without changing its logits.
        device: Device of everything.
        dtype: Dtype of everything.
        verbose: Log what was built.
        options: Fields of `Recipe` (kd_weight, kd_kwargs, kd_schedule, kd_tap, task_loss_weight, ...), fields of
            `DataSpec` (input_size, num_classes, sample_labels, ...), and arguments of `create_teacher`:
            teacher_checkpoint, teacher_pretrained, teacher_kwargs (of `timm.create_model`), teacher_weights,
            teacher_mean, teacher_std, teacher_img_size, and for modules as well teacher_dtype (the run's, autocast
            included, by default), teacher_device, teacher_classes ('auto', a file or a mapping: `ClassMatch.by`) and
            teacher_standardize ('none', 'channel' or 'phi-s', with `task.standardize_targets(loader)` before training).
            Of several teachers each of these is one value for all, or a mapping from their names.

    Raises:
        TypeError: If an option is unknown.
        UsageError: If a name, an option or a combination is not possible; says what is.
    """
    recipe_options, data_options, teacher_options = _split_options(options)
    recipe = replace(kd if isinstance(kd, Recipe) else Recipe(kd), **recipe_options)
    device = torch.device(device or 'cpu')
    if isinstance(student, str) and student_pretrained is not None:
        student_kwargs = {'pretrained': student_pretrained, **(student_kwargs or {})}
    data = replace(data, **data_options)
    model = _create_student(student, data.num_classes, student_kwargs).to(device=device, dtype=dtype)
    config = getattr(model, 'pretrained_cfg', None) or {}
    input_size = tuple(data.input_size or config.get('input_size', (3, 224, 224)))
    chosen = name_teachers(teacher)
    names = [name for name in chosen if name]
    if not data.has_labels:
        check_labels(recipe, 'has_labels=False', getattr(model, 'num_classes', 1) != 0, names)
        recipe = replace(recipe, task_loss_weight=0.)
    elif criterion is None:
        check_classifier(model)  # cross-entropy of a feature would be trained without a word
    composition = create_composition(recipe, names)
    methods = composition.methods
    _check_all_read(names, composition, recipe.kd)
    resize_to = None if data.fits else _student_size(model, input_size)
    own_input = (input_size[0], *(resize_to or input_size[1:]))
    teachers = None
    if methods:
        teachers = build_teachers(
            chosen, {'teacher_device': device, 'teacher_dtype': dtype}, teacher_options, model, own_input,
            data.class_names,
            input_size=input_size,
            student_mean=data.mean or config.get('mean', IMAGENET_DEFAULT_MEAN),
            student_std=data.std or config.get('std', IMAGENET_DEFAULT_STD),
            by_name=dict(num_classes=int(getattr(model, 'num_classes', 0)), verbose=verbose))
        check_class_counts(model, teachers, methods, own_input, data.class_names)
    module = _adapt_student(model, teachers, methods, own_input, recipe.kd_tap, verbose)
    module.resize_to = resize_to
    _start_adapters(module, student, student_kwargs, student_pretrained)
    standardizers = {name: one.standardizer for name, one in teachers_by_name(teachers).items()}
    module.standardized = choose_standardized(methods, standardizers, verbose)
    for name, one in teachers_by_name(teachers).items():
        if verbose:
            report_teacher_input(one, module, input_size, name)
        _build_methods(module, one, data, name)
    if verbose and methods:
        _log_composition(recipe.kd, composition)
    if not data.has_labels:
        criterion = None
    elif criterion is None:
        criterion = nn.CrossEntropyLoss()
    task = DistillTask(
        module.to(device=device, dtype=dtype), teachers, criterion, composition.weights,
        composition.task_loss_weight, input_size, composition.schedules, device, dtype, verbose,
        _resolve_drop(recipe.teacher_drop, teachers))
    if class_means is not None:
        task.set_class_means(class_means)
    return task


def _check_all_read(teachers: Sequence[str], composition: Composition, kd: str) -> None:
    read = {split_scope(unit)[1] for unit in composition.weights}
    unread = [name for name in teachers if name not in read]
    if unread and len(teachers) > 1 and composition.methods:
        raise UsageError(f"No method of --kd {kd} reads the teacher '{unread[0]}': leave it out of --teacher.")


def _resolve_drop(probability: float, teachers: Union[AnyTeacher, Teachers, None]) -> float:
    if probability and not isinstance(teachers, Teachers):
        _logger.warning(f'--teacher-drop {probability:g} is ignored: it chooses among several teachers.')
        return 0.
    return probability


def _split_options(options: Mapping[str, Any]) -> Tuple[Dict[str, Any], ...]:
    """Return which options are of the recipe, of the data and of the teacher, the last without what is None."""
    groups = [{field.name for field in fields(cls)} for cls in (Recipe, DataSpec)] + [{*TEACHER_OPTIONS}]
    unknown = options.keys() - set.union(*groups)
    if unknown:
        raise TypeError(f"create_distill_task() got an unexpected keyword argument '{sorted(unknown)[0]}'")
    recipe, data, teacher = ({name: options[name] for name in options if name in group} for group in groups)
    return recipe, data, {name: value for name, value in teacher.items() if value is not None}


def _create_student(student: Union[str, nn.Module], num_classes: Optional[int], kwargs: Optional[Dict]) -> nn.Module:
    if isinstance(student, nn.Module):
        return student
    model = create_model(student, 'student', '--model-kwargs', num_classes=num_classes, **(kwargs or {}))
    return complete(model, student, 'student', num_classes=num_classes) if is_external(student) else model


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
        teacher: Union[AnyTeacher, Teachers, None],
        methods: Mapping[str, DistillMethod],
        input_size: Sequence[int],
        kd_tap: str,
        verbose: bool,
) -> AdaptedStudent:
    adapting = {name: method for name, method in methods.items() if method.adapter}
    if len(adapting) > 1:
        shared = [split_scope(name)[0] for name, method in adapting.items() if '@' in name and method.shares_adapter]
        hint = f" '{shared[0]}' without @ matches one adapter with all teachers." if shared else ''
        raise UsageError(
            f"--kd {'+'.join(adapting)}: only one of these can put an adapter on the student's path.{hint}")
    outputs = frozenset({'logits'}).union(*(method.student_outputs for method in methods.values()))
    if not adapting or teacher is None:
        if kd_tap != 'auto':
            _logger.warning(f'--kd-tap {kd_tap} is ignored: no method of --kd uses an adapter.')
        spec = inspect_student(student, input_size, outputs)
        return AdaptedStudent(student, methods=methods, spec=spec, outputs=outputs)
    ((name, method),) = adapting.items()
    tap = resolve_student_tap(student, input_size, kd_tap)
    if 'head' in outputs and tap.point == 'pre_logits':
        others = [name for name, m in methods.items() if 'head' in m.student_outputs]
        raise UsageError(
            f"--kd {'+'.join(others)} runs the student's head on its last feature map, and the adapter of "
            f"--kd {'+'.join(adapting)} sits inside of that head ({tap}). Use --kd-tap side, or leave one of them out.")
    spec = inspect_student(student, input_size, outputs, tap)
    widths = ask_each(teacher, lambda one: one.tap_channels(tap.point))
    if isinstance(teacher, Teachers):
        scope = split_scope(name)[1]
        widths = widths[scope] if scope else tuple(widths.values())
    adapters = [
        create_adapter(
            str(method.adapter),
            site.layout.channels,
            widths,
            offset=site.offset,
            side=tap.point == 'side',
            **method.adapter_options,
        ) for site in tap.sites
    ]
    if verbose:
        _log_adapters(tap, adapters)
    return AdaptedStudent(student, adapters, tap, methods, spec=spec, outputs=outputs)


def _start_adapters(
        module: AdaptedStudent,
        student: Union[str, nn.Module],
        student_kwargs: Optional[Mapping[str, Any]],
        pretrained: Optional[bool],
) -> None:
    """Let the adapters of a student that comes with weights leave it as it is."""
    if isinstance(student, str):
        pretrained = any((student_kwargs or {}).get(name) for name in ('pretrained', 'checkpoint_path'))
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


def _build_methods(module: AdaptedStudent, teacher: AnyTeacher, data: DataSpec, name: str) -> None:
    """Give the methods what they need of a teacher; where they read more than logits, they create what they train.

    What several teachers share needs nothing of one of them.
    """
    by_name = {key: method for key, method in module.methods.items() if split_scope(key)[1] == name}
    methods = list(by_name.values())
    for method in methods:
        method.set_classifier(teacher.classifier_weight)
    if isinstance(teacher, Teacher):  # what a cache lacks is told where it is opened
        teacher.spec.check(teacher_outputs(module, name))
    student = module.spec.features
    if student is None:
        return
    num_samples = data.num_samples
    if num_samples is None and data.sample_labels is not None:
        num_samples = len(data.sample_labels)
    if isinstance(teacher, Teacher) and any('tail' in m.teacher_outputs for m in methods):
        teacher.resolve_tail()
    pair = PairSpec(student, teacher.feature_spec, num_samples, data.sample_labels)
    standardized = replace(pair, teacher=pair.teacher.standardized())
    for key, method in by_name.items():
        method.build(standardized if key in module.standardized else pair)
