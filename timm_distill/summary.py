"""`summary.csv`: one row per validated epoch, rewritten as a whole, so that a kill loses and doubles none."""
import csv
import io
import logging
import os
from typing import Any, Dict, List

from .storage import write_text

_logger = logging.getLogger(__name__)


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
            with open(path, newline='') as file:
                rows = [row for row in csv.DictReader(file) if None not in row and None not in row.values()]
            self.rows = [row for row in rows if row['epoch'].isdigit() and int(row['epoch']) < start_epoch]

    def add(self, row: Dict[str, Any]) -> None:
        """Add a row and write the file. Where the disk is full the row waits for the next one."""
        self.rows.append(row)
        try:
            write_text(self._to_csv(), self.path)
        except OSError as e:
            _logger.error(f'{self.path} could not be written ({e.strerror or e}), the next epoch tries again.')

    def _to_csv(self) -> str:
        text = io.StringIO(newline='')
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        writer = csv.DictWriter(text, columns, restval='')
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()
