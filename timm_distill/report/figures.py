"""The figures of a report, drawn with matplotlib. Knows tables of numbers and predictions, nothing of a run."""
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch
from matplotlib.figure import Figure

from .predictions import Predictions, calibrate, class_accuracies, confusion

_COLORS = {'student': '#1f77b4', 'ema': '#17becf', 'teacher': '#d62728', 'data': '#8c8c8c'}
_LINES = ('-', '--', ':', '-.')  # of several teachers
_LARGEST_MATRIX = 30  # classes of which a confusion matrix can still be read
_NAMED_CLASSES = 20
_WIDTH = 6.4  # inches of one of two columns
Row = Mapping[str, float]
_PROBES = {'eval_knn': 'nearest neighbours', 'eval_linear_probe': 'linear probe'}


@dataclass(frozen=True)
class Plot:
    """A figure that can be drawn by itself or as part of a sheet.

    Attributes:
        title: What it shows.
        draw: Draws into a figure or subfigure.
        height: Inches.
        wide: Whether it takes the width of two.
    """
    title: str
    draw: Callable[[Any], None]
    height: float = 4.
    wide: bool = False


def list_plots(
        rows: Sequence[Row],
        student: Optional[Predictions],
        teacher: Union[Predictions, Mapping[str, Predictions], None],
        class_names: Sequence[str],
        times: Mapping[str, float],
        best_epoch: Optional[int] = None,
        ema: bool = False,
) -> List[Plot]:
    """Return all plots that there are numbers for, in the order in which they are to be read.

    Args:
        rows: Rows of `summary.csv`.
        student: Predictions of the released student on the validation set.
        teacher: Predictions of the teacher, of several by name; None without one on the same classes.
        class_names: Name of every class.
        times: Seconds of a training step by part: 'teacher', 'student', 'data'.
        best_epoch: Epoch of the released student.
        ema: Whether its weights are averaged ones.
    """
    plots = []
    teachers = label_teachers(teacher)
    if _has(rows, 'eval_top1') or _has(rows, 'eval_agreement'):
        plots.append(Plot('Accuracy', partial(
            draw_accuracy, rows=rows, teachers=teachers, best_epoch=best_epoch), 5.2))
    if any(_has(rows, column) for column in _PROBES):
        plots.append(Plot('Frozen features', partial(draw_probes, rows=rows, best_epoch=best_epoch)))
    if _loss_names(rows):
        plots.append(Plot('Loss terms', partial(draw_losses, rows=rows, best_epoch=best_epoch), 5.2))
    if _has(rows, 'lr'):
        plots.append(Plot('Learning rate', partial(draw_rate, rows=rows, best_epoch=best_epoch), 2.6))
    if times:
        plots.append(Plot('Time of a training step', partial(draw_times, times=times), 2.6))
    if student is not None:
        models = {f'student, {"EMA" if ema else "raw"} weights': student, **teachers}
        plots.append(Plot('Calibration', partial(draw_calibration, models=models), 4.6, wide=len(models) > 1))
    if student is not None:
        for label, one in teachers.items():
            plots += _comparing_plots(student, one, class_names, label)
    return plots


def label_teachers(teacher: Union[Predictions, Mapping[str, Predictions], None]) -> Dict[str, Predictions]:
    """Return predictions by what figures call their teacher: 'teacher', or 'teacher NAME' where there are several."""
    if isinstance(teacher, Predictions):
        return {'teacher': teacher}
    return {f'teacher {name}'.strip(): predictions for name, predictions in (teacher or {}).items()}


def _comparing_plots(
        student: Predictions,
        teacher: Predictions,
        class_names: Sequence[str],
        label: str,
) -> List[Plot]:
    count = len(class_names)
    change = partial(draw_class_change, student=student, teacher=teacher, class_names=class_names)
    matrix = partial(draw_confusion, student=student, teacher=teacher, class_names=class_names)
    size = 2.4 + 0.34 * count if count <= _LARGEST_MATRIX else 1. + 0.28 * _NAMED_CLASSES
    return [
        Plot(f'Accuracy of each class against the {label}', change, 1.2 + 0.28 * min(count, _NAMED_CLASSES)),
        Plot(f'Predictions of {label} and student', matrix, size, wide=12 < count <= _LARGEST_MATRIX),
    ]


def draw_plot(plot: Plot) -> Figure:
    """Draw a plot by itself."""
    figure = Figure(figsize=(_WIDTH * (2 if plot.wide else 1), plot.height), layout='constrained')
    plot.draw(figure)
    return figure


def draw_sheet(plots: Sequence[Plot], title: str = '') -> Figure:
    """Draw all plots on one page, two in a row."""
    lines = _lines(plots)
    heights = [max(plot.height for plot in line) + 0.4 for line in lines]
    sheet = Figure(figsize=(2 * _WIDTH, sum(heights) + 0.5), layout='constrained')
    sheet.suptitle(_plain(title), fontsize=15)
    if not lines:
        return sheet
    parts = sheet.subfigures(len(lines), 1, height_ratios=heights, squeeze=False)
    for (part,), line in zip(parts, lines):
        figures = [part] if line[0].wide else list(part.subfigures(1, 2))
        for figure, plot in zip(figures, line):
            figure.suptitle(plot.title, fontsize=12, fontweight='bold')
            plot.draw(figure)
    return sheet


def _lines(plots: Sequence[Plot]) -> List[List[Plot]]:
    """Put the plots into lines of one wide or two others."""
    lines: List[List[Plot]] = []
    for plot in plots:
        if plot.wide or not lines or len(lines[-1]) == 2 or lines[-1][0].wide:
            lines.append([plot])
        else:
            lines[-1].append(plot)
    return lines


def _has(rows: Sequence[Row], name: str) -> bool:
    return any(name in row for row in rows)


def _values(rows: Sequence[Row], name: str) -> List[float]:
    return [row.get(name, math.nan) for row in rows]


def _style_axes(axes: Any) -> Any:
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(True, color='#e6e6e6', linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _axes(figure: Any) -> Any:
    return _style_axes(figure.subplots())


def _epochs(axes: Any, rows: Sequence[Row], best_epoch: Optional[int] = None) -> List[float]:
    """Return the values of the horizontal axis, and mark the best one."""
    axes.set_xlabel('epoch, from 0')
    axes.xaxis.get_major_locator().set_params(integer=True)
    if best_epoch is not None:
        axes.axvline(best_epoch, color='#444444', linewidth=1, linestyle=':', label=f'best epoch ({best_epoch})')
    return _values(rows, 'epoch')


def _style(rows: Sequence[Row]) -> Dict[str, Any]:
    return dict(marker='o', markersize=3) if len(rows) < 30 else {}  # a single epoch would draw no line


def draw_accuracy(
        figure: Any,
        rows: Sequence[Row],
        teachers: Mapping[str, Predictions],
        best_epoch: Optional[int] = None,
) -> None:
    """Draw top-1 of the student, its average and each teacher; below it the student's agreement with these."""
    agreements = [name for name in dict.fromkeys(key for row in rows for key in row) if _is_agreement(name)]
    with_agreement = bool(agreements)
    panels = figure.subplots(
        1 + with_agreement, 1, sharex=True, squeeze=False,
        height_ratios=(5, 3) if with_agreement else (1,))[:, 0]
    for axes in panels:
        _style_axes(axes)
        _epochs(axes, rows, best_epoch)
    raw, averaged = ('student, raw weights', 'student'), ('student, EMA weights', 'ema')
    series = {'eval_student_top1': raw, 'eval_top1': averaged if _has(rows, 'eval_student_top1') else raw}
    for column, (label, color) in series.items():
        if _has(rows, column):
            panels[0].plot(
                _values(rows, 'epoch'), _values(rows, column), label=label, color=_COLORS[color], **_style(rows))
    for number, (label, teacher) in enumerate(teachers.items()):
        panels[0].axhline(
            teacher.top1, color=_COLORS['teacher'], linewidth=1, linestyle=_LINES[number % len(_LINES)],
            label=f'{label} ({teacher.top1:.1f})')
    panels[0].set_ylabel('top-1, %')
    panels[0].legend(frameon=False)
    if with_agreement:
        panels[0].set_xlabel('')
        for number, column in enumerate(agreements):
            panels[1].plot(
                _values(rows, 'epoch'), _values(rows, column), color=_COLORS['data'],
                linestyle=_LINES[number % len(_LINES)], label=column.partition('@')[2], **_style(rows))
        panels[1].set_ylabel('same prediction\nas the teacher, %')
        if len(agreements) > 1:
            panels[1].legend(frameon=False)


def _is_agreement(column: str) -> bool:
    return column.partition('@')[0] == 'eval_agreement'


def draw_probes(figure: Any, rows: Sequence[Row], best_epoch: Optional[int] = None) -> None:
    """Draw the probes of the student's frozen features, dashed the teacher's; epochs without one are left out."""
    axes = _axes(figure)
    _epochs(axes, rows, best_epoch)
    for number, (column, label) in enumerate(_PROBES.items()):
        probed = [row for row in rows if column in row]
        if probed:
            axes.plot(_values(probed, 'epoch'), _values(probed, column), label=label, color=f'C{number}', marker='o')
        own = column.replace('eval_', 'eval_teacher_')
        for key in dict.fromkeys(key for row in rows for key in row if key.partition('@')[0] == own):
            value = [row[key] for row in rows if key in row][-1]
            teacher = f'teacher {key.partition("@")[2]}'.strip()
            axes.axhline(value, color=f'C{number}', linestyle='--', linewidth=1, label=f'{label}, {teacher}')
    axes.set_ylabel('top-1, %')
    axes.legend(frameon=False)


def _loss_names(rows: Sequence[Row]) -> List[str]:
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if name.startswith('train_') and name.endswith('loss')]


def draw_losses(figure: Any, rows: Sequence[Row], best_epoch: Optional[int] = None) -> None:
    """Draw every unweighted term of the training loss and their weighted sum, on a logarithmic axis where it can be."""
    axes, names = _axes(figure), _loss_names(rows)
    epochs = _epochs(axes, rows, best_epoch)
    for name in names:
        label, style = name[len('train_'):], _style(rows)
        if label == 'loss':
            label = 'total: weighted sum' if len(names) > 1 else 'loss'
            style = {**style, 'color': '#222222', 'linewidth': 2., 'linestyle': '--' if len(names) > 1 else '-'}
        axes.plot(epochs, _values(rows, name), label=label, **style)
    if all(row[name] > 0 for row in rows for name in names if name in row):
        axes.set_yscale('log')
    axes.set_ylabel('training loss; terms before their weights' if len(names) > 1 else 'training loss')
    axes.legend(frameon=False)


def draw_rate(figure: Any, rows: Sequence[Row], best_epoch: Optional[int] = None) -> None:
    """Draw the learning rate."""
    axes = _axes(figure)
    epochs = _epochs(axes, rows, best_epoch)
    axes.plot(epochs, _values(rows, 'lr'), color=_COLORS['student'], **_style(rows))
    axes.set_ylabel('learning rate')


def draw_times(figure: Any, times: Mapping[str, float]) -> None:
    """Draw what a training step is made of as one bar."""
    axes = _axes(figure)
    total, left = sum(times.values()), 0.
    for name, seconds in times.items():
        axes.barh(
            [''], [seconds], left=left, color=_COLORS.get(name, '#444444'),
            label=f'{name} {1000 * seconds:.0f} ms ({100 * seconds / max(total, 1e-12):.0f} %)')
        left += seconds
    axes.set_yticks([])
    axes.set_xlabel('seconds')
    axes.legend(frameon=False, ncols=len(times), loc='lower center', bbox_to_anchor=(0.5, 1.))


def draw_calibration(figure: Any, models: Mapping[str, Predictions]) -> None:
    """Draw accuracy by confidence for each model, pale where few images stand behind a bar, and how many those are."""
    panels = figure.subplots(2, len(models), sharex=True, sharey='row', squeeze=False, height_ratios=(3, 1))
    for (top, bottom), (name, predictions) in zip(panels.T, models.items()):
        _draw_reliability(_style_axes(top), _style_axes(bottom), name, predictions)
    panels[0, 0].set_ylabel('share of right predictions')
    panels[1, 0].set_ylabel('images, %')


def _draw_reliability(top: Any, bottom: Any, name: str, predictions: Predictions) -> None:
    calibration = calibrate(predictions)
    share = calibration.count / max(int(calibration.count.sum()), 1)
    width = 1 / len(share)
    color = _COLORS['teacher' if name.partition(' ')[0] == 'teacher' else 'student']
    top.plot([0, 1], [0, 1], color='#666666', linewidth=1, linestyle='--')
    for i, part in enumerate(share.tolist()):
        if part:
            opacity = 0.12 + 0.88 * (part / float(share.max())) ** 0.5
            top.bar((i + 0.5) * width, float(calibration.accuracy[i]), 0.92 * width, color=color, alpha=opacity)
    bottom.bar([(i + 0.5) * width for i in range(len(share))], (100 * share).tolist(), 0.92 * width, color=color)
    top.set_title(f'{name}: expected error {100 * calibration.error:.1f} %', fontsize=10)
    top.set(xlim=(0, 1), ylim=(0, 1.02))
    bottom.set_xlabel('confidence')


def draw_class_change(
        figure: Any,
        student: Predictions,
        teacher: Predictions,
        class_names: Sequence[str],
) -> None:
    """Draw how far each class's accuracy is above or below the teacher's; the ends alone, where there are many."""
    change = class_accuracies(student, len(class_names)) - class_accuracies(teacher, len(class_names))
    order = [int(i) for i in change.argsort() if not math.isnan(change[i])]
    if len(order) > _NAMED_CLASSES:
        order = order[:_NAMED_CLASSES // 2] + order[-_NAMED_CLASSES // 2:]
    axes = _axes(figure)
    values = [float(change[i]) for i in order]
    colors = [_COLORS['student'] if value >= 0 else _COLORS['teacher'] for value in values]
    axes.barh(range(len(order)), values, color=colors)
    axes.set_yticks(range(len(order)), [_short(class_names[i]) for i in order])
    axes.axvline(0, color='#444444', linewidth=1)
    axes.set_xlabel("student's accuracy minus the teacher's, percentage points")


def draw_confusion(figure: Any, student: Predictions, teacher: Predictions, class_names: Sequence[str]) -> None:
    """Draw how often the student predicts one class where the teacher predicts another."""
    matrix = confusion(teacher.classes, student.classes, len(class_names))
    if len(class_names) <= _LARGEST_MATRIX:
        _draw_matrix(figure, matrix, class_names)
        return
    pairs = _largest_disagreements(matrix)
    axes = _axes(figure)
    labels = [f'{_short(class_names[i])} → {_short(class_names[j])}' for i, j in pairs]
    axes.barh(range(len(pairs)), [int(matrix[i, j]) for i, j in pairs][::-1], color=_COLORS['student'])
    axes.set_yticks(range(len(pairs)), labels[::-1])
    axes.set_xlabel("images (teacher's prediction → student's)")


def _short(name: str) -> str:
    """Return a class name that leaves room for the figure, and that matplotlib does not take for a formula."""
    return _plain(name if len(name) <= 24 else f'{name[:23]}…')


def _plain(text: str) -> str:
    return text.encode('utf-8', 'replace').decode().replace('$', r'\$')


def _largest_disagreements(matrix: torch.Tensor) -> List[Tuple[int, int]]:
    off_diagonal = matrix.clone().fill_diagonal_(0).flatten()
    values, index = off_diagonal.topk(min(_NAMED_CLASSES, off_diagonal.numel()))
    return [divmod(int(i), len(matrix)) for v, i in zip(values, index) if v > 0]


def _draw_matrix(figure: Any, matrix: torch.Tensor, class_names: Sequence[str]) -> None:
    axes = _axes(figure)
    axes.grid(False)
    share = matrix / matrix.sum(dim=1, keepdim=True).clamp_min(1)
    image = axes.imshow(share.tolist(), cmap='Blues', vmin=0, vmax=1)
    names = [_short(name) for name in class_names]
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="student's prediction", ylabel="teacher's prediction")
    if len(names) <= 15:
        for i, row in enumerate(matrix.tolist()):
            for j, count in enumerate(row):
                if count:
                    axes.text(
                        j, i, str(count), ha='center', va='center', fontsize=7,
                        color='white' if share[i, j] > 0.5 else '#222222')
    figure.colorbar(image, ax=axes, label="share of the teacher's", shrink=0.8)
