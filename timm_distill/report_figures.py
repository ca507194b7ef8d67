"""The figures of a report, drawn with matplotlib. Knows tables of numbers and predictions, nothing of a run."""
import math
from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch
from matplotlib.figure import Figure

from .analysis import Predictions, calibrate, class_accuracies, confusion

_COLORS = {'student': '#1f77b4', 'ema': '#17becf', 'teacher': '#d62728', 'data': '#8c8c8c'}
_LARGEST_MATRIX = 30  # classes of which a confusion matrix can still be read
_NAMED_CLASSES = 20
Row = Mapping[str, float]


def draw_figures(
        rows: Sequence[Row],
        student: Optional[Predictions],
        teacher: Optional[Predictions],
        class_names: Sequence[str],
        times: Mapping[str, float],
) -> Dict[str, Figure]:
    """Draw all figures that there are numbers for.

    Args:
        rows: Rows of `summary.csv`.
        student: Predictions of the released student on the validation set.
        teacher: Predictions of the teacher, None without one on the same classes.
        class_names: Name of every class.
        times: Seconds of a training step by part: 'teacher', 'student', 'data'.

    Returns:
        Figures by title, in the order in which they are to be read.
    """
    figures: Dict[str, Optional[Figure]] = {
        'Accuracy': draw_accuracy(rows, teacher),
        'Loss terms': draw_losses(rows),
        'Learning rate': draw_rate(rows),
    }
    if times:
        figures['Time of a training step'] = draw_times(times)
    if student is not None:
        figures['Calibration'] = draw_calibration({'student': student, **({'teacher': teacher} if teacher else {})})
    if student is not None and teacher is not None:
        figures['Accuracy of each class against the teacher'] = draw_class_change(student, teacher, class_names)
        figures['Predictions of teacher and student'] = draw_confusion(student, teacher, class_names)
    return {title: figure for title, figure in figures.items() if figure is not None}


def _figure(width: float = 6.4, height: float = 4.) -> Any:
    figure = Figure(figsize=(width, height), layout='constrained')
    axes = figure.subplots()
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(True, color='#e6e6e6', linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _epochs(axes: Any, rows: Sequence[Row]) -> List[float]:
    axes.set_xlabel('epoch')
    axes.xaxis.get_major_locator().set_params(integer=True)
    return [row['epoch'] for row in rows]


def _style(rows: Sequence[Row]) -> Dict[str, Any]:
    return dict(marker='o', markersize=3) if len(rows) < 30 else {}  # a single epoch would draw no line


def draw_accuracy(rows: Sequence[Row], teacher: Optional[Predictions]) -> Optional[Figure]:
    """Draw top-1 of the student, its average and the teacher, and the student's agreement with the teacher."""
    series = {'eval_student_top1': ('student', 'student'), 'eval_top1': ('student', 'student'),
              'eval_agreement': ('agrees with the teacher', 'data')}
    if any('eval_student_top1' in row for row in rows):
        series['eval_top1'] = ('EMA of the student', 'ema')
    figure, axes = _figure()
    epochs = _epochs(axes, rows)
    drawn = False
    for column, (label, color) in series.items():
        if rows and column in rows[0]:
            # wide and pale, since a good student agrees about as often as it is right
            style = dict(linewidth=5, alpha=0.4) if column == 'eval_agreement' else _style(rows)
            axes.plot(epochs, [row.get(column, math.nan) for row in rows], label=label, color=_COLORS[color], **style)
            drawn = True
    if teacher is not None:
        axes.axhline(teacher.top1, color=_COLORS['teacher'], linewidth=1, label=f'teacher ({teacher.top1:.1f})')
    if not drawn:
        return None
    axes.set_ylabel('top-1, %')
    axes.legend(frameon=False)
    return figure


def draw_losses(rows: Sequence[Row]) -> Optional[Figure]:
    """Draw every term of the training loss, relative scales kept on a logarithmic axis."""
    names = [name for name in (rows[0] if rows else ()) if name.startswith('train_') and name.endswith('loss')]
    if not names:
        return None
    figure, axes = _figure()
    epochs = _epochs(axes, rows)
    for name in names:
        label = name[len('train_'):]
        width = 2.2 if label == 'loss' else 1.4
        axes.plot(epochs, [row[name] for row in rows], label=label, linewidth=width, **_style(rows))
    if all(row[name] > 0 for row in rows for name in names):
        axes.set_yscale('log')
    axes.set_ylabel('loss, unweighted terms')
    axes.legend(frameon=False)
    return figure


def draw_rate(rows: Sequence[Row]) -> Optional[Figure]:
    """Draw the learning rate."""
    if not rows or 'lr' not in rows[0]:
        return None
    figure, axes = _figure(height=2.6)
    axes.plot(_epochs(axes, rows), [row['lr'] for row in rows], color=_COLORS['student'], **_style(rows))
    axes.set_ylabel('learning rate')
    return figure


def draw_times(times: Mapping[str, float]) -> Figure:
    """Draw what a training step is made of as one bar."""
    figure, axes = _figure(height=1.9)
    total, left = sum(times.values()), 0.
    for name, seconds in times.items():
        axes.barh([''], [seconds], left=left, color=_COLORS.get(name, '#444444'),
                  label=f'{name} {1000 * seconds:.0f} ms ({100 * seconds / max(total, 1e-12):.0f} %)')
        left += seconds
    axes.set_xlabel('seconds')
    axes.legend(frameon=False, ncols=len(times), loc='lower center', bbox_to_anchor=(0.5, 1.))
    return figure


def draw_calibration(models: Mapping[str, Predictions]) -> Figure:
    """Draw accuracy over confidence; the more images a dot stands for, the larger it is."""
    figure, axes = _figure(5., 4.6)
    axes.plot([0, 1], [0, 1], color='#bbbbbb', linewidth=1)
    for name, predictions in models.items():
        calibration = calibrate(predictions)
        filled = calibration.count > 0
        confidence, accuracy = calibration.confidence[filled].tolist(), calibration.accuracy[filled].tolist()
        sizes = (8 + 60 * calibration.count[filled] / calibration.count.max()).tolist()
        axes.plot(confidence, accuracy, color=_COLORS[name], linewidth=1.2,
                  label=f'{name}, expected error {100 * calibration.error:.1f} %')
        axes.scatter(confidence, accuracy, sizes, color=_COLORS[name])
    axes.set(xlabel='confidence', ylabel='share of right predictions', xlim=(0, 1.02), ylim=(0, 1.02), aspect='equal')
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc='outside lower center')
    return figure


def draw_class_change(student: Predictions, teacher: Predictions, class_names: Sequence[str]) -> Figure:
    """Draw how far each class's accuracy is above or below the teacher's; the ends alone, where there are many."""
    change = class_accuracies(student, len(class_names)) - class_accuracies(teacher, len(class_names))
    order = [int(i) for i in change.argsort() if not math.isnan(change[i])]
    if len(order) > _NAMED_CLASSES:
        order = order[:_NAMED_CLASSES // 2] + order[-_NAMED_CLASSES // 2:]
    figure, axes = _figure(6.4, 1. + 0.28 * len(order))
    values = [float(change[i]) for i in order]
    colors = [_COLORS['student'] if value >= 0 else _COLORS['teacher'] for value in values]
    axes.barh(range(len(order)), values, color=colors)
    axes.set_yticks(range(len(order)), [class_names[i] for i in order])
    axes.axvline(0, color='#444444', linewidth=1)
    axes.set_xlabel("student's accuracy minus the teacher's, percentage points")
    return figure


def draw_confusion(student: Predictions, teacher: Predictions, class_names: Sequence[str]) -> Figure:
    """Draw how often the student predicts one class where the teacher predicts another."""
    matrix = confusion(teacher.classes, student.classes, len(class_names))
    if len(class_names) <= _LARGEST_MATRIX:
        return _draw_matrix(matrix, class_names)
    pairs = _largest_disagreements(matrix)
    figure, axes = _figure(6.4, 1. + 0.28 * len(pairs))
    labels = [f'{class_names[i]} → {class_names[j]}' for i, j in pairs]
    axes.barh(labels[::-1], [int(matrix[i, j]) for i, j in pairs][::-1], color=_COLORS['student'])
    axes.set_xlabel("images (teacher's prediction → student's)")
    return figure


def _largest_disagreements(matrix: torch.Tensor) -> List[Any]:
    off_diagonal = matrix.clone().fill_diagonal_(0).flatten()
    values, index = off_diagonal.topk(min(_NAMED_CLASSES, off_diagonal.numel()))
    return [divmod(int(i), len(matrix)) for v, i in zip(values, index) if v > 0]


def _draw_matrix(matrix: torch.Tensor, class_names: Sequence[str]) -> Figure:
    size = 2.4 + 0.34 * len(class_names)
    figure, axes = _figure(size + 0.6, size)
    axes.grid(False)
    share = matrix / matrix.sum(dim=1, keepdim=True).clamp_min(1)
    image = axes.imshow(share.tolist(), cmap='Blues', vmin=0, vmax=1)
    axes.set_xticks(range(len(class_names)), class_names, rotation=90)
    axes.set_yticks(range(len(class_names)), class_names)
    axes.set(xlabel="student's prediction", ylabel="teacher's prediction")
    if len(class_names) <= 15:
        for i, row in enumerate(matrix.tolist()):
            for j, count in enumerate(row):
                if count:
                    axes.text(j, i, str(count), ha='center', va='center', fontsize=7,
                              color='white' if share[i, j] > 0.5 else '#222222')
    figure.colorbar(image, ax=axes, label="share of the teacher's", shrink=0.8)
    return figure
