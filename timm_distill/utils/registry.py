"""Registries of adapters and methods: frozen entries by name, found by discovery.

Knows nothing of what it registers, apart from a class with a docstring and keyword options.
"""
import difflib
import importlib
import inspect
import logging
import pkgutil
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Callable, Dict, List, Mapping

from ..errors import UsageError

_logger = logging.getLogger(__name__)
_LARGEST = 10 ** 8  # no weight, width or count of a method is as large


@dataclass(frozen=True)
class Entry:
    """What a registry knows of one name.

    Attributes:
        name: Name that the user writes.
        cls: Registered class.
        description: First line of the class docstring.
    """
    name: str
    cls: Any
    description: str

    @property
    def defaults(self) -> Dict[str, Any]:
        """Options that the user can set, with their defaults."""
        parameters = inspect.signature(self.cls).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}


class Registry:
    """Classes by name.

    Args:
        kind: What the entries are, for messages ('method', 'adapter').
        flag: Command line flag that selects an entry, for messages.
        package: Package whose modules register entries when they are imported.
        entry_points: Group of entry points by which other packages register more; '' for none.
    """

    def __init__(self, kind: str, flag: str, package: str, entry_points: str = ''):
        self.kind = kind
        self.flag = flag
        self.package = package
        self.entry_points = entry_points
        self._entries: Dict[str, Entry] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[type], type]:
        """Return a class decorator that adds the class under `name`.

        Raises:
            ValueError: If the name is taken by another class, or the class has no docstring.
        """
        def _register(cls: type) -> type:
            if name in self._entries:
                raise ValueError(f"{self.kind} '{name}' is registered already, by {self._entries[name].cls!r}.")
            if not cls.__doc__:
                raise ValueError(f"{self.kind} '{name}' needs a docstring: its first line is the description.")
            self._entries[name] = Entry(name, cls, cls.__doc__.strip().splitlines()[0])
            return cls
        return _register

    def names(self) -> List[str]:
        """Return the registered names, sorted."""
        self._discover()
        return sorted(self._entries)

    def get(self, name: str) -> Entry:
        """Return the entry of `name`.

        Raises:
            UsageError: If the name is unknown; lists the known ones.
        """
        self._discover()
        if name not in self._entries:
            raise UsageError(
                f"Unknown {self.kind} '{name}'{_closest(name, self._entries)}. "
                f"{self.flag} takes: {', '.join(self.names())}.")
        return self._entries[name]

    def create(self, name: str, *args: Any, **options: Any) -> Any:
        """Create the object of `name` with the user's options.

        Raises:
            UsageError: If the name or an option is unknown; lists the known ones.
        """
        entry = self.get(name)
        for option in options:
            if option not in entry.defaults:
                known = ', '.join(f'{name}.{key}' for key in entry.defaults) or 'no options'
                raise UsageError(
                    f"Unknown option '{name}.{option}'{_closest(option, entry.defaults)}. "
                    f'--kd-kwargs takes for {name}: {known}.')
            _check_type(f'{name}.{option}', options[option], entry.defaults[option])
        return entry.cls(*args, **options)

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            if module.name.startswith('_'):  # what the entries share
                continue
            importlib.import_module(f'{self.package}.{module.name}')
        if self.entry_points:
            self._load_entry_points()

    def _load_entry_points(self) -> None:
        for entry_point in entry_points(group=self.entry_points):
            known = dict(self._entries)
            try:
                entry_point.load()
            except Exception as e:  # whatever a plugin does wrong must not stop a run that may not use it
                self._entries = known
                _logger.warning(
                    f"The plugin '{entry_point.value}' ({_distribution(entry_point)}) gives no "
                    f'{self.kind}: {type(e).__name__}: {" ".join(str(e).split())}')


def _distribution(entry_point: EntryPoint) -> str:
    return f'of {entry_point.dist.name}' if entry_point.dist is not None else 'of an unnamed package'


def _check_type(option: str, value: Any, default: Any) -> None:
    """Raise a UsageError where a switch or number is given something else, or a number without measure.

    Ranges and all other options are checked by the class.
    """
    if isinstance(default, bool):
        expected, fits = 'True or False', isinstance(value, bool)
    elif isinstance(default, int):
        expected, fits = 'an integer', isinstance(value, int) and not isinstance(value, bool)
    elif isinstance(default, float):
        expected, fits = 'a number', isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        return
    if not fits:
        raise UsageError(f'{option}={value!r} must be {expected} (--kd-kwargs {option}={default}).')
    if not -_LARGEST <= value <= _LARGEST:  # nan too
        raise UsageError(
            f'{option}={value!r} must be a number of at most {_LARGEST:g} '
            f'(--kd-kwargs {option}={default}).')


def _closest(word: str, known: Mapping[str, Any]) -> str:
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean '{matches[0]}'?" if matches else ''
