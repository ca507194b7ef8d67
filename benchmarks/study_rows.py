"""Rows of a study: a CSV that grows by one row when a run ends, and those of step costs and teachers beside it."""
import csv
import fcntl
import os
import shlex
import subprocess
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Sequence, Tuple

from study_parts import REPO_DIR, Run

from timm_distill import UsageError

COLUMNS = (
    'student', 'setting', 'seed', 'top1', 'best_top1', 'calibration_error', 'seconds', 'epochs', 'curve', 'torch',
    'timm', 'timm_distill', 'commit', 'command', 'knn', 'linear_probe')
_LATER = ('knn', 'linear_probe')  # older files lack them
TEACHER_COLUMNS = ('teacher', 'model', 'top1', 'calibration_error', 'command')
COST_COLUMNS = ('student', 'setting', 'seconds_per_step', 'ratio_to_alone')


class Results:
    """Rows by student, setting and seed.

    Args:
        path: The CSV; need not exist.
    """

    def __init__(self, path: str):
        self.path = path
        self.cost_path = os.path.splitext(path)[0] + '.cost.csv'
        self.rows = _read(path, COLUMNS)
        self.teachers_path = os.path.splitext(path)[0] + '.teachers.csv'
        self.costs = _read(self.cost_path, COST_COLUMNS)
        self.teachers = _read(self.teachers_path, TEACHER_COLUMNS)

    def has(self, run: Run) -> bool:
        """Whether a run's row is there."""
        return _key(run.student, run.setting, run.seed) in {_key_of(row) for row in self.rows}

    def check(self, runs: Sequence[Run], output: str) -> None:
        """Raise a UsageError where a row is of another command than the plan's, or stands twice."""
        keys = [_key_of(row) for row in self.rows]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice:
            raise UsageError(f'{self.path} has two rows of {"-".join(twice)}: remove one.')
        commands = {_key(run.student, run.setting, run.seed): _flags(run.spelled(output)) for run in runs}
        for row in self.rows:
            planned = commands.get(_key_of(row))
            if planned is not None and planned != _flags(row['command']):
                changed = sorted(set(planned) ^ set(_flags(row['command'])))
                raise UsageError(
                    f'{self.path} has a row of {"-".join(_key_of(row))} with other flags than the plan '
                    f'({" ".join(changed)[:200]}): remove the row to run it again, or name the setting otherwise.')

    def add(self, row: Dict[str, Any]) -> None:
        """Append a row to the file, behind those that other studies have put there in the meantime."""
        with _alone_in_folder(self.path):
            self.rows = [*_read(self.path, COLUMNS), {key: str(value) for key, value in row.items()}]
            _write(self.path, COLUMNS, self.rows)

    def add_cost(self, student: str, setting: str, seconds: float, ratio: float) -> None:
        """Put down what a step costs, in place of what was measured before."""
        values = (student, setting, f'{seconds:.4f}', f'{ratio:.3f}')
        with _alone_in_folder(self.cost_path):
            others = [
                row for row in _read(self.cost_path, COST_COLUMNS)
                if (row['student'], row['setting']) != (student, setting)]
            self.costs = [*others, dict(zip(COST_COLUMNS, values))]
            _write(self.cost_path, COST_COLUMNS, self.costs)

    def add_teacher(self, name: str, model: str, top1: float, error: float, command: str) -> None:
        """Put down what a trained teacher has right on the study's validation images, in place of an older row."""
        values = (name, model, f'{top1:.3f}', f'{error:.4f}', command)
        with _alone_in_folder(self.teachers_path):
            others = [row for row in _read(self.teachers_path, TEACHER_COLUMNS) if row['teacher'] != name]
            self.teachers = [*others, dict(zip(TEACHER_COLUMNS, values))]
            _write(self.teachers_path, TEACHER_COLUMNS, self.teachers)

    def read_summary(self, path: str) -> List[Dict[str, str]]:
        """Return the epochs of a run."""
        with open(path, newline='') as f:
            return list(csv.DictReader(f))


def _read(path: str, columns: Sequence[str]) -> List[Dict[str, str]]:
    if not os.path.exists(path):
        return []
    with open(path, newline='', encoding='utf-8') as f:
        reader = csv.DictReader(f)
        rows = list(reader)
    names = tuple(reader.fieldnames or ())
    if rows and names == tuple(column for column in columns if column not in _LATER):
        return [{**row, **{column: '' for column in columns if column in _LATER}} for row in rows]
    if rows and names != tuple(columns):
        raise UsageError(f'{path} has other columns than a study writes: {", ".join(reader.fieldnames or ())}.')
    return rows


@contextmanager
def _alone_in_folder(path: str) -> Iterator[None]:
    """Keep other threads and studies from writing beside a file, whose folder is made."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _write(path: str, columns: Sequence[str], rows: Sequence[Dict[str, str]]) -> None:
    temporary = path + '.tmp'
    with open(temporary, 'w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, columns, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def _key(student: str, setting: str, seed: int) -> Tuple[str, str, str]:
    return student, setting, str(seed)


def _key_of(row: Dict[str, str]) -> Tuple[str, str, str]:
    return row['student'], row['setting'], row['seed']


def _flags(command: str) -> Tuple[str, ...]:
    """Return what of a command decides the numbers: of paths what is below the study's own folder, and where it is."""
    paths = ('--data-dir', '--output', '--teacher-checkpoint', '--pretrained-path', '--teacher-cache')
    words = shlex.split(command)
    output = words[words.index('--output') + 1]
    kept = []
    for before, word in zip(['', *words], words):
        if before not in paths:
            kept.append(word)
        elif word.startswith(output + os.sep):
            kept.append(word[len(output):])
    return tuple(kept)


def commit_id() -> str:
    """Return the commit of the checkout, '+' behind it where tracked files differ from it."""
    try:
        head, changes = (
            subprocess.run(['git', *command], cwd=REPO_DIR, check=True, capture_output=True, text=True).stdout.strip()
            for command in (['rev-parse', '--short', 'HEAD'], ['status', '--porcelain', '-uno', '--', '*.py']))
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'
    return head + ('+' if changes else '')
