"""A cache looked at as a whole: its tables, their damage, and several caches of the same made one."""
import json
import os
import shutil
from typing import Any, Dict, Iterator, List, Tuple

from ..errors import UsageError
from .header import Header, check_header, read_header
from .table import Table


def require_header(folder: str) -> Header:
    """Return the header of a cache.

    Raises:
        UsageError: If the folder holds none.
    """
    header = read_header(folder)
    if header is None:
        raise UsageError(f'{folder} holds no cache of targets: there is no cache.json in it')
    return header


def iter_tables(folder: str, writable: bool = False) -> Iterator[Tuple[str, Table]]:
    """Yield name and table of every form of an output that a cache holds."""
    header = require_header(folder)
    for name in sorted(os.listdir(folder)):
        row_bytes = _row_bytes(os.path.join(folder, name))
        if row_bytes:
            yield name, Table(os.path.join(folder, name), row_bytes, count_slots(header), writable)


def count_slots(header: Header) -> int:
    """Return how many views a cache is for."""
    return int(header['slots'])


def describe_cache(folder: str) -> List[str]:
    """Return what a cache holds and depends on, line by line."""
    header = require_header(folder)
    lines = [f'{folder}: {count_slots(header)} views']
    for name, table in iter_tables(folder):
        lines.append(f'  {name}: {table.count()} views, {table.row_bytes} bytes each, {len(table.shards())} shards')
        table.close()
    for section in ('teacher', 'views', 'versions'):
        values = {name: value for name, value in header[section].items() if value not in (None, False, {}, [])}
        lines.append(f'  {section}: ' + ', '.join(f'{name} {_text(value)}' for name, value in values.items()))
    data = header['data']
    return [*lines, f'  data: {data["num_samples"]} images in {len(data["groups"])} groups']


def verify_cache(folder: str, drop: bool = False) -> Dict[str, List[str]]:
    """Compare all checksums; returns the damaged shards of every table, taken out if `drop`."""
    damaged = {}
    for name, table in iter_tables(folder, writable=drop):
        damaged[name] = table.verify()[1]
        for path in damaged[name] if drop else []:
            table.drop(int(os.path.basename(path).split('.')[0]))
        table.close()
    return damaged


def merge_caches(folder: str, others: List[str]) -> Dict[str, int]:
    """Add what other caches of the same teacher, data and views hold; returns how many rows each table gained.

    Raises:
        UsageError: If one is of something else; names the difference.
    """
    first = require_header(others[0])
    header = read_header(folder)
    for other in others:
        check_header(other, require_header(other), header or first)
    if header is None:
        os.makedirs(folder, exist_ok=True)
        shutil.copy(os.path.join(others[0], 'cache.json'), folder)
    gained: Dict[str, int] = {}
    for other in others:
        for name, source in iter_tables(other):
            _copy_settings(other, folder, name)
            target = Table(os.path.join(folder, name), source.row_bytes, source.num_slots)
            gained[name] = gained.get(name, 0) + target.copy_from(source)
            target.close()
            source.close()
    return gained


def _copy_settings(other: str, folder: str, name: str) -> None:
    """Copy the size of channels that rows of 8 bits are in terms of.

    Raises:
        UsageError: If two caches have rows in terms of other sizes.
    """
    source, target = (os.path.join(root, name, 'spread.npy') for root in (other, folder))
    if not os.path.exists(source):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if not os.path.exists(target):
        shutil.copy(source, target)
    elif open(source, 'rb').read() != open(target, 'rb').read():
        raise UsageError(
            f'{name} of {other} and of {folder} hold channels in 8 bits of other sizes: they cannot be merged, fill '
            'one of them again, or use --cache-precision float16')


def _row_bytes(folder: str) -> int:
    """Return the length of the rows of a table by its first shard, 0 where the folder is none."""
    names = [name for name in sorted(os.listdir(folder)) if name.endswith('.rows')] if os.path.isdir(folder) else []
    for name in names:
        with open(os.path.join(folder, name), 'rb') as file:
            words = file.read(128).rstrip(b'\0').split(b'\n')
        if len(words) > 1 and words[1].split()[0].isdigit():
            return int(words[1].split()[0])
    return 0


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)
