"""Registries of adapters and methods: frozen entries by name, found by discovery.

Knows nothing of what it registers: classes with a docstring and keyword options, and presets of these.
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
from .ranges import OneOf, Range

_logger = logging.getLogger(__name__)
LARGEST_NUMBER = 10 ** 8  # no weight, width or count of a method is as large


@dataclass(frozen=True)
class Entry:
    """Entry of a registry under one name.

    Attributes:
        name: Name that the user writes.
        cls: Registered class.
        description: First line of the class docstring.
    """
    name: str
    cls: Any
    description: str

    @property
    def options(self) -> Dict[str, 'Option']:
        """Options that the user can set: the constructor's arguments with a default."""
        try:
            parameters = inspect.signature(self.cls, eval_str=True).parameters.values()
        except NameError:  # another package's annotations, which it imports for type checkers alone
            parameters = inspect.signature(self.cls).parameters.values()
        return {p.name: Option(f'{self.name}.{p.name}', p) for p in parameters if p.default is not p.empty}

    def create(self, *args: Any, **options: Any) -> Any:
        """Create the object with the user's options.

        Raises:
            UsageError: If an option is unknown or a value is not allowed; lists what is.
        """
        known = self.options
        for option, value in options.items():
            if option not in known:
                takes = ', '.join(f'{self.name}.{key}' for key in known) or 'no options'
                raise UsageError(
                    f"Unknown option '{self.name}.{option}'{_closest(option, known)}. "
                    f'--kd-kwargs takes for {self.name}: {takes}.')
            known[option].check(value)
        return self.cls(*args, **options)

    @property
    def defaults(self) -> Dict[str, Any]:
        """Default of every option."""
        return {name: option.default for name, option in self.options.items()}


class Option:
    """An option of a registered class.

    What it can be is declared where it stands, `power: Annotated[float, Range(1, 16)] = 2.`; of a switch or a number
    without a declaration only the type counts.

    Args:
        name: 'ENTRY.OPTION', for messages.
        parameter: Argument of the constructor.
    """

    def __init__(self, name: str, parameter: inspect.Parameter):
        self.name, self.default = name, parameter.default
        self.allowed: Any = next(iter(getattr(parameter.annotation, '__metadata__', ())), None)
        if self.allowed is None and isinstance(self.default, bool):
            self.allowed = OneOf(True, False)
        elif self.allowed is None and isinstance(self.default, (int, float)):
            self.allowed = Range(-LARGEST_NUMBER, LARGEST_NUMBER, whole=isinstance(self.default, int))

    def check(self, value: Any) -> None:
        """Raise a UsageError for a value that is not allowed."""
        if self.allowed is not None and value not in self.allowed:
            raise UsageError(
                f'{self.name}={value!r} must be {self.allowed} (--kd-kwargs {self.name}={self.default}).')

    def __str__(self) -> str:
        return f'{self.name}={self.default}' + (f' ({self.allowed})' if self.allowed is not None else '')


class Registry:
    """Classes, and presets of them, by name.

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
        self._presets: Dict[str, Any] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[type], type]:
        """Return a class decorator that adds the class under `name`.

        Raises:
            ValueError: If the name is taken by another class, or the class has no docstring.
        """
        def _register(cls: type) -> type:
            self._check_free(name)
            if not cls.__doc__:
                raise ValueError(f"{self.kind} '{name}' needs a docstring: its first line is the description.")
            self._entries[name] = Entry(name, cls, cls.__doc__.strip().splitlines()[0])
            return cls
        return _register

    def register_preset(self, preset: Any, *names: str) -> None:
        """Make a preset, what one name stands for in place of several entries, known under its names.

        Raises:
            ValueError: If a name is taken.
        """
        for name in names:
            self._check_free(name)
        self._presets.update(dict.fromkeys(names, preset))

    def names(self) -> List[str]:
        """Return the names of the registered classes, sorted."""
        self._discover()
        return sorted(self._entries)

    def presets(self) -> Dict[str, Any]:
        """Return the presets by name."""
        self._discover()
        return dict(self._presets)

    def get(self, name: str) -> Entry:
        """Return the entry of `name`.

        Raises:
            UsageError: If the name is unknown; lists the known ones.
        """
        self._discover()
        if name in self._presets:
            raise UsageError(f"'{name}' is a preset, not a single {self.kind}: it stands for {self._presets[name]}.")
        if name not in self._entries:
            presets = f', and the presets {", ".join(sorted(self._presets))}' if self._presets else ''
            raise UsageError(
                f"Unknown {self.kind} '{name}'{self.suggest(name)}. "
                f'{self.flag} takes: {", ".join(self.names())}{presets}.')
        return self._entries[name]

    def suggest(self, name: str) -> str:
        """Return a question for the known name that is closest to an unknown one, '' where none is close."""
        return _closest(name, {**self._entries, **self._presets})

    def _check_free(self, name: str) -> None:
        if name in self._entries or name in self._presets:
            taken = self._entries[name].cls if name in self._entries else self._presets[name]
            raise ValueError(f"{self.kind} '{name}' is registered already, by {taken!r}.")

    def create(self, name: str, *args: Any, **options: Any) -> Any:
        """Create the object of `name` with the user's options.

        Raises:
            UsageError: If the name or an option is unknown, or a value is not allowed; lists what is.
        """
        return self.get(name).create(*args, **options)

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


def _closest(word: str, known: Mapping[str, Any]) -> str:
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean '{matches[0]}'?" if matches else ''
