"""Class map: the teacher's logits for the student's classes, where both were trained on different label sets.

The teacher's distribution is restricted to the classes that the student has: one class of the student takes one of the
teacher's logits, or the sum of several classes' probabilities (log-sum-exp of their logits). Every loss that takes a
softmax over the result thereby renormalises.
"""
import logging
import os
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..data.class_map import read_names
from ..errors import UsageError
from ..utils.precision import to_full_precision
from ..utils.text import printable
from .label_set import LabelSet

_logger = logging.getLogger(__name__)

FLAG = '--teacher-classes'
AUTO = 'auto'
_NAMES_SHOWN = 5

# 'auto', a file, or what a file says: the teacher's classes of a student's class, each as name or index.
ClassChoice = Union[str, Mapping[Any, Any]]
Sources = Dict[int, Tuple[int, ...]]


@dataclass(frozen=True)
class ClassMatch:
    """Matching of a student's classes with those of a teacher.

    A file is one of three kinds. Lines with tabs hold a class of the student and the teacher's classes that make it
    up, each as name or index; classes that have no line are found by their names. Lines of whole numbers alone are
    the teacher's class of every class of the student, in the order of its labels. Else there is one line for every
    class of the teacher, its name, in the order of its logits.

    Attributes:
        names: Name of every class of the student in the order of its labels, '' for one without.
        by: 'auto' for names alone, a file, or a mapping that says what lines with tabs say.
    """
    names: Sequence[str]
    by: ClassChoice = AUTO

    def __str__(self) -> str:
        return f'{FLAG} {self.by if isinstance(self.by, str) else "{...}"}'

    def name(self, index: int) -> str:
        """Return a class of the student in words."""
        return _name(self.names, index)


class ClassMap(nn.Module):
    """Map of logits from the teacher's classes to the student's.

    Args:
        sources: The teacher's classes of every class of the student; empty for one that the teacher does not know.
        num_teacher_classes: Columns of the teacher's logits.
        names: Name of every class of the student.
        labels: Names of the teacher's classes.

    Attributes:
        known: The student's classes that the teacher knows, [M]; None where it knows them all.
    """
    known: Optional[torch.Tensor]

    def __init__(
            self,
            sources: Sequence[Sequence[int]],
            num_teacher_classes: int,
            names: Sequence[str] = (),
            labels: Optional[LabelSet] = None,
    ):
        super().__init__()
        self.names = tuple(names) or ('',) * len(sources)
        self.labels = labels
        self.sources = tuple(map(tuple, sources))
        self.num_teacher_classes = num_teacher_classes
        known = [index for index, classes in enumerate(self.sources) if classes]
        self.register_buffer('known', torch.tensor(known) if len(known) < len(self.sources) else None, persistent=False)
        self._widths: List[int] = []
        order = torch.full((len(self.sources),), len(known))  # of a class without source: the column behind the last
        taken = 0
        for width in sorted({_bucket(classes) for classes in self.sources if classes}):
            rows = [index for index, classes in enumerate(self.sources) if classes and _bucket(classes) == width]
            padded = [[*self.sources[i], *[num_teacher_classes] * (width - len(self.sources[i]))] for i in rows]
            self.register_buffer(f'columns{width}', torch.tensor(padded), persistent=False)
            order[rows] = torch.arange(taken, taken + len(rows))
            self._widths.append(width)
            taken += len(rows)
        self.register_buffer('order', order, persistent=False)

    @property
    def num_classes(self) -> int:
        """Classes of the student."""
        return len(self.sources)

    def plain_sources(self) -> Optional[List[List[int]]]:
        """Return the sources as plain lists, None where the map changes nothing."""
        if self.sources == tuple((index,) for index in range(self.num_teacher_classes)):
            return None
        return [list(classes) for classes in self.sources]

    def select(self, rows: torch.Tensor) -> Optional[torch.Tensor]:
        """Return what belongs to each class that the teacher knows, [M, ...] of [K of the teacher, ...].

        None where a class takes several of the teacher's.
        """
        taken = [classes for classes in self.sources if classes]
        return None if any(len(classes) > 1 for classes in taken) else rows[[classes[0] for classes in taken]]

    def describe(self) -> List[str]:
        """Return a line for each class of the student, with the teacher's; one name where both have the same."""
        texts = [_choices(classes, self.labels, ' + ') or 'none that the teacher knows' for classes in self.sources]
        names = [_name(self.names, index) for index in range(len(texts))]
        return [text if text.startswith(f'{name} (') else f'{name}: {text}' for name, text in zip(names, texts)]

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """Map the teacher's logits, [B, K of the teacher], to [B, K]; minus infinity for a class that it does not know.
        """
        padded = F.pad(logits, (0, 1), value=-torch.inf)
        # groups of about the same size together, each sum in an order that is always the same
        parts = [_sum_classes(padded[:, getattr(self, f'columns{width}')]) for width in self._widths]
        return torch.cat([*parts, padded[:, -1:]], dim=1)[:, self.get_buffer('order')]


def _bucket(classes: Sequence[int]) -> int:
    """Return the smallest power of two that is not below the number of classes."""
    return 1 << (len(classes) - 1).bit_length()


def _sum_classes(logits: torch.Tensor) -> torch.Tensor:
    """Add probabilities: [B, K, classes of each] -> [B, K]."""
    return logits[..., 0] if logits.shape[-1] == 1 else to_full_precision(logits).logsumexp(-1).to(logits.dtype)


def create_class_map(match: ClassMatch, num_teacher_classes: int, labels: Optional[LabelSet]) -> ClassMap:
    """Find the teacher's classes of every class of the student.

    Args:
        match: The student's classes, and what says which of the teacher's they are.
        num_teacher_classes: Columns of the teacher's logits.
        labels: Their names, None where nobody knows them.

    Raises:
        UsageError: For a teacher without classifier, a file that is missing or of no known kind, unknown or ambiguous
            names, a class of the teacher that is given to two, and a map that leaves fewer than two classes.
    """
    if not num_teacher_classes:
        raise UsageError(f'{match}: the teacher has no classifier, so there are no logits to restrict: leave it out.')
    given: Sources = {}
    if isinstance(match.by, Mapping):
        given = _read_mapping(match.by, match, num_teacher_classes, labels)
    elif match.by != AUTO:
        given, labels = _read_file(match.by, match, num_teacher_classes, labels)
    if not given:
        _check_names(match, num_teacher_classes, labels)
    found = {} if labels is None else _find_by_name(match, labels, given)
    sources = {**found, **given}
    _check_sources(match, sources, labels)
    in_order = [sources.get(index, ()) for index in range(len(match.names))]
    return ClassMap(in_order, num_teacher_classes, match.names, labels)


def _read_mapping(
        mapping: Mapping[Any, Any],
        match: ClassMatch,
        num_teacher_classes: int,
        labels: Optional[LabelSet],
) -> Sources:
    lists = {key: [value] if isinstance(value, (str, int)) else list(value) for key, value in mapping.items()}
    students = LabelSet(match.names, 'the data')
    given: Sources = {}
    for key, values in lists.items():
        index = _resolve(key, 'the student', len(match.names), students)
        if index in given:
            raise UsageError(f'{match} names the class {match.name(index)} of the student twice.')
        classes = [_resolve(value, 'the teacher', num_teacher_classes, labels) for value in values]
        given[index] = tuple(dict.fromkeys(classes))
    return given


def _resolve(text: Union[str, int], whose: str, count: int, labels: Optional[LabelSet]) -> int:
    """Return the index of a class by its name or index."""
    named = [] if labels is None or isinstance(text, int) else labels.find(text)
    exact = [index for index in named if labels is not None and labels.names[index] == text]
    named = exact or named
    index = int(text) if isinstance(text, int) or text.isdecimal() else None
    found = sorted({*named, *([] if index is None or not 0 <= index < count else [index])})
    if len(found) == 1:
        return found[0]
    if not found:
        known = f'its names are those of {labels.source}' if labels is not None else 'its names are not known'
        raise UsageError(
            f'{FLAG}: {text!r} is no class of {whose}, neither by name ({known}) nor by index (0 to {count - 1}).')
    raise UsageError(
        f'{FLAG}: {text!r} is ambiguous, it may be {_choices(found, labels)} of {whose}: name one of them.')


def _read_file(
        path: str,
        match: ClassMatch,
        num_teacher_classes: int,
        labels: Optional[LabelSet],
) -> Tuple[Sources, Optional[LabelSet]]:
    """Return what a file gives to classes of the student, and the names of the teacher's classes."""
    if not os.path.exists(path):
        raise UsageError(f"{FLAG} {path}: there is no such file; 'auto' finds the classes by their names.")
    lines = read_names(path, FLAG).rstrip(' \r\n').splitlines()
    if any('\t' in line for line in lines):
        return _read_mapping(_split_lines(lines, path), match, num_teacher_classes, labels), labels
    lines = [line.strip() for line in lines]
    if lines and all(line.isdecimal() for line in lines):
        if len(lines) != len(match.names):
            raise UsageError(
                f'{FLAG} {path} has {len(lines)} lines of indices, but the student has {len(match.names)} classes: '
                'give the class of the teacher for each, in the order of its labels.')
        whole = {index: int(line) for index, line in enumerate(lines)}
        return _read_mapping(whole, match, num_teacher_classes, None), labels
    if len(lines) != num_teacher_classes:
        raise UsageError(
            f'{FLAG} {path} has {len(lines)} lines without a tab, but the teacher has {num_teacher_classes} classes: '
            "give one name for each in the order of its logits, or lines 'class of the student', tab, 'class of the "
            "teacher'.")
    return {}, LabelSet([printable(line) for line in lines], path)


def _split_lines(lines: Sequence[str], path: str) -> Dict[str, List[str]]:
    entries: Dict[str, List[str]] = {}
    for number, line in enumerate(lines, 1):
        student, *teachers = [printable(part.strip()) for part in line.split('\t')]
        if not student and not any(teachers):
            continue
        if not student or student in entries or '\t' not in line:
            problem = 'names its class twice' if student in entries else 'has no tab' if student else 'names no class'
            raise UsageError(
                f"{FLAG} {path}: line {number} {problem}: give each class of the student one line, a tab and the "
                "teacher's classes.")
        entries[student] = [part for part in teachers if part]
    return entries


def _check_names(match: ClassMatch, num_teacher_classes: int, labels: Optional[LabelSet]) -> None:
    """Reject classes that have to be found by their names where one side has none."""
    if labels is None:
        raise UsageError(
            f"{match}: nothing names the teacher's {num_teacher_classes} classes, its weights do not, and no ImageNet "
            f'set has so many. Give {FLAG} FILE with one name a line, in the order of its logits.')
    if not any(match.names):
        raise UsageError(
            f'{match}: the data do not name their classes. Give {FLAG} FILE with one index a line, the class of the '
            'teacher for each of them in the order of their labels.')


def _find_by_name(match: ClassMatch, labels: LabelSet, given: Sources) -> Sources:
    found = {i: labels.find(name) for i, name in enumerate(match.names) if i not in given and name}
    ambiguous = [(match.name(i), classes) for i, classes in found.items() if len(classes) > 1]
    if ambiguous:
        name, classes = ambiguous[0]
        others = f' ({len(ambiguous) - 1} more names are ambiguous too)' if len(ambiguous) > 1 else ''
        raise UsageError(
            f'{match}: {name!r} may be {_choices(classes, labels)} of the teacher{others}. Give {FLAG} FILE with a '
            'line of that name, a tab and which it is.')
    return {index: tuple(classes) for index, classes in found.items() if classes}


def _check_sources(match: ClassMatch, sources: Sources, labels: Optional[LabelSet]) -> None:
    owners: Dict[int, int] = {}
    for index, source in [(index, source) for index, classes in sources.items() for source in classes]:
        if source in owners:
            raise UsageError(
                f"{match}: the teacher's class {_choices([source], labels)} is given to {match.name(owners[source])} "
                f'and to {match.name(index)}, which it cannot tell apart: give it to one of them.')
        owners[source] = index
    left = [index for index, classes in sources.items() if classes]
    if len(left) < 2:
        what = f'only {match.name(left[0])}' if left else 'no class'
        known = f', whose names are those of {labels.source}' if labels is not None else ''
        raise UsageError(
            f"{match} leaves {what} of the student's {len(match.names)} that the teacher knows{known}: give {FLAG} "
            'FILE with the classes that belong together, two at least, or use a method that reads features alone '
            '(--list-kd).')


def report_class_map(class_map: ClassMap) -> None:
    """Log a class map, and warn of the classes that the teacher does not know."""
    unknown = [_name(class_map.names, index) for index, classes in enumerate(class_map.sources) if not classes]
    used = sum(map(len, class_map.sources))
    source = f' ({class_map.labels.source})' if class_map.labels is not None else ''
    lines = class_map.describe()
    _logger.info(
        f"Teacher classes: {used} of {class_map.num_teacher_classes}{source} for {len(lines) - len(unknown)} of the "
        f"student's {len(lines)}: {_shorten(lines, '; ')}.")
    if unknown:
        _logger.warning(
            f"{len(unknown)} of the student's {len(lines)} classes are none that the teacher knows: "
            f'{_shorten(unknown, ", ")}. Its logits teach the others alone, and images of these count as wrong in its '
            f'accuracy; {FLAG} FILE gives them classes.')


def _name(names: Sequence[str], index: int) -> str:
    return str(printable(names[index])) or f'class {index}'


def _shorten(texts: Sequence[str], separator: str) -> str:
    return separator.join(texts[:_NAMES_SHOWN]) + (f'{separator}...' if len(texts) > _NAMES_SHOWN else '')


def _choices(classes: Sequence[int], labels: Optional[LabelSet], separator: str = ' or ') -> str:
    return _shorten([labels.describe(i) if labels is not None else str(i) for i in classes], separator)
