"""The report of a run: it shows the numbers, needs nothing else, and never costs a run."""
import io
import re
from pathlib import Path
from typing import Any, Dict

import pytest
import torch
from PIL import Image

import train_distill
from timm_distill import report
from timm_distill.analysis import Predictions
from timm_distill.report import ReportData, write_report
from timm_distill.run import closing
from timm_distill.summary import read_summary

pytest.importorskip('matplotlib', reason='the report extra is not installed')
ROWS = [
    {'epoch': 0, 'train_loss': 2., 'train_norm_loss': 1., 'eval_top1': 20., 'eval_student_top1': 15.,
     'eval_agreement': 25., 'lr': 0.1},
    {'epoch': 1, 'train_loss': 1., 'train_norm_loss': .5, 'eval_top1': 40., 'eval_student_top1': 35.,
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
        facts={'training': {'kd': 'norm'}})
    return ReportData(**{**values, **kwargs})


@pytest.mark.parametrize('num_classes', [4, 35], ids=['matrix', 'largest_pairs'])
def test_a_report_shows_every_figure_and_needs_no_other_file(num_classes: int, tmp_path: Path) -> None:
    paths = write_report(create_data(num_classes), str(tmp_path))
    page = Path(paths[0]).read_text()
    for title in ('Accuracy', 'Loss terms', 'Learning rate', 'Time of a training step', 'Calibration',
                  'Accuracy of each class against the teacher', 'Predictions of teacher and student', 'Epochs'):
        assert f'<h2>{title}</h2>' in page, title
    assert '&lt;student&gt;' in page and '<student>' not in page
    assert set(re.findall(r'(?:src|href)="([^"]{0,10})', page)) == {'data:image'}
    assert not re.findall(r'https?://', page)
    assert Image.open(io.BytesIO(Path(paths[1]).read_bytes())).size > (600, 600)


def test_a_report_without_teacher_or_validation_shows_what_there_is(tmp_path: Path) -> None:
    rows = [{'epoch': 0, 'train_loss': 1., 'lr': 0.1}]
    data = create_data(rows=rows, student=None, teacher=None, times={})
    page = Path(write_report(data, str(tmp_path))[0]).read_text()
    assert '<h2>Loss terms</h2>' in page and '<h2>Calibration</h2>' not in page and '<h2>Accuracy</h2>' not in page


def flags(digits_dir: Path, output: Path) -> list:
    return ['--data-dir', str(digits_dir), '--output', str(output), '--experiment', 'run', '--num-classes', '10',
            '--img-size', '32', '-b', '30', '--epochs', '1', '--warmup-epochs', '0', '--opt', 'adamw', '--lr', '1e-3',
            '-j', '0', '--device', 'cpu', '--model', 'test_efficientnet']


def test_a_run_with_a_teacher_reports_agreement_and_both_accuracies(digits_dir: Path, tmp_path: Path) -> None:
    result = train_distill.main([
        *flags(digits_dir, tmp_path), '--teacher', 'test_resnet', '--no-teacher-pretrained', '--kd', 'kd',
        '--model-ema', '--model-ema-decay', '0.5'])
    (row,) = read_summary(str(tmp_path / 'run' / 'summary.csv'))
    assert 0 <= row['eval_agreement'] <= 100 and 'eval_student_top1' in row
    page = (tmp_path / 'run' / 'report.html').read_text()
    assert f"<b>{row['eval_top1']:.2f}</b><span>student top-1" in page
    assert f"<b>{row['eval_agreement']:.2f}</b><span>same prediction" in page
    assert (tmp_path / 'run' / 'report.png').exists() and result.best_metric == row['eval_top1']


def test_a_report_that_fails_costs_a_warning_and_not_the_run(
        digits_dir: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*args: Any) -> None:
        raise OSError('no space left')
    monkeypatch.setattr(closing, 'write_report', fail)
    result = train_distill.main(flags(digits_dir, tmp_path))
    assert result.checkpoint and 'no space left' in caplog.text


def test_no_report_is_drawn_without_matplotlib_or_where_it_is_not_wanted(
        digits_dir: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(closing, 'can_draw', lambda: False)
    train_distill.main(flags(digits_dir, tmp_path))
    assert not (tmp_path / 'run' / 'report.html').exists()
    assert report.can_draw()
