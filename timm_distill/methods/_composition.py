"""Composition of methods as `--kd` and its companions spell it: names, presets, options, weights, schedules."""
import math
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Type

from ..errors import UsageError
from ..utils.ranges import NOT_NEGATIVE
from ._base import METHODS, DistillMethod
from ._schedules import ScheduleSpec, create_weight_schedule
from ._wrapper import WrapperMethod


@dataclass(frozen=True)
class Recipe:
    """Methods and their weights, spelt as the flags of the same names.

    Attributes:
        kd: 'none', or names of methods and presets joined by '+', e.g. 'norm+kd'; 'sdd:kd' is one that takes another.
        kd_weight: Weight of each method's terms; a preset's by default, else the method's published one.
        kd_kwargs: Options of the methods, `{'norm.segments': 8}` or `{'norm': {'segments': 8}}`; of a method that
            another takes `{'sdd.kd.temperature': 2}`.
        kd_schedule: Schedule of each method's weight over epochs in place of its own, e.g. `{'norm': 'imagenet'}`.
        kd_tap: Where an adapter sits: 'auto', 'features', 'pre_logits', or 'side' (read the last stage for the loss
            alone).
        task_loss_weight: Weight of the task loss; a preset's by default, else 1.
        distill_loss_weight: Factor on all methods' weights, 1 by default.
        num_epochs: Length of the run, for schedules that span it.
    """
    kd: str = 'norm'
    kd_weight: Optional[Mapping[str, float]] = None
    kd_kwargs: Optional[Mapping[str, Any]] = None
    kd_schedule: Optional[Mapping[str, ScheduleSpec]] = None
    kd_tap: str = 'auto'
    task_loss_weight: Optional[float] = None
    distill_loss_weight: Optional[float] = None
    num_epochs: Optional[int] = None


@dataclass(frozen=True)
class Composition:
    """The methods of a run.

    Attributes:
        methods: Methods by name, not built for a pair yet.
        weights: Weight of each method's terms.
        schedules: Factor on a method's terms by epoch, counted from 0.
        task_loss_weight: Weight of the task loss.
    """
    methods: Dict[str, DistillMethod]
    weights: Dict[str, float]
    schedules: Dict[str, Callable[[int], float]]
    task_loss_weight: float = 1.


def create_composition(recipe: Recipe) -> Composition:
    """Create the methods of a recipe with their weights and schedules.

    Raises:
        UsageError: If a name, an option or a value is not possible; says what is.
    """
    kd, task_loss_weight, distill_loss_weight = recipe.kd, recipe.task_loss_weight, recipe.distill_loss_weight
    default_weights, options = expand_kd(kd)
    for method, option, value in _flatten_options(recipe.kd_kwargs or {}):
        options[_find_method(f'--kd-kwargs {method}.{option}', method, options, kd)][option] = value
    methods = {name: create_by_name(name, options[name]) for name in options}
    presets = [METHODS.presets()[name] for name in parse_kd(kd) if name in METHODS.presets()]
    for flag, value in (('--task-loss-weight', task_loss_weight), ('--distill-loss-weight', distill_loss_weight)):
        if value is not None and value not in NOT_NEGATIVE:
            raise UsageError(f'{flag} {value} must be {NOT_NEGATIVE}.')
    kd_weight = _by_method('--kd-weight', recipe.kd_weight or {}, options, kd)
    weights = _resolve_weights(default_weights, kd_weight, distill_loss_weight)
    if task_loss_weight is None:
        task_loss_weight = next((p.task_loss_weight for p in presets if p.task_loss_weight is not None), 1.)
    if weights and not task_loss_weight and not any(weights.values()):
        raise UsageError(
            f'--task-loss-weight 0 and no method of --kd {kd} with a weight: nothing would train. Change '
            '--task-loss-weight, --distill-loss-weight or --kd-weight.')
    schedules: Dict[str, Callable[[int], float]] = {name: method.weight for name, method in methods.items()}
    specs: Dict[str, ScheduleSpec] = {name: spec for preset in presets for name, spec in preset.schedules.items()}
    specs.update(_by_method('--kd-schedule', recipe.kd_schedule or {}, options, kd))
    for name, spec in specs.items():
        schedules[name] = create_weight_schedule(
            spec, methods[name].schedules, f'--kd-schedule {name}', recipe.num_epochs)
    return Composition(methods, weights, schedules, task_loss_weight)


def parse_kd(kd: str) -> List[str]:
    """Return the names of methods and presets in a `--kd` value; none for 'none'.

    A known name is matched before '+' splits, so that 'norm+kd++' is 'norm' and 'kd++'.
    """
    text = kd.strip()
    if text == 'none':
        return []
    names = [name.strip() for name in _split_known(text)]
    if '' in names or 'none' in names or len(set(names)) < len(names):
        raise UsageError(
            f"--kd '{kd}' must be 'none' or different names of methods and presets joined by '+', e.g. "
            f'norm+kd{METHODS.suggest(text)}.')
    return names


def _split_known(text: str) -> List[str]:
    known = sorted([*METHODS.presets(), *METHODS.names()], key=len, reverse=True)
    names: List[str] = []
    while True:
        rest = {name: text[len(name):].lstrip() for name in known if text.startswith(name)}
        name = next((name for name in rest if rest[name][:1] in ('', '+')), text.partition('+')[0])
        names.append(name)
        text = text[len(name):].lstrip()
        if not text:
            return names
        text = text[1:].lstrip()  # the '+' between two names


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


def classes_of(name: str) -> Dict[str, Type[DistillMethod]]:
    """Return the class of a name of `--kd`, and of the method that it takes, by name.

    Raises:
        UsageError: If a name is unknown, or a method does not take the other.
    """
    outer, colon, inner = name.partition(':')
    cls = METHODS.get(outer).cls
    if not issubclass(cls, WrapperMethod):
        if colon:
            wrappers = [name for name in METHODS.names() if issubclass(METHODS.get(name).cls, WrapperMethod)]
            raise UsageError(f'--kd {name}: {outer} takes no method; {", ".join(wrappers)} does.')
        return {name: cls}
    possible = methods_taken_by(cls)
    inner_cls = METHODS.get(inner.partition(':')[0]).cls if inner else None
    if inner_cls is None or not issubclass(inner_cls, cls.inner_type):
        raise UsageError(
            f'--kd {name}: {outer} takes a method, {outer}:METHOD with one of {", ".join(possible)}.')
    return {name: cls, **classes_of(inner)}


def methods_taken_by(cls: Type[WrapperMethod]) -> List[str]:
    """Return the names of the methods that a wrapper takes."""
    return [name for name in METHODS.names() if issubclass(METHODS.get(name).cls, cls.inner_type)]


def published_weight(name: str) -> float:
    """Return the published weight of a name of `--kd`; that of a method that takes another is a factor on it."""
    return math.prod(cls.published_weight for cls in classes_of(name).values())


def expand_kd(kd: str) -> Tuple[Dict[str, float], Dict[str, Dict[str, Any]]]:
    """Return the default weight and the options of every method of a `--kd` value, presets expanded.

    The default of a method that is named itself is the published one, that of a preset's method the preset's.

    Raises:
        UsageError: If a name is unknown or two of the names stand for the same method.
    """
    weights: Dict[str, float] = {}
    options: Dict[str, Dict[str, Any]] = {}
    presets = METHODS.presets()
    for name in parse_kd(kd):
        weights_of_name: Mapping[str, float] = (
            presets[name].weights if name in presets else {name: published_weight(name)})
        for method, weight in weights_of_name.items():
            if method in weights:
                raise UsageError(
                    f"--kd '{kd}' names the method '{method}' twice: '{name}' is a preset of "
                    f'{" and ".join(weights_of_name)}. Leave one of them out.')
            weights[method] = weight
            options[method] = dict(presets[name].options.get(method, {})) if name in presets else {}
    return weights, options


def methods_of(kd: str) -> Dict[str, Type[DistillMethod]]:
    """Return the classes of the methods of a `--kd` value by name, presets expanded, without creating them.

    A method that takes another stands beside that.

    Raises:
        UsageError: If a name is unknown.
    """
    return {name: cls for method in expand_kd(kd)[1] for name, cls in classes_of(method).items()}


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


def check_labels(recipe: Recipe, reason: str, with_classifier: bool) -> None:
    """Check that the methods of a recipe can work without labels.

    Args:
        recipe: The methods, with their options.
        reason: Why there are no labels, in words.
        with_classifier: Whether the student has a classifier.

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
    methods = create_composition(replace(recipe, task_loss_weight=None)).methods
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


def _find_method(what: str, name: str, known: Iterable[str], kd: str) -> str:
    """Return the method of a `--kd` value that a name means: 'sdd' means 'sdd:kd' where no other takes a method so.

    Raises:
        UsageError: If it means none of them, or several.
    """
    meant = [name] if name in known else [method for method in known if method.startswith(f'{name}:')]
    if len(meant) > 1:
        raise UsageError(f"{what}: --kd {kd} has {' and '.join(meant)}; write which of them.")
    if not meant:
        raise UsageError(
            f"{what}: the method '{name}' is not in --kd {kd}; "
            f'it takes: {", ".join(known) or "nothing, --kd is none"}.')
    return meant[0]


def _by_method(flag: str, values: Mapping[str, Any], known: Iterable[str], kd: str) -> Dict[str, Any]:
    """Return what a flag gives to methods by their names in the `--kd` value."""
    found: Dict[str, Any] = {}
    for name, value in values.items():
        method = _find_method(f'{flag} {name}', name, known, kd)
        if method in found:
            raise UsageError(f'{flag} gives {method} two values: leave one of them out.')
        found[method] = value
    return found


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
