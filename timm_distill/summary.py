"""`summary.csv`: one row per validated epoch, rewritten as a whole, so that a kill loses and doubles none.

Reads what a spreadsheet made of the file, too: semicolons or tabs, byte order marks, decimal commas, other columns.
"""
import csv
import io
import logging
import os
import shutil
from typing import Any, Dict, List, Optional, Tuple

from .checkpoint.file import why_unwritten, write_text

_logger = logging.getLogger(__name__)

__all__ = ['Summary', 'read_summary']

_BYTE_ORDER_MARKS = {b'\xff\xfe': 'utf-16', b'\xfe\xff': 'utf-16', b'\xef\xbb\xbf': 'utf-8-sig'}
_DELIMITERS = ',;\t'


class Summary:
    """The rows of a run.

    Args:
        path: The file; rows of a stopped run are taken over.
        start_epoch: Rows of this epoch and later ones are dropped, as they are written again.
    """

    def __init__(self, path: str, start_epoch: int = 0):
        self.path = path
        self.rows: List[Dict[str, Any]] = []
        if start_epoch and os.path.exists(path):
            self._take_over(start_epoch)

    def _take_over(self, start_epoch: int) -> None:
        rows, left_out = _read_rows(self.path)
        by_epoch = {row['epoch']: row for row in rows if int(row['epoch']) < start_epoch}
        self.rows = [by_epoch[epoch] for epoch in sorted(by_epoch, key=int)]
        if left_out:
            _logger.warning(f'{self.path} was changed by hand: {left_out}. The run goes on without that; '
                            f'{self._keep_copy()}.')

    def _keep_copy(self) -> str:
        """Keep the file as it is under another name; says where, in words."""
        copy = f'{self.path}.edited'
        try:
            shutil.copyfile(self.path, copy)
        except OSError as e:  # no file at all, or a full disk
            return f'it could not be kept as {copy} ({e.strerror or e})'
        return f'the file as it was is kept as {copy}'

    def add(self, row: Dict[str, Any]) -> None:
        """Add a row and write the file. Where the disk is full the row waits for the next one."""
        self.rows.append(row)
        try:
            write_text(self._to_csv(), self.path)
        except OSError as e:
            _logger.error(f'{self.path} could not be written ({why_unwritten(e)}), the next epoch tries again.')

    def _to_csv(self) -> str:
        text = io.StringIO(newline='')
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        writer = csv.DictWriter(text, columns, restval='')
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()


def read_summary(path: str) -> List[Dict[str, float]]:
    """Return the rows of a `summary.csv` as numbers; what is none is left out."""
    rows = []
    for row in _read_rows(path)[0]:
        values = {name: _number(value) for name, value in row.items()}
        rows.append({name: value for name, value in values.items() if value is not None})
    return rows


def _read_rows(path: str) -> Tuple[List[Dict[str, str]], str]:
    """Return the rows that belong to an epoch, as text, and what had to be left out, in words."""
    try:
        text = _decode(path)
    except (OSError, ValueError) as e:
        return [], f'it cannot be read ({e})'
    delimiter = max(_DELIMITERS, key=(text.splitlines() or [''])[0].count)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=''), delimiter=delimiter)
        lines = [(reader.line_num, row) for row in reader]
    except csv.Error as e:
        return [], f'it is no table ({e})'
    if 'epoch' not in (reader.fieldnames or ()):
        return [], 'it has no column "epoch"' if text.strip() else ''
    rows, bad = [], []
    for number, row in lines:
        epoch = _number(row['epoch'] or '')
        if None in row or None in row.values() or epoch is None or epoch != int(epoch):
            bad.append(str(number))
            continue
        values = {name: _point(value) if delimiter == ';' else value for name, value in row.items() if name}
        rows.append({**values, 'epoch': str(int(epoch))})
    return rows, f'line {", ".join(bad)} is not the row of an epoch' if bad else ''


def _decode(path: str) -> str:
    with open(path, 'rb') as file:
        data = file.read()
    encodings = [encoding for mark, encoding in _BYTE_ORDER_MARKS.items() if data.startswith(mark)]
    return data.decode(encodings[0] if encodings else 'utf-8')


def _point(value: str) -> str:
    """Write a number with a point where a spreadsheet wrote a comma; other text stays as it is."""
    changed = value.replace(',', '.')
    return changed if value.count(',') == 1 and _number(changed) is not None else value


def _number(value: str) -> Optional[float]:
    try:
        return float(value)
    except ValueError:
        return None
