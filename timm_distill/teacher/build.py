"""Teachers of a task: from names, modules and options, each checked against the methods and the student's classes."""
import logging
import math
from typing import Any, Dict, Mapping, Sequence, Union

import torch.nn as nn

from ..errors import UsageError
from ..features.inputs import count_flops, evaluation_mode, random_images
from ..features.stages import count_classes
from ..methods import DistillMethod
from ..methods._scopes import join_scope, split_scope
from .class_map import ClassChoice, ClassMatch
from .several import AnyTeacher, Teachers, check_teacher_names, describe_name, teachers_by_name
from .stored import StoredTeacher
from .teacher import Teacher, create_teacher, wrap_teacher

_logger = logging.getLogger(__name__)

_UNEXPECTED = 1.5  # how far apart two sizes are, as the ratio of their sides, before somebody should be told

# Options of `create_distill_task` that are arguments of `create_teacher`.
TEACHER_OPTIONS = {
    'teacher_kwargs': 'model_kwargs',
    **{f'teacher_{name}': name for name in (
        'checkpoint', 'pretrained', 'weights', 'mean', 'std', 'img_size', 'standardize', 'dtype', 'device', 'classes')},
}
_OF_ANY_TEACHER = ('teacher_standardize', 'teacher_dtype', 'teacher_device', 'teacher_classes')
_TAKE_MAPPINGS = ('teacher_kwargs', 'teacher_classes')  # so that a mapping may be one value for all teachers


def name_teachers(teacher: Any) -> Dict[str, Any]:
    """Return what the user gives as teachers by name: one under '' where it has none.

    Raises:
        UsageError: If there are several without names, or a name is none.
    """
    if isinstance(teacher, (list, tuple)):
        raise UsageError(
            f'--teacher got {len(teacher)} teachers without names: give each one, --teacher a=NAME b=NAME; in Python '
            "{'a': ..., 'b': ...}.")
    if isinstance(teacher, Teachers):
        return dict(teacher.by_name())
    if not isinstance(teacher, Mapping):
        return {'': teacher}
    check_teacher_names(list(teacher))
    if not teacher:
        raise UsageError('--teacher names no teacher: give one or more.')
    return dict(teacher)


def build_teachers(
        chosen: Mapping[str, Any],
        defaults: Mapping[str, Any],
        options: Mapping[str, Any],
        student: nn.Module,
        own_input: Sequence[int],
        class_names: Sequence[str],
        **kwargs: Any,
) -> Union[AnyTeacher, Teachers]:
    """Create the teachers.

    Args:
        chosen: Names of models, modules or teachers by the teachers' names, '' for one without.
        defaults: Options that hold where the user gives none.
        options: What the user gives, for all or by the teachers' names.
        student: Whose classes the teachers' are matched with.
        own_input: What it runs on, (channels, height, width).
        class_names: Name of every class of the data.
        kwargs: More arguments of `create_teacher` and `Teacher`; `by_name` are those of the former.

    Raises:
        UsageError: If one cannot be built; says which.
    """
    by_teacher = split_by_teacher(options, list(chosen))
    built: Dict[str, Any] = {}
    for name, model in chosen.items():
        own = by_teacher[name]
        try:
            if 'teacher_classes' in own:
                own['teacher_classes'] = _match_classes(student, own_input, class_names, own['teacher_classes'])
            built[name] = _resolve_teacher(
                model, defaults, own, autocast='teacher_dtype' not in own, **kwargs)
        except UsageError as e:
            if len(chosen) > 1:
                e.args = (f"Teacher '{name}': {e}",)
            raise
    if len(built) == 1:
        return next(iter(built.values()))
    stored = [name for name, teacher in built.items() if isinstance(teacher, StoredTeacher)]
    if stored:
        raise UsageError(f"--teacher-cache holds one teacher, and '{stored[0]}' is one of several: leave it out.")
    return Teachers(built)


def split_by_teacher(options: Mapping[str, Any], names: Sequence[str]) -> Dict[str, Dict[str, Any]]:
    """Return the options of each teacher: those for all, and its own.

    Args:
        options: One value for all, or a mapping from names, by option.
        names: Of the teachers, '' for one without.

    Raises:
        UsageError: If an option is of a teacher that there is not.
    """
    split: Dict[str, Dict[str, Any]] = {name: {} for name in names}
    for option, value in options.items():
        flag = f'--{option.replace("_", "-")}'
        mapping = isinstance(value, Mapping)
        is_named = mapping and (option not in _TAKE_MAPPINGS or bool(value) and any(name in names for name in value))
        unknown = [str(name) for name in value if name not in names] if is_named else []
        if unknown and names == ['']:
            raise UsageError(
                f'{flag} {unknown[0]}=...: the teacher has no name. Leave it out, or give it one: --teacher '
                f'{unknown[0]}=NAME.')
        if unknown:
            raise UsageError(
                f"{flag} {unknown[0]}=...: there is no teacher '{unknown[0]}'; --teacher names {', '.join(names)}.")
        for name in names:
            own = value.get(name) if is_named else value
            if own is not None:
                split[name][option] = own
    return split


def _resolve_teacher(
        teacher: Union[str, nn.Module, None],
        defaults: Mapping[str, Any],
        options: Mapping[str, Any],
        by_name: Mapping[str, Any],
        **kwargs: Any,
) -> AnyTeacher:
    if teacher is None:
        raise UsageError('Distillation needs a teacher: give --teacher NAME, or --kd none.')
    if not isinstance(teacher, str):
        is_built = isinstance(teacher, (Teacher, StoredTeacher))
        unused = [name for name in options if is_built or name not in _OF_ANY_TEACHER]
        if unused:
            raise UsageError(
                f'{", ".join(unused)}: the teacher is given as a {type(teacher).__name__}, whose weights and input are '
                'its own. Name an architecture instead, or build it with create_teacher.')
    if isinstance(teacher, (Teacher, StoredTeacher)):
        return teacher
    kwargs.update({TEACHER_OPTIONS[name]: value for name, value in {**defaults, **options}.items()})
    return create_teacher(teacher, **by_name, **kwargs) if isinstance(teacher, str) else wrap_teacher(teacher, **kwargs)


def check_class_counts(
        student: nn.Module,
        teachers: Union[AnyTeacher, Teachers],
        methods: Mapping[str, DistillMethod],
        input_size: Sequence[int],
        class_names: Sequence[str],
) -> None:
    """Check that teachers whose logits are compared have as many classes as the student.

    Args:
        student: The student.
        teachers: The teachers.
        methods: Methods by name.
        input_size: What the student runs on, (channels, height, width).
        class_names: Name of every class of the data.

    Raises:
        UsageError: If one has not; says which methods compare them, and with which teacher they can.
    """
    on_logits = {name: split_scope(name)[1] for name, method in methods.items() if method.needs_equal_classes()}
    if not on_logits:
        return
    student_classes = count_classes(student, input_size)
    by_name = teachers_by_name(teachers)
    fitting = [name for name, teacher in by_name.items() if teacher.num_classes == student_classes]
    for name, teacher in by_name.items():
        readers = [method for method, scope in on_logits.items() if scope == name]
        if not readers or name in fitting:
            continue
        bases = [split_scope(method)[0] for method in readers]
        others = f'Write --kd {"+".join(join_scope(base, fitting[0]) for base in bases)}. ' if fitting else ''
        raise UsageError(
            f'--kd {"+".join(readers)} compares logits, but {describe_name(name)} has '
            f'{_describe_classes(teacher.num_classes)} and the student {_describe_classes(student_classes)}. '
            f'{others}{_suggest_classes(teacher, class_names)}Give a '
            'teacher trained on these classes with --teacher-checkpoint, change --num-classes, or use a method that '
            'reads features alone (--list-kd).')


def _suggest_classes(teacher: AnyTeacher, class_names: Sequence[str]) -> str:
    if not teacher.num_classes:
        return ''
    labels = teacher.labels
    if labels is not None and labels.has_all_ids(class_names):
        return f'All classes of the data are among those of {labels.source}: --teacher-classes auto takes these. '
    return "--teacher-classes FILE says which of the teacher's classes are the student's. "


def _match_classes(
        student: nn.Module,
        input_size: Sequence[int],
        class_names: Sequence[str],
        choice: ClassChoice,
) -> ClassMatch:
    """Return how the student's classes are matched with the teacher's.

    Raises:
        UsageError: If there are not as many names as classes.
    """
    count = count_classes(student, input_size)
    names = list(class_names) or [''] * count
    if count != len(names):
        raise UsageError(
            f'The student has {_describe_classes(count)} and class_names names {len(names)}: give one name for each, '
            "'' for one without.")
    return ClassMatch(names, choice)


def _describe_classes(count: int) -> str:
    return f'{count} classes' if count else 'no classifier'


def report_teacher_input(
        teacher: AnyTeacher,
        module: nn.Module,
        input_size: Sequence[int],
        name: str = '',
) -> None:
    """Say what a teacher is fed and where that was taken from, and warn of a size that nobody may have meant.

    Args:
        teacher: The teacher.
        module: What trains.
        input_size: What the student is fed, (channels, height, width).
        name: What the teacher is called.
    """
    fed, said = teacher.preprocessing.input_size[1:], teacher.trained_size
    who = describe_name(name).replace('t', 'T', 1)
    _logger.info(f'{" ".join(["Teacher", name]).strip()} input: {teacher.preprocessing}.')
    if teacher.preprocessing.sources.get('input_size') == '--teacher-img-size':
        return
    if said is not None and not 1 / _UNEXPECTED < math.sqrt(math.prod(fed) / math.prod(said)) < _UNEXPECTED:
        _logger.warning(
            f'{who} was trained on {said[0]}x{said[1]} images and is fed {fed[0]}x{fed[1]}: its features may be '
            f'far from those it learnt. --teacher-img-size {said[0]} resizes its images.')
    if isinstance(teacher, Teacher) and math.sqrt(math.prod(fed) / math.prod(input_size[1:])) > _UNEXPECTED:
        share = _teacher_share(teacher, module, input_size)
        _logger.warning(
            f'{who} is fed {fed[0]}x{fed[1]}, the student {input_size[1]}x{input_size[2]}: the teacher takes '
            f"{100 * share:.0f} % of a step's operations. --teacher-img-size N feeds it another size.")


def _teacher_share(teacher: nn.Module, module: nn.Module, input_size: Sequence[int]) -> float:
    """Return the teacher's part of a step's multiply-adds; those of a backward pass are twice the forward pass's."""
    images = random_images(module, input_size, batch_size=1)
    with evaluation_mode(module):
        teacher_flops, student_flops = (count_flops(model, images) for model in (teacher, module))
    return teacher_flops / max(teacher_flops + 3 * student_flops, 1)
