"""Class maps: the label of each class folder, from a text file of one name a line, and labels that no chance decides.

Pickled maps, which timm reads with restrictions, are refused: nothing that this package reads is unpickled.
"""
import logging
import os
from typing import Any, Dict, List, Optional, Sequence

from timm.utils.misc import natural_key

from ..errors import UsageError
from .decoding import check_regular_file

_logger = logging.getLogger(__name__)

_NAMES_SHOWN = 5


def read_class_map(path: str, folders: Sequence[str] = ()) -> Optional[Dict[str, int]]:
    """Read the labels by class name; None without a file.

    Args:
        path: Text file, from the working folder or inside one of `folders`.
        folders: Where else it may lie.

    Raises:
        UsageError: If there is no such file, or it is no list of different names.
    """
    if not path:
        return None
    found = next((p for p in [path, *(os.path.join(folder, path) for folder in folders)] if os.path.exists(p)), None)
    if found is None:
        raise UsageError(f'--class-map {path}: there is no such file, neither here nor in the dataset folder')
    if os.path.splitext(found)[1].lower() != '.txt':
        raise UsageError(
            f'--class-map {path} must be a text file NAME.txt with one class name a line, in the order of '
            'the labels; no other format is read, pickles least of all')
    return _number([line.strip() for line in read_names(found, '--class-map').rstrip().splitlines()], path)


def read_names(path: str, flag: str) -> str:
    """Return the text of a file of class names, which like the names of folders need not be UTF-8.

    Args:
        path: The file.
        flag: What named it, for messages.

    Raises:
        UsageError: If it cannot be read or is no text.
    """
    try:
        check_regular_file(path)
        with open(path, encoding='utf-8-sig', errors='surrogateescape') as file:
            text = file.read()
    except OSError as error:
        raise UsageError(f'{flag} {path} cannot be read: {error}') from error
    if '\0' in text:
        raise UsageError(f'{flag} {path} is no text in UTF-8: save it as such')
    return text


def _number(names: List[str], path: str) -> Dict[str, int]:
    for index, name in enumerate(names):
        if not name:
            raise UsageError(f'--class-map {path}: line {index + 1} is empty, and lines are labels: name its class')
    classes = {name: index for index, name in enumerate(names)}
    if len(classes) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UsageError(f'--class-map {path} names {_list(twice)} more than once: every class has one label')
    if not classes:
        raise UsageError(f'--class-map {path} names no class')
    return classes


def report_class_map(path: str, folder: str, classes: Dict[str, int], samples: Sequence[Any]) -> None:
    """Warn of class folders that a map leaves out, and of classes that have no folder.

    Args:
        path: The map.
        folder: Folder of the class folders.
        classes: Label by name.
        samples: (path, label) of every image.
    """
    start = len(folder.rstrip(os.sep)) + 1
    used = {sample[0][start:].partition(os.sep)[0] for sample in samples}
    with os.scandir(folder) as entries:
        left = sorted(entry.name for entry in entries if entry.is_dir() and entry.name not in used | set(classes))
    labels = {int(label) for _, label in samples}
    empty = sorted(name for name, index in classes.items() if index not in labels)
    if left:
        _logger.warning(f'--class-map {path} leaves out {len(left)} folders of {folder}: {_list(left)}.')
    if empty:
        _logger.warning(f'--class-map {path} names {len(empty)} classes without an image in {folder}: {_list(empty)}.')


def settle_order(reader: Any, has_class_map: bool) -> None:
    """Give a reader of class folders labels and an order that are the same in every process.

    timm sorts classes and files by a natural order, in which 'a' equals 'A' and '1' equals '01', from a set of strings
    and a list of the file system, both of random order.

    Args:
        reader: timm's, of folders or tar files; is changed.
        has_class_map: Its labels come from a file and stay.
    """
    name = 'class_to_idx' if hasattr(reader, 'class_to_idx') else 'class_name_to_idx'
    classes: Dict[str, int] = getattr(reader, name)
    ordered = {key: i for i, key in enumerate(sorted(classes, key=lambda key: (natural_key(key), key)))}
    if not has_class_map and len({tuple(natural_key(key)) for key in classes}) < len(classes):
        new = {classes[key]: index for key, index in ordered.items()}
        _relabel(reader, new)
        setattr(reader, name, ordered)
        _logger.warning(
            'Some class folders differ in upper and lower case or in leading zeros alone; their labels are '
            'in alphabetical order here, and by chance where timm itself reads them.')
    if isinstance(reader.samples, list):
        _settle_ties(reader.samples)


def _relabel(reader: Any, new: Dict[int, int]) -> None:
    if hasattr(reader, 'targets'):
        for index, label in enumerate(reader.targets):
            reader.targets[index] = new[int(label)]
        reader.class_idx_to_name = {new[index]: name for index, name in reader.class_idx_to_name.items()}
    else:
        reader.samples = [(path, new[label]) for path, label in reader.samples]


def _settle_ties(samples: List[Any]) -> None:
    """Sort files that are equal in natural order by their names, in place."""
    start = 0
    for end in range(1, len(samples) + 1):
        if end < len(samples) and _are_tied(samples[end - 1][0], samples[end][0]):
            continue
        if end - start > 1:
            samples[start:end] = sorted(samples[start:end])
        start = end


def _are_tied(a: str, b: str) -> bool:
    # the first comparison rules out most, the second is slow
    return a.replace('0', '').lower() == b.replace('0', '').lower() and natural_key(a) == natural_key(b)


def _list(names: Sequence[str]) -> str:
    return ', '.join(f"'{name}'" for name in names[:_NAMES_SHOWN]) + (', ...' if len(names) > _NAMES_SHOWN else '')
