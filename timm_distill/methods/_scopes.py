"""Scopes of methods: `METHOD@TEACHER` is a method with one of several teachers, by the teacher's name.

A method that several teachers share (`shares_adapter`) is one object; its terms, weights and schedules are of each
teacher all the same. What has a weight of its own is a unit: 'norm', or 'norm@dino' where there are several teachers.
"""
from typing import Any, Dict, Iterable, List, Mapping, Sequence, Tuple

from ..errors import UsageError


def split_scope(name: str) -> Tuple[str, str]:
    """Return the method and the teacher of a name, '' for no teacher."""
    method, _, teacher = name.partition('@')
    return method.strip(), teacher.strip()


def join_scope(method: str, teacher: str) -> str:
    """Return the name of a method with a teacher, '' for none."""
    return f'{method}@{teacher}' if teacher else method


def units_of(names: Iterable[str], teacher: str) -> Dict[str, str]:
    """Return the units that a teacher has a part in, each with the name of its method among some.

    Args:
        names: Of methods, as a task has them: one that several teachers share has no teacher.
        teacher: '' for the only one.
    """
    units = {}
    for name in names:
        scope = split_scope(name)[1]
        if scope in ('', teacher):
            units[name if scope else join_scope(name, teacher)] = name
    return units


def scope_term(term: str, teacher: str) -> str:
    """Return the name of a term with its teacher, 'nd_norm_loss' as 'nd_norm@dino_loss'."""
    return f'{join_scope(term[:-len("_loss")], teacher)}_loss' if teacher else term


def unscope_term(term: str) -> Tuple[str, str]:
    """Return the name that a method gave a term, and its teacher, '' for none."""
    name, at, teacher = term[:-len('_loss')].partition('@')
    return (f'{name}_loss', teacher) if at else (term, '')


def check_teacher(what: str, teacher: str, teachers: Sequence[str]) -> None:
    """Raise a UsageError for a teacher that there is not, '' apart, which means each."""
    if teacher and not teachers:
        raise UsageError(
            f"{what}: the teacher has no name. Leave out '@{teacher}', or give it one: --teacher {teacher}=NAME.")
    if teacher and teacher not in teachers:
        raise UsageError(f"{what}: there is no teacher '{teacher}'; --teacher names {', '.join(teachers)}.")


def find_units(what: str, name: str, known: Iterable[str], kd: str, teachers: Sequence[str] = ()) -> List[str]:
    """Return the units of a `--kd` value that a name of its companions means.

    'kd' means 'kd@a' and 'kd@b' where there are several teachers; 'sdd' means 'sdd:kd' where no other takes a method
    so.

    Args:
        what: Where the name stands, for messages.
        name: METHOD or METHOD@TEACHER.
        known: The units.
        kd: The value.
        teachers: Names of the teachers, as far as they have some.

    Raises:
        UsageError: If it means none of them, or different methods.
    """
    known = list(known)
    method, teacher = split_scope(name)
    check_teacher(what, teacher, teachers)
    if len(teachers) < 2:
        teacher = ''
    possible = [unit for unit in known if not teacher or split_scope(unit)[1] == teacher]
    meant = [unit for unit in possible if split_scope(unit)[0] == method]
    meant = meant or [unit for unit in possible if split_scope(unit)[0].startswith(f'{method}:')]
    methods = list(dict.fromkeys(split_scope(unit)[0] for unit in meant))
    if len(methods) > 1:
        raise UsageError(f"{what}: --kd {kd} has {' and '.join(methods)}; write which of them.")
    if not meant:
        raise UsageError(
            f"{what}: the method '{name}' is not in --kd {kd}; "
            f'it takes: {", ".join(known) or "nothing, --kd is none"}.')
    return meant


def by_unit(
        flag: str,
        values: Mapping[str, Any],
        known: Iterable[str],
        kd: str,
        teachers: Sequence[str] = (),
) -> Dict[str, Any]:
    """Return what a flag gives to units by the names that it has; a name with a teacher counts before one without."""
    found: Dict[str, Any] = {}
    known = list(known)
    for names in ([n for n in values if '@' not in n], [n for n in values if '@' in n]):
        given: Dict[str, Any] = {}
        for name in names:
            for unit in find_units(f'{flag} {name}', name, known, kd, teachers):
                if unit in given:
                    raise UsageError(f'{flag} gives {unit} two values: leave one of them out.')
                given[unit] = values[name]
        if len(teachers) < 2 and found.keys() & given.keys():
            raise UsageError(f'{flag} gives {next(iter(found.keys() & given.keys()))} two values: leave one out.')
        found.update(given)
    return found
