"""The report of a run: it shows the numbers, needs nothing else, and never costs a run."""
import io
import logging
import re
import warnings
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch
from PIL import Image

import train_distill
from timm_distill.engine.train_log import collect_warnings
from timm_distill.report import html as report
from timm_distill.report.html import ReportData, epochs_table, render_html, write_report
from timm_distill.report.predictions import Predictions
from timm_distill.report.trackers import read_summary
from timm_distill.run import report as closing

pytest.importorskip('matplotlib', reason='the report extra is not installed')
from timm_distill.report.figures import draw_plot, list_plots  # noqa: E402

ROWS = [
    {
        'epoch': 0, 'train_loss': 2., 'train_norm_loss': 1., 'eval_top1': 20., 'eval_student_top1': 15.,
        'eval_agreement': 25., 'lr': 0.1},
    {
        'epoch': 1, 'train_loss': 1., 'train_norm_loss': .5, 'eval_top1': 40., 'eval_student_top1': 35.,
        'eval_agreement': 45., 'lr': 0.05},
]


def create_data(num_classes: int = 4, **kwargs: Any) -> ReportData:
    torch.manual_seed(0)
    labels = torch.arange(40) % num_classes
    student, teacher = (
        Predictions(torch.randint(num_classes, (40,)), torch.rand(40), labels) for _ in range(2))
    values: Dict[str, Any] = dict(
        title='<student> from teacher', rows=ROWS, student=student, teacher=teacher,
        class_names=[f'class {i}' for i in range(num_classes)], times={'teacher': 1., 'student': 2., 'data': .1},
        facts={'training': {'kd': 'norm', 'kd_weight': {'norm': 1, 'kd': 0.5}}}, best_epoch=1, ema=True,
        command="train_distill.py --data-dir 'my images'", warnings=['<b>few</b> images'])
    return ReportData(**{**values, **kwargs})


@pytest.mark.parametrize('num_classes', [4, 35], ids=['matrix', 'largest_pairs'])
def test_a_report_shows_every_figure_and_needs_no_other_file(num_classes: int, tmp_path: Path) -> None:
    paths = write_report(create_data(num_classes), str(tmp_path))
    page = Path(paths[0]).read_text()
    for title in (
            'Accuracy', 'Loss terms', 'Learning rate', 'Time of a training step', 'Calibration',
            'Accuracy of each class against the teacher', 'Predictions of teacher and student', 'Epochs'):
        assert f'<h2>{title}</h2>' in page, title
    assert '&lt;student&gt;' in page and '<student>' not in page
    assert set(re.findall(r'(?:src|href)="([^"]{0,10})', page)) == {'data:image'}
    assert not re.findall(r'https?://', page)
    assert Image.open(io.BytesIO(Path(paths[1]).read_bytes())).size > (600, 600)


def axes_of(data: ReportData, title: str) -> List[Any]:
    """Draw one plot of a report and return its axes."""
    plots = list_plots(data.rows, data.student, data.teacher, data.class_names, data.times, data.best_epoch, data.ema)
    return draw_plot(next(plot for plot in plots if plot.title == title)).axes


def lines_of(axes: Any) -> Dict[str, Any]:
    return {line.get_label(): line for line in axes.get_lines()}


def test_agreement_has_an_axis_of_its_own() -> None:
    accuracy, agreement = axes_of(create_data(), 'Accuracy')
    assert 'same prediction' in agreement.get_ylabel() and accuracy.get_ylabel() == 'top-1, %'
    assert any(list(line.get_ydata()) == [25., 45.] for line in agreement.get_lines())
    assert not any(list(line.get_ydata()) == [25., 45.] for line in accuracy.get_lines())
    assert {'student, raw weights', 'student, EMA weights', 'best epoch (1)'} <= set(lines_of(accuracy))


def test_without_averaged_weights_the_student_s_are_called_raw() -> None:
    rows = [{name: value for name, value in row.items() if name != 'eval_student_top1'} for row in ROWS]
    data = create_data(rows=rows, ema=False)
    assert 'student, EMA weights' not in lines_of(axes_of(data, 'Accuracy')[0])
    page = render_html(data, [])
    assert 'raw weights)' in page and 'EMA' not in page
    assert '(EMA weights)' in render_html(create_data(), [])


def test_the_best_epoch_is_marked_wherever_epochs_are() -> None:
    for title in ('Accuracy', 'Loss terms', 'Learning rate'):
        for axes in axes_of(create_data(), title):
            assert lines_of(axes)['best epoch (1)'].get_xdata()[0] == 1
    page = render_html(create_data(), [])
    assert page.count('<tr class="best">') == 1 and 'of epoch 1, the best one' in page


def test_the_weighted_sum_is_told_from_the_terms() -> None:
    (axes,) = axes_of(create_data(), 'Loss terms')
    total, term = lines_of(axes)['total: weighted sum'], lines_of(axes)['norm_loss']
    assert total.get_linestyle() != term.get_linestyle()
    (axes,) = axes_of(create_data(rows=[{'epoch': 0, 'train_loss': 1.}]), 'Loss terms')
    assert 'loss' in lines_of(axes) and axes.get_ylabel() == 'training loss'


def test_bars_of_few_images_are_pale_and_no_line_joins_the_bins() -> None:
    labels = torch.zeros(103, dtype=torch.long)
    confidences = torch.cat([torch.full((100,), 0.95), torch.full((3,), 0.5)])
    model = Predictions(labels, confidences, labels)
    top, bottom = axes_of(create_data(student=model, teacher=None), 'Calibration')
    assert len(top.get_lines()) == 1  # the diagonal
    few, many = top.patches
    assert few.get_x() < many.get_x() and few.get_alpha() < 0.4 < many.get_alpha() == 1
    assert sum(bar.get_height() for bar in bottom.patches) == pytest.approx(100.)


def test_the_table_of_epochs_keeps_every_column_and_groups_them() -> None:
    rows = [
        {'epoch': 0, 'train_loss': 1., 'eval_top1': 20., 'lr': 1e-5},
        {'epoch': 1, 'train_loss': 0.123456789, 'train_kd_loss': float('nan'), 'eval_top1': 21., 'lr': 1e-5}]
    table = epochs_table(rows, best_epoch=1)
    assert table['names'] == ['epoch', 'loss', 'top1', 'lr', 'kd loss']
    assert table['groups'] == [('', 1), ('train', 1), ('eval', 1), ('', 1), ('train', 1)]
    assert [row['cells'] for row in table['rows']] == [
        ['0', '1', '20', '1e-05', ''], ['1', '0.1235', '21', '1e-05', '']]
    assert [row['best'] for row in table['rows']] == [False, True]


def test_command_warnings_and_facts_are_shown_in_words_and_as_text() -> None:
    page = render_html(create_data(), [])
    assert 'train_distill.py --data-dir &#39;my images&#39;' in page
    assert '&lt;b&gt;few&lt;/b&gt; images' in page and '<b>few' not in page
    assert 'norm 1, kd 0.5' in page and "{&#39;" not in page


@pytest.mark.parametrize('num_classes', [7, 35])
def test_odd_class_names_cost_no_report(num_classes: int, tmp_path: Path) -> None:
    odd = ['$x', '$\\frac$', 'a' * 300, '<script>', 'caf\udce9', 'Katze 猫', '']
    data = create_data(num_classes, title=''.join(odd), times={}, rows=ROWS[:1])
    data.class_names = [*odd, *list(data.class_names)[len(odd):]]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of letters that matplotlib's font lacks
        write_report(data, str(tmp_path))
    assert '<script>' not in (tmp_path / 'report.html').read_text(encoding='utf-8')


def test_warnings_of_the_log_are_collected_once_each() -> None:
    with collect_warnings() as lines:
        for _ in range(3):
            logging.getLogger('timm_distill.x').warning('twice %s', 'said')
        logging.getLogger('timm').error('worse')
        logging.getLogger('timm').info('unimportant')
    logging.getLogger('timm').warning('later')
    assert lines == ['twice said', 'worse']


def test_a_report_without_teacher_or_validation_shows_what_there_is(tmp_path: Path) -> None:
    rows = [{'epoch': 0, 'train_loss': 1., 'lr': 0.1}]
    data = create_data(rows=rows, student=None, teacher=None, times={})
    page = Path(write_report(data, str(tmp_path))[0]).read_text()
    assert '<h2>Loss terms</h2>' in page and '<h2>Calibration</h2>' not in page and '<h2>Accuracy</h2>' not in page


def flags(few_digits_dir: Path, output: Path) -> list:
    return [
        '--data-dir', str(few_digits_dir), '--output', str(output), '--experiment', 'run', '--num-classes', '10',
        '--img-size', '32', '-b', '30', '--epochs', '1', '--warmup-epochs', '0', '--opt', 'adamw', '--lr', '1e-3',
        '-j', '0', '--device', 'cpu', '--model', 'test_efficientnet']


def test_a_run_with_a_teacher_reports_agreement_and_both_accuracies(few_digits_dir: Path, tmp_path: Path) -> None:
    result = train_distill.main([
        *flags(few_digits_dir, tmp_path), '--teacher', 'test_resnet', '--no-teacher-pretrained', '--kd', 'kd',
        '--model-ema', '--model-ema-decay', '0.5'])
    (row,) = read_summary(str(tmp_path / 'run' / 'summary.csv'))
    assert 0 <= row['eval_agreement'] <= 100 and 'eval_student_top1' in row
    page = (tmp_path / 'run' / 'report.html').read_text()
    assert f"<b>{row['eval_top1']:.2f}</b><span>student top-1" in page
    assert f"<b>{row['eval_agreement']:.2f}</b><span>same prediction" in page
    assert (tmp_path / 'run' / 'report.png').exists() and result.best_metric == row['eval_top1']
    assert '(EMA weights)' in page and 'of epoch 0, the best one' in page
    assert f'train_distill.py --data-dir {few_digits_dir}' in page and 'has random weights' in page


def test_a_report_that_fails_costs_a_warning_and_not_the_run(
        few_digits_dir: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*args: Any) -> None:
        raise OSError('no space left')
    monkeypatch.setattr(closing, 'write_report', fail)
    result = train_distill.main(flags(few_digits_dir, tmp_path))
    assert result.checkpoint and 'no space left' in caplog.text


def test_no_report_is_drawn_without_matplotlib_or_where_it_is_not_wanted(
        few_digits_dir: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(closing, 'can_draw', lambda: False)
    train_distill.main(flags(few_digits_dir, tmp_path))
    assert not (tmp_path / 'run' / 'report.html').exists()
    assert report.can_draw()


def test_probes_of_frozen_features_are_drawn_and_those_of_the_best_epoch_are_in_the_headline(tmp_path: Path) -> None:
    rows = [
        {'epoch': 0, 'eval_knn': 40., 'eval_linear_probe': 50., 'eval_teacher_knn': 70., 'eval_cosine': 0.25},
        {'epoch': 1, 'eval_cosine': 0.5},  # not probed
        {'epoch': 2, 'eval_knn': 60., 'eval_linear_probe': 65., 'eval_teacher_knn': 70., 'eval_cosine': 0.75},
    ]
    data = ReportData('probed', rows, best_epoch=1)
    assert {'student k-NN top-1, %': '40', 'teacher k-NN top-1, %': '70', 'student cosine': '0.5'}.items() <= (
        report.headline(data).items())
    (axes,) = axes_of(data, 'Frozen features')
    lines = lines_of(axes)
    assert list(lines['nearest neighbours'].get_xdata()) == [0, 2]
    assert {'linear probe', 'nearest neighbours, teacher'} <= set(lines)
    assert write_report(data, str(tmp_path))
