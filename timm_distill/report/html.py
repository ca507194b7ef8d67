"""The report of a run: one HTML file that needs nothing else, and the same figures as one PNG."""
import base64
import importlib.util
import io
import math
import os
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

from jinja2 import Environment, PackageLoader

from ..utils.text import format_fact
from .predictions import Predictions, agreement, calibrate

_PAGE_DPI = 150  # screens have up to twice the pixels that a page counts
_SHEET_DPI = 110
_GROUPS = ('train_', 'eval_')  # prefixes of columns that a table puts under one heading


@dataclass
class ReportData:
    """Content of a report.

    Attributes:
        title: Headline.
        rows: Rows of `summary.csv`.
        student: Predictions of the released student on the validation set.
        teacher: Predictions of the teacher, of several by name; None without one on the same classes.
        class_names: Name of every class.
        times: Seconds of a training step by part: 'teacher', 'student', 'data'.
        facts: What else there is to know, in tables by heading.
        best_epoch: Epoch of the released student, counted from 0; None where it is not known.
        ema: Whether the released student's weights are averaged ones.
        command: What started the run.
        warnings: What the log warned of, in its order.
    """
    title: str
    rows: List[Dict[str, float]]
    student: Optional[Predictions] = None
    teacher: Union[Predictions, Mapping[str, Predictions], None] = None
    class_names: Sequence[str] = ()
    times: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    best_epoch: Optional[int] = None
    ema: bool = False
    command: str = ''
    warnings: Sequence[str] = ()


def can_draw() -> bool:
    """Whether matplotlib is installed (the extra `report`)."""
    return importlib.util.find_spec('matplotlib') is not None


def write_report(data: ReportData, folder: str) -> List[str]:
    """Write `report.html` and `report.png`.

    Returns:
        Their paths.
    """
    from .figures import draw_plot, draw_sheet, list_plots
    plots = list_plots(
        data.rows, data.student, data.teacher, data.class_names, data.times, data.best_epoch, data.ema)
    figures = [dict(title=plot.title, wide=plot.wide, image=_png(draw_plot(plot), _PAGE_DPI)) for plot in plots]
    paths = [os.path.join(folder, name) for name in ('report.html', 'report.png')]
    with open(paths[0], 'w', encoding='utf-8', errors='backslashreplace') as f:
        f.write(render_html(data, figures))
    with open(paths[1], 'wb') as f:
        f.write(_png(draw_sheet(plots, data.title), _SHEET_DPI))
    return paths


def _png(figure: Any, dpi: int) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=dpi)
    return buffer.getvalue()


def render_html(data: ReportData, figures: Sequence[Mapping[str, Any]]) -> str:
    """Return the report as a page.

    Args:
        data: What it shows.
        figures: Title, width ('wide': all columns) and 'image', a PNG that becomes part of the page, of each figure.
    """
    environment = Environment(loader=PackageLoader('timm_distill.report'), autoescape=True)
    return environment.get_template('report.html').render(
        title=data.title,
        weights=_describe_weights(data),
        headline=headline(data),
        command=data.command,
        warnings=data.warnings,
        figures=[{**figure, 'image': base64.b64encode(figure['image']).decode()} for figure in figures],
        epochs=epochs_table(data.rows, data.best_epoch),
        facts=_facts_tables(data.facts),
    )


def _describe_weights(data: ReportData) -> str:
    if not data.rows and data.student is None:
        return ''
    weights = 'the averaged weights (EMA)' if data.ema else 'the weights as trained (raw)'
    return weights if data.best_epoch is None else f'{weights} of epoch {data.best_epoch}, the best one'


def headline(data: ReportData) -> Dict[str, str]:
    """Return the few numbers that matter most, by what they are."""
    numbers: Dict[str, str] = {}
    if data.student is not None:
        numbers[f'student top-1, % ({"EMA" if data.ema else "raw"} weights)'] = f'{data.student.top1:.2f}'
    teachers = {'': data.teacher} if isinstance(data.teacher, Predictions) else data.teacher or {}
    for name, teacher in teachers.items():
        numbers[f'teacher {name}'.strip() + ' top-1, %'] = f'{teacher.top1:.2f}'
    for name, teacher in teachers.items() if data.student is not None else ():
        as_whom = f' as {name}' if name else ''
        numbers[f'same prediction{as_whom}, %'] = f'{agreement(data.student.classes, teacher.classes):.2f}'
    if data.student is not None:
        numbers['calibration error, %'] = f'{100 * calibrate(data.student).error:.1f}'
    numbers.update(_probe_numbers(data))
    if data.best_epoch is not None:
        numbers['best epoch, from 0'] = str(data.best_epoch)
    numbers['epochs validated'] = str(len(data.rows))
    return numbers


def _probe_numbers(data: ReportData) -> Dict[str, str]:
    """Return the newest probes of frozen features up to the best epoch, student's and teacher's."""
    names = {'eval_knn': 'k-NN top-1, %', 'eval_linear_probe': 'linear probe top-1, %', 'eval_cosine': 'cosine'}
    last = math.inf if data.best_epoch is None else data.best_epoch
    numbers = {}
    for column, label in names.items():
        own = column.replace('eval_', 'eval_teacher_')
        keys = dict.fromkeys(key for row in data.rows for key in row if key.partition('@')[0] in (column, own))
        for key in sorted(keys, key=lambda key: key.partition('@')[0] == own):
            values = [row[key] for row in data.rows if key in row and row['epoch'] <= last]
            who = f'{"teacher" if key.startswith(own) else "student"} {label} {key.partition("@")[2]}'.strip()
            if values:
                numbers[who] = f'{values[-1]:.4g}'
    return numbers


def epochs_table(rows: Sequence[Mapping[str, float]], best_epoch: Optional[int] = None) -> Dict[str, Any]:
    """Return the table of epochs.

    Args:
        rows: Rows of `summary.csv`.
        best_epoch: Which one to mark.

    Returns:
        'groups' (heading and number of columns), 'names' of the columns, and 'rows' of 'cells', 'best' for one.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    groups = [next((prefix for prefix in _GROUPS if name.startswith(prefix)), '') for name in columns]
    return {
        'groups': [(prefix.rstrip('_'), len(list(same))) for prefix, same in groupby(groups)],
        'names': [name[len(prefix):].replace('_', ' ') for name, prefix in zip(columns, groups)],
        'rows': [
            {'cells': [_number(row.get(name, math.nan)) for name in columns], 'best': row.get('epoch') == best_epoch}
            for row in rows],
    }


def _number(value: float) -> str:
    if math.isnan(value):
        return ''
    return str(int(value)) if value == int(value) and abs(value) < 1e6 else f'{value:.4g}'


def _facts_tables(facts: Mapping[str, Mapping[str, Any]]) -> Dict[str, Dict[str, str]]:
    """Return what is known under each heading, in words; what is empty is left out."""
    tables = {heading.capitalize(): {
        name: format_fact(value) for name, value in table.items()
        if value not in (None, '', {}, [])} for heading, table in facts.items() if table}
    return {heading: table for heading, table in tables.items() if table}
