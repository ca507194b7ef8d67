"""Exceptions that a user can cause, apart from those that are bugs.

The scripts print a `UsageError` as one line and exit with code 2; anything else keeps its traceback. Messages name a
setting by its flag; functions that are called from Python spell it as their argument.
"""
import re
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, TypeVar

_Function = TypeVar('_Function', bound=Callable)
_FLAG = re.compile(r'(?<![\w-])--(no-)?([a-z][a-z0-9-]*)(?: ([A-Z]+\b|\'[^\']*\'))?')  # --no-flag, --flag VALUE
_spelled_by_caller = ContextVar('spelled_by_caller', default=False)


class UsageError(ValueError):
    """A wrong name, value, file or combination: names the value, what is allowed and the flag to change."""


@contextmanager
def flags_in_messages() -> Iterator[None]:
    """Leave the flags in the messages of what is called in this context, for callers whose settings are flags."""
    token = _spelled_by_caller.set(True)
    try:
        yield
    finally:
        _spelled_by_caller.reset(token)


def arguments_in_messages(names: Mapping[str, str]) -> Callable[[_Function], _Function]:
    """Return a decorator that spells flags in the messages of a function's usage errors as Python arguments.

    Args:
        names: Arguments by flag, without dashes in front, where they are not the flag with underscores.
    """
    def _decorate(function: Any) -> Any:
        @wraps(function)
        def _call(*args: Any, **kwargs: Any) -> Any:
            if _spelled_by_caller.get():
                return function(*args, **kwargs)
            try:
                with flags_in_messages():  # of functions that this one calls: their arguments are not the caller's
                    return function(*args, **kwargs)
            except UsageError as e:
                e.args = (spell_arguments(str(e), names),)
                raise
        return _call
    return _decorate


def spell_arguments(message: str, names: Mapping[str, str]) -> str:
    """Return a message with its flags spelled as arguments: `--no-x` is `x=False`, `--x FILE` is `x=FILE`."""
    def _spell(match: 're.Match[str]') -> str:
        negated, flag, value = match.groups()
        name = names.get(flag, flag.replace('-', '_'))
        return f'{name}=False' if negated else f'{name}={value}' if value else name
    return _FLAG.sub(_spell, message)


class LostStateError(RuntimeError):
    """A run ends, or stops, and its newest state is not on disk: says why and where the space went."""


class MergeError(RuntimeError):
    """The merged student does not reproduce the student as trained.

    Attributes:
        raw_state: The unmerged tensors, `{'state_dict': student, 'task_state': adapter and methods}`, so that the
            caller can write them to disk before giving up.
        spoiled_state: What would have been returned, where the student as trained is not finite itself, so that
            nothing tells whether it was merged; None where it is finite.
    """

    def __init__(self, message: str, raw_state: Dict[str, Any]):
        super().__init__(message)
        self.raw_state = raw_state
        self.spoiled_state: Optional[Dict[str, Any]] = None
