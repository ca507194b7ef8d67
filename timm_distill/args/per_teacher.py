"""Flags of which each of several teachers can have a value: one for all, or `NAME=VALUE` for each."""
import argparse
import os
import re
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from ..errors import UsageError

_NAMED = re.compile(r'(?P<name>[^\W\d]\w*)=(?P<value>.+)', re.DOTALL)
_CODE = re.compile(r'(?P<path>.+\.py):\w+', re.DOTALL)

TeacherNames = Union[None, str, Sequence[str]]  # of --teacher: one, or NAME=MODEL for each of several


class Named(NamedTuple):
    """Value of one teacher."""
    name: str
    value: Any


def split_name(text: str) -> Tuple[str, str]:
    """Return the name in front of '=' and what is behind it, '' and the text for none.

    A file with such a name, or a function of one (FILE.py:FUNCTION), has none.
    """
    match, code = _NAMED.fullmatch(text), _CODE.fullmatch(text)
    if match is None or os.path.isfile(text) or code is not None and os.path.isfile(code['path']):
        return '', text
    return match['name'], match['value']


def teachers_of(teacher: TeacherNames) -> Dict[str, str]:
    """Return the models of `--teacher` by the teachers' names: one under '' where it has none; none without the flag.

    Raises:
        UsageError: If two have one name, or one of several has none.
    """
    if not teacher:
        return {}
    models: Dict[str, str] = {}
    texts = [teacher] if isinstance(teacher, str) else list(teacher)
    for name, model in map(split_name, texts):
        if not name and len(texts) > 1:
            raise UsageError(
                f"--teacher {' '.join(texts)}: '{model}' has no name, and one of several teachers needs one: "
                '--teacher a=NAME b=NAME')
        if name in models:
            raise UsageError(
                f"--teacher {' '.join(texts)}: two teachers are called '{name}': give each a name of its own")
        models[name] = model
    return models


def describe_teachers(teacher: TeacherNames) -> str:
    """Return what `--teacher` names in words."""
    models = teachers_of(teacher)
    if not models or '' in models:
        return models.get('', '')
    return ', '.join(f'{name} ({model})' for name, model in models.items())


def teacher_argument(teacher: TeacherNames) -> Union[None, str, Dict[str, str]]:
    """Return `--teacher` as an argument of `create_distill_task`: a name, or a mapping of names."""
    models = teachers_of(teacher)
    return (models.get('') or None) if not models or '' in models else models


def model_of(teacher: TeacherNames, name: str) -> str:
    """Return the model of a teacher by its name, '' for the only one, whatever it is called."""
    models = teachers_of(teacher)
    return models[name] if name in models else next(iter(models.values()), '')


def value_for(value: Any, name: str) -> Any:
    """Return the value that a flag gives one teacher, '' for the only one, whatever it is called; None for none."""
    if isinstance(value, Mapping):
        return value.get(name) if name else next(iter(value.values()), None)
    return value


def all_values(value: Any) -> List[Any]:
    """Return every value that a flag gives: one for all teachers, or that of each."""
    return list(value.values()) if isinstance(value, Mapping) else [value]


def kwargs_by_teacher(kwargs: Mapping[str, Any], teacher: TeacherNames) -> Dict[str, Any]:
    """Return `--teacher-kwargs` as an argument of `create_distill_task`: those of each teacher, where they have names.

    Raises:
        UsageError: If a key names a teacher that there is not.
    """
    names = [name for name in teachers_of(teacher) if name]
    for key in kwargs:
        name = key.partition('.')[0]
        if '.' in key and name not in names:
            there = f'--teacher names {", ".join(names)}' if names else 'the teacher has no name (--teacher NAME=MODEL)'
            raise UsageError(f"--teacher-kwargs {key}={kwargs[key]}: there is no teacher '{name}'; {there}")
    if not names:
        return dict(kwargs)
    common = {key: value for key, value in kwargs.items() if '.' not in key}
    return {
        name: {**common, **{
            key.partition('.')[2]: value for key, value in kwargs.items() if key.startswith(f'{name}.')}}
        for name in names}


class StorePerTeacher(argparse.Action):
    """Store one value, or with `NAME=VALUE ...` a mapping.

    Args:
        many: A value is several numbers, those of a name joined by commas.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, many: bool = False, **kwargs: Any):
        super().__init__(option_strings, dest, nargs='+', **kwargs)
        self.many = many

    def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: Any,
            option_string: Optional[str] = None,
    ) -> None:
        named = [value for value in values if isinstance(value, Named)]
        if not named:
            if len(values) > 1 and not self.many:
                raise argparse.ArgumentError(self, f'takes one value, or NAME=VALUE for each teacher, not {values}')
            setattr(namespace, self.dest, values if self.many else values[0])
            return
        by_name = dict(named)
        if len(named) < len(values) or len(by_name) < len(named):
            raise argparse.ArgumentError(
                self, 'takes one value for all teachers, or NAME=VALUE once for each of them')
        setattr(namespace, self.dest, by_name)

    def read(self, parser: argparse.ArgumentParser, text: str) -> Any:
        """Return a value of the command line, a `Named` where it has a name."""
        name, value = split_name(text)
        if not name:
            return self.convert(parser, text)
        many = self.many and isinstance(value, str)
        return Named(name, [self.convert(parser, part) for part in value.split(',')] if many else self.convert(
            parser, value))

    def convert(self, parser: argparse.ArgumentParser, text: str) -> Any:
        """Return a text as the flag's type, checked against its choices."""
        kind: Any = self.type or str
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentError(self, f"invalid {kind.__name__} value: '{text}'") from None
        if self.choices is not None and value not in self.choices:
            choices = ', '.join(map(repr, self.choices))
            raise argparse.ArgumentError(self, f"invalid choice: '{text}' (choose from {choices})")
        return value


class StoreTeachers(StorePerTeacher):
    """Store the name of one teacher, or `NAME=MODEL` of each in their order."""

    def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: Any,
            option_string: Optional[str] = None,
    ) -> None:
        texts = [f'{v.name}={v.value}' if isinstance(v, Named) else v for v in values]
        try:
            teachers_of(texts)
        except UsageError as e:
            raise argparse.ArgumentError(None, str(e)) from None
        setattr(namespace, self.dest, texts[0] if len(texts) == 1 else texts)


def place_positionals(argv: Sequence[str], find_action: Any) -> List[str]:
    """Return a command line with what a flag per teacher does not take in front, where it is positional.

    Such a flag takes one value, and more only of the form NAME=VALUE: the folder in `--teacher resnet50 DIR` is none.

    Args:
        argv: The command line.
        find_action: Returns the action of a flag, None for none.
    """
    rest = [part for text in argv for part in _split_equals(text, find_action)]
    front: List[str] = []
    placed: List[str] = []
    while rest:
        text = rest.pop(0)
        placed.append(text)
        if text == '--':
            return [*front, *placed, *rest]
        action = find_action(text)
        if not isinstance(action, StorePerTeacher) or action.many:
            continue
        taken = 0
        while rest and not rest[0].startswith('-'):
            value = rest.pop(0)
            (placed if not taken or split_name(value)[0] else front).append(value)
            taken += 1
    return [*front, *placed]


def _split_equals(text: str, find_action: Any) -> List[str]:
    """Return `--flag=value` of a flag per teacher as two texts."""
    flag, equals, value = text.partition('=')
    if not equals or not value or value.startswith('-') or not isinstance(find_action(flag), StorePerTeacher):
        return [text]
    return [flag, value]
