"""Composition of methods as `--kd` and its companions spell it: names, presets, options, weights, schedules."""
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from ..errors import UsageError
from ..utils.ranges import NOT_NEGATIVE, Range
from ._base import METHODS, DistillMethod
from ._names import classes_of, expand_kd, methods_of, methods_taken_by, parse_kd, published_weight
from ._schedules import ScheduleSpec, create_weight_schedule
from ._scopes import by_unit, find_units, join_scope, split_scope

__all__ = [
    'Composition', 'Recipe', 'check_labels', 'check_mixing', 'create_by_name', 'create_composition', 'expand_kd',
    'methods_of', 'methods_taken_by', 'parse_kd', 'published_weight']

_PROBABILITY = Range(0, 1)


@dataclass(frozen=True)
class Recipe:
    """Methods and their weights, spelt as the flags of the same names.

    Attributes:
        kd: 'none', or names of methods and presets joined by '+', e.g. 'norm+kd'; 'sdd:kd' is one that takes another,
            'kd@dino' one with the teacher of that name alone.
        kd_weight: Weight of each method's terms; a preset's by default, else the method's published one. Here and in
            the two that follow 'kd' means it with every teacher, 'kd@dino' with one.
        kd_kwargs: Options of the methods, `{'norm.segments': 8}` or `{'norm': {'segments': 8}}`; of a method that
            another takes `{'sdd.kd.temperature': 2}`.
        kd_schedule: Schedule of each method's weight over epochs in place of its own, e.g. `{'norm': 'imagenet'}`.
        kd_tap: Where an adapter sits: 'auto', 'features', 'pre_logits', or 'side' (read the last stage for the loss
            alone).
        task_loss_weight: Weight of the task loss; a preset's by default, else 1.
        distill_loss_weight: Factor on all methods' weights, 1 by default.
        num_epochs: Length of the run, for schedules that span it.
        teacher_drop: Probability with which a step leaves out a teacher's terms; the teacher with the largest loss
            stays.
    """
    kd: str = 'norm'
    kd_weight: Optional[Mapping[str, float]] = None
    kd_kwargs: Optional[Mapping[str, Any]] = None
    kd_schedule: Optional[Mapping[str, ScheduleSpec]] = None
    kd_tap: str = 'auto'
    task_loss_weight: Optional[float] = None
    distill_loss_weight: Optional[float] = None
    num_epochs: Optional[int] = None
    teacher_drop: float = 0.


@dataclass(frozen=True)
class Composition:
    """The methods of a run.

    Attributes:
        methods: Methods by name, METHOD@TEACHER where they are of one of several teachers, not built for a pair yet.
        weights: Weight of the terms of each method, of one that several teachers share with each of them.
        schedules: Factor on these terms by epoch, counted from 0.
        task_loss_weight: Weight of the task loss.
    """
    methods: Dict[str, DistillMethod]
    weights: Dict[str, float]
    schedules: Dict[str, Callable[[int], float]]
    task_loss_weight: float = 1.


def create_composition(recipe: Recipe, teachers: Sequence[str] = ()) -> Composition:
    """Create the methods of a recipe with their weights and schedules.

    Args:
        recipe: The recipe.
        teachers: Names of the teachers, as far as they have some.

    Raises:
        UsageError: If a name, an option or a value is not possible; says what is.
    """
    kd, task_loss_weight, distill_loss_weight = recipe.kd, recipe.task_loss_weight, recipe.distill_loss_weight
    default_weights, preset_options = expand_kd(kd, teachers)
    methods = _create_methods(recipe, preset_options, teachers)
    named = [split_scope(name) for name in parse_kd(kd)]
    presets = [(METHODS.presets()[name], scope) for name, scope in named if name in METHODS.presets()]
    for flag, value in (('--task-loss-weight', task_loss_weight), ('--distill-loss-weight', distill_loss_weight)):
        if value is not None and value not in NOT_NEGATIVE:
            raise UsageError(f'{flag} {value} must be {NOT_NEGATIVE}.')
    if recipe.teacher_drop not in _PROBABILITY:
        raise UsageError(f'--teacher-drop {recipe.teacher_drop} must be {_PROBABILITY}.')
    kd_weight = by_unit('--kd-weight', recipe.kd_weight or {}, default_weights, kd, teachers)
    weights = _resolve_weights(default_weights, kd_weight, distill_loss_weight)
    if task_loss_weight is None:
        task_loss_weight = next((p.task_loss_weight for p, _ in presets if p.task_loss_weight is not None), 1.)
    if weights and not task_loss_weight and not any(weights.values()):
        raise UsageError(
            f'--task-loss-weight 0 and no method of --kd {kd} with a weight: nothing would train. Change '
            '--task-loss-weight, --distill-loss-weight or --kd-weight.')
    given = {join_scope(name, scope): spec for preset, scope in presets for name, spec in preset.schedules.items()}
    specs = by_unit('--kd-schedule', given, weights, kd, teachers)
    specs.update(by_unit('--kd-schedule', recipe.kd_schedule or {}, weights, kd, teachers))
    owners = {unit: methods[unit if unit in methods else split_scope(unit)[0]] for unit in weights}
    schedules: Dict[str, Callable[[int], float]] = {unit: method.weight for unit, method in owners.items()}
    for unit, spec in specs.items():
        schedules[unit] = create_weight_schedule(
            spec, owners[unit].schedules, f'--kd-schedule {unit}', recipe.num_epochs)
    return Composition(methods, weights, schedules, task_loss_weight)


def _create_methods(
        recipe: Recipe,
        preset_options: Mapping[str, Mapping[str, Any]],
        teachers: Sequence[str],
) -> Dict[str, DistillMethod]:
    """Create the methods with the presets' options and the user's, of which those of one teacher count first."""
    options = {name: dict(given) for name, given in preset_options.items()}
    flat = _flatten_options(recipe.kd_kwargs or {})
    for name, option, value in sorted(flat, key=lambda item: '@' in item[0]):
        what = f'--kd-kwargs {name}.{option}'
        method, teacher = split_scope(name)
        if teacher and method in options and len(teachers) > 1:
            raise UsageError(
                f'{what}: {method} is one for all teachers: write {method}.{option}, or {name} in --kd too.')
        for unit in find_units(what, name, options, recipe.kd, teachers):
            options[unit][option] = value
    return {
        name: create_by_name(split_scope(name)[0], given, join_scope(*_label(name)) if '@' in name else '')
        for name, given in options.items()}


def _label(name: str) -> Tuple[str, str]:
    """Return what the options of a method are called in messages, apart: 'sdd' and 'dino' for 'sdd:kd@dino'."""
    method, teacher = split_scope(name)
    return method.partition(':')[0], teacher


def create_by_name(name: str, options: Mapping[str, Any], label: str = '') -> DistillMethod:
    """Create a method by a name of `--kd`: 'kd', or 'sdd:kd' for one that takes another.

    Args:
        name: Name.
        options: Options by name; those of the method that is taken as 'kd.temperature', or together under 'kd'.
        label: What its options are called in messages; its own name by default.

    Raises:
        UsageError: If a name or an option is unknown or a value is not allowed.
    """
    classes_of(name)
    outer, _, inner = name.partition(':')
    entry = replace(METHODS.get(outer), name=label or outer)
    if not inner:
        return entry.create(**options)
    key = inner.partition(':')[0]
    taken = {option.partition('.')[2]: value for option, value in options.items() if option.startswith(f'{key}.')}
    together = options.get(key, {})
    if not isinstance(together, Mapping):
        raise UsageError(f'{entry.name}.{key}={together!r} must be {entry.name}.{key}.OPTION=VALUE.')
    taken.update(together)
    own = {option: value for option, value in options.items() if option.partition('.')[0] != key}
    return entry.create(create_by_name(inner, taken, f'{entry.name}.{key}'), **own)


def check_mixing(kd: str, flags: Sequence[str]) -> None:
    """Check that all methods of a `--kd` value can work with mixed images.

    Args:
        kd: The value.
        flags: Flags in use that mix images, e.g. `['--mixup 0.2']`; none where there are none.

    Raises:
        UsageError: If one cannot; names the flags to leave out and the methods that can.
    """
    unmixed = [name for name, cls in methods_of(kd).items() if not cls.mixed_images]
    if flags and unmixed:
        others = [name for name in METHODS.names() if METHODS.get(name).cls.mixed_images]
        raise UsageError(
            f'--kd {"+".join(unmixed)} needs unmixed images: leave out {", ".join(flags)}, or choose '
            f'among the methods that take mixed images: {", ".join(others)}.')


def check_labels(recipe: Recipe, reason: str, with_classifier: bool, teachers: Sequence[str] = ()) -> None:
    """Check that the methods of a recipe can work without labels.

    Args:
        recipe: The methods, with their options.
        reason: Why there are no labels, in words.
        with_classifier: Whether the student has a classifier.
        teachers: Names of the teachers, as far as they have some.

    Raises:
        UsageError: If one cannot; names those that can.
    """
    if not parse_kd(recipe.kd):
        raise UsageError(
            f'There are no labels ({reason}), and without them only a teacher says what to learn: give --teacher NAME '
            f'with --kd {", ".join(_list_unlabelled(with_classifier))}, joined by + where there are several.')
    if recipe.task_loss_weight:
        raise UsageError(
            f'--task-loss-weight {recipe.task_loss_weight:g} needs labels, and there are none ({reason}): leave it '
            'out.')
    methods = create_composition(replace(recipe, task_loss_weight=None), teachers).methods
    on_labels = [name for name, method in methods.items() if method.reads_labels]
    on_logits = [
        name for name, method in methods.items()
        if not with_classifier and name not in on_labels and method.reads_student_classes()]
    words = [f'{"+".join(names)} needs {what}' for names, what in (
        (on_labels, f'labels, and there are none ({reason})'),
        (on_logits, 'a student with a classifier, and this one has none (--num-classes 0)')) if names]
    if words:
        raise UsageError(
            f'--kd {"; ".join(words)}. What works here: {", ".join(_list_unlabelled(with_classifier))}.')


def _list_unlabelled(with_classifier: bool) -> List[str]:
    classes = {name: METHODS.get(name).cls for name in METHODS.names()}
    return [
        name for name, cls in classes.items()
        if not cls.reads_labels and (with_classifier or not cls.reads_student_classes())]


def _flatten_options(kd_kwargs: Mapping[str, Any]) -> List[Tuple[str, str, Any]]:
    items: List[Tuple[str, str, Any]] = []
    for key, value in kd_kwargs.items():
        if isinstance(value, Mapping) and '.' not in key:
            items += [(key, option, v) for option, v in value.items()]
        elif '.' in key:
            method, option = key.split('.', 1)
            items.append((method, option, value))
        else:
            raise UsageError(f"--kd-kwargs '{key}' must be METHOD.OPTION=VALUE, e.g. norm.segments=8.")
    return items


def _resolve_weights(
        default_weights: Mapping[str, float],
        kd_weight: Optional[Mapping[str, float]],
        distill_loss_weight: Optional[float],
) -> Dict[str, float]:
    for name, weight in (kd_weight or {}).items():
        if weight not in NOT_NEGATIVE:
            raise UsageError(f'--kd-weight {name}={weight} must be {NOT_NEGATIVE}.')
    factor = 1. if distill_loss_weight is None else distill_loss_weight
    return {name: factor * float((kd_weight or {}).get(name, default)) for name, default in default_weights.items()}
