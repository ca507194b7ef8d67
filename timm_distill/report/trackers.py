"""Trackers of a run: summary.csv, TensorBoard, Weights & Biases."""
import argparse
import csv
import importlib.util
import io
import logging
import os
import shutil
from typing import Any, Dict, List, Optional, Tuple, Union

from ..checkpoint.file import why_unwritten, write_text
from ..errors import UsageError

_logger = logging.getLogger(__name__)


class WandbLog:
    """A run of Weights & Biases.

    Args:
        args: Training arguments, kept as the run's configuration.
        name: Name of the run.
    """

    def __init__(self, args: argparse.Namespace, name: str):
        import wandb
        try:
            self.run = wandb.init(
                project=args.wandb_project,
                name=name,
                config=vars(args),
                tags=args.wandb_tags,
                resume='must' if args.wandb_resume_id else None,
                id=args.wandb_resume_id or None,
            )
        except wandb.errors.Error as e:
            raise UsageError(f'--log-wandb: the run cannot be started: {" ".join(str(e).split())}') from e

    def log(
            self,
            epoch: int,
            train_metrics: Dict[str, float],
            eval_metrics: Optional[Dict[str, float]],
            lr: float,
    ) -> None:
        """Log one epoch under the names of `summary.csv`."""
        row: Dict[str, Any] = {'epoch': epoch}
        row.update({f'train_{name}': value for name, value in train_metrics.items()})
        row.update({f'eval_{name}': value for name, value in (eval_metrics or {}).items()})
        self.run.log({**row, 'lr': lr})

    def finish(self) -> None:
        """End the run."""
        self.run.finish()


class TensorBoardLog:
    """Scalars of a run for TensorBoard.

    Args:
        folder: Where the event files go.
        start_epoch: First epoch of this run; what an interrupted one wrote from there on is hidden.

    Raises:
        UsageError: If the package is not installed.
    """

    def __init__(self, folder: str, start_epoch: int = 0):
        if importlib.util.find_spec('tensorboard') is None:
            raise UsageError(
                "--log-tensorboard needs the package tensorboard: pip install "
                "'timm_distill[tensorboard]', or leave the flag out.")
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(folder, purge_step=start_epoch or None)

    def log(
            self,
            epoch: int,
            train_metrics: Dict[str, float],
            eval_metrics: Optional[Dict[str, float]],
            lr: float,
    ) -> None:
        """Write one epoch, training and validation each under a heading, and flush: a killed run loses none."""
        for heading, metrics in (('train', train_metrics), ('eval', eval_metrics or {})):
            for name, value in metrics.items():
                self.writer.add_scalar(f'{heading}/{name}', value, epoch)
        self.writer.add_scalar('lr', lr, epoch)
        self.writer.flush()

    def finish(self) -> None:
        """Close the files."""
        self.writer.close()


def start_trackers(
        args: argparse.Namespace,
        name: str,
        folder: str,
        start_epoch: int = 0,
) -> List[Union[WandbLog, TensorBoardLog]]:
    """Return what `--log-wandb` and `--log-tensorboard` ask for.

    Args:
        args: Training arguments.
        name: Name of the run.
        folder: Folder of the run.
        start_epoch: First epoch of the run.

    Raises:
        UsageError: If a tracker cannot be started.
    """
    trackers: List[Union[WandbLog, TensorBoardLog]] = []
    wandb = start_wandb(args, name)
    if wandb is not None:
        trackers.append(wandb)
    if args.log_tensorboard:
        trackers.append(TensorBoardLog(folder, start_epoch))
    return trackers


def start_wandb(args: argparse.Namespace, name: str) -> Optional[WandbLog]:
    """Return the run that `--log-wandb` asks for; None where it does not, or where the package is missing."""
    if not args.log_wandb:
        return None
    try:
        return WandbLog(args, name)
    except ImportError:
        _logger.warning('--log-wandb: the package wandb is not installed (pip install wandb), nothing is logged there.')
        return None


_BYTE_ORDER_MARKS = {b'\xff\xfe': 'utf-16', b'\xfe\xff': 'utf-16', b'\xef\xbb\xbf': 'utf-8-sig'}
_DELIMITERS = ',;\t'


class Summary:
    """The rows of a run.

    Attributes:
        unwritten: Why the file lacks rows, '' where it has all.

    Args:
        path: The file; rows of a stopped run are taken over.
        start_epoch: Rows of this epoch and later ones are dropped, as they are written again.
    """

    def __init__(self, path: str, start_epoch: int = 0):
        self.path = path
        self.rows: List[Dict[str, Any]] = []
        self.unwritten = ''
        if start_epoch and os.path.exists(path):
            self._take_over(start_epoch)

    def _take_over(self, start_epoch: int) -> None:
        rows, left_out = _read_rows(self.path)
        by_epoch = {row['epoch']: row for row in rows if int(row['epoch']) < start_epoch}
        self.rows = [by_epoch[epoch] for epoch in sorted(by_epoch, key=int)]
        if left_out:
            _logger.warning(
                f'{self.path} was changed by hand: {left_out}. The run goes on without that; '
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
        self.write()
        if self.unwritten:
            _logger.error(f'{self.path} could not be written ({self.unwritten}), the next epoch tries again.')

    def write(self) -> None:
        """Write the file with all rows, or note in `unwritten` why it could not be."""
        self.unwritten = ''
        try:
            write_text(self._to_csv(), self.path)
        except OSError as e:
            self.unwritten = why_unwritten(e)

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
