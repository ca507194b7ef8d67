"""Names of `--kd`: methods, presets, methods that take another, and the teachers that they are of."""
import math
from typing import Any, Dict, Iterable, List, Mapping, Sequence, Tuple, Type

from ..errors import UsageError
from ._base import METHODS, DistillMethod
from ._scopes import check_teacher, join_scope, split_scope
from ._wrapper import WrapperMethod


def parse_kd(kd: str) -> List[str]:
    """Return the names in a `--kd` value, of methods and presets, with '@TEACHER' where that is there; none for 'none'.

    A known name is matched before '+' splits, so that 'norm+kd++' is 'norm' and 'kd++'.
    """
    text = kd.strip()
    if text == 'none':
        return []
    parts = _split_known(text)
    names = [join_scope(*split_scope(part)) for part in parts]
    empty = any(split_scope(part)[0] in ('', 'none') or part.rstrip().endswith('@') for part in parts)
    if empty or len(set(names)) < len(names):
        raise UsageError(
            f"--kd '{kd}' must be 'none' or different names of methods and presets joined by '+', e.g. "
            f'norm+kd{METHODS.suggest(text)}.')
    return names


def _split_known(text: str) -> List[str]:
    known = sorted([*METHODS.presets(), *METHODS.names()], key=len, reverse=True)
    names: List[str] = []
    while True:
        rest = {name: text[len(name):].lstrip() for name in known if text.startswith(name)}
        name = next((name for name in rest if rest[name][:1] in ('', '+', '@')), text.partition('+')[0])
        name += text[len(name):].partition('+')[0]  # the teacher
        names.append(name)
        text = text[len(name):].lstrip()
        if not text:
            return names
        text = text[1:].lstrip()  # the '+' between two names


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


def expand_kd(kd: str, teachers: Sequence[str] = ()) -> Tuple[Dict[str, float], Dict[str, Dict[str, Any]]]:
    """Return the default weight of every unit and the options of every method of a `--kd` value, presets expanded.

    The default of a method that is named itself is the published one, that of a preset's method the preset's.

    Args:
        kd: The value.
        teachers: Names of the teachers, as far as they have some.

    Raises:
        UsageError: If a name is unknown or two of the names stand for the same method.
    """
    weights: Dict[str, float] = {}
    options: Dict[str, Dict[str, Any]] = {}
    presets = METHODS.presets()
    for name, scope in map(split_scope, parse_kd(kd)):
        check_teacher(f'--kd {join_scope(name, scope)}', scope, teachers)
        weights_of_name: Mapping[str, float] = (
            presets[name].weights if name in presets else {name: published_weight(name)})
        for method, weight in weights_of_name.items():
            for unit in _units_of(method, scope, teachers):
                if unit in weights:
                    raise UsageError(
                        f"--kd '{kd}' names the method '{unit}' twice: '{name}' "
                        f'{_describe_units(name, weights_of_name, teachers)}. Leave one of them out.')
                weights[unit] = weight
                key = method if _is_shared(method, scope, teachers) else unit
                options[key] = dict(presets[name].options.get(method, {})) if name in presets else {}
    return weights, options


def _units_of(method: str, scope: str, teachers: Sequence[str]) -> List[str]:
    """Return what a method of a `--kd` value stands for: one, or with several teachers one for each that it reads."""
    if len(teachers) < 2:
        return [method]
    return [join_scope(method, teacher) for teacher in ([scope] if scope else teachers)]


def _is_shared(method: str, scope: str, teachers: Sequence[str]) -> bool:
    """Whether several teachers share one method.

    Raises:
        UsageError: If it can have one teacher alone.
    """
    cls = METHODS.get(method.partition(':')[0]).cls
    if len(teachers) < 2 or scope or not cls.adapter:
        return False
    if not cls.shares_adapter:
        raise UsageError(
            f"--kd {method}: its adapter on the student's path is matched with one teacher; write which, e.g. "
            f'{method}@{teachers[0]}.')
    return True


def _describe_units(name: str, methods: Iterable[str], teachers: Sequence[str]) -> str:
    if name in METHODS.presets():
        return f'is a preset of {" and ".join(methods)}'
    return f'without a teacher means it with each of {", ".join(teachers)}' if len(teachers) > 1 else 'is it'


def methods_of(kd: str) -> Dict[str, Type[DistillMethod]]:
    """Return the classes of the methods of a `--kd` value by name, presets expanded, without creating them.

    A method that takes another stands beside that. Teachers are left out.

    Raises:
        UsageError: If a name is unknown.
    """
    presets = METHODS.presets()
    names = [split_scope(name)[0] for name in parse_kd(kd)]
    named = [method for name in names for method in (presets[name].weights if name in presets else [name])]
    return {name: cls for method in named for name, cls in classes_of(method).items()}
