"""Runs of the training script with two teachers."""
import csv
from pathlib import Path
from typing import Any, Dict, List

import pytest
import timm
import torch

import train_distill
from timm_distill import UsageError
from timm_distill.checkpoint.file import read_checkpoint

FLAGS = [
    '--num-classes', 10, '--img-size', 32, '-b', 100, '--opt', 'adamw', '--lr', '2e-3', '--warmup-epochs', 0,
    '--device', 'cpu', '-j', 0, '--epochs', 2, '--student', 'test_efficientnet', '--teacher', 'a=test_vit',
    'b=test_resnet', '--no-teacher-pretrained', '--teacher-kwargs', 'a.num_classes=0', 'a.img_size=32',
    '--kd', 'norm+kd@b+feature', '--kd-kwargs', 'norm.segments=3', '--kd-weight', 'kd=0.5', 'norm@a=0.3',
    '--teacher-drop', 0.5]


def run(data_dir: Path, output: Path, experiment: str, *flags: Any) -> Any:
    argv = ['--data-dir', data_dir, '--output', output, '--experiment', experiment, *FLAGS, *flags]
    return train_distill.main([str(flag) for flag in argv])


def rows(folder: Path) -> List[Dict[str, str]]:
    with open(folder / 'summary.csv') as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope='module')
def output(digits_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run, `full`, and of one that stopped and was resumed, `part`."""
    folder = tmp_path_factory.mktemp('several')
    pytest.importorskip('matplotlib')
    run(digits_dir, folder, 'full')
    run(digits_dir, folder, 'part', '--no-report', '--stop-epoch', 1)
    run(digits_dir, folder, 'part', '--no-report', '--resume', 'auto')
    return folder


def test_a_resumed_run_with_two_teachers_ends_with_the_same_bits(output: Path) -> None:
    full, part = (read_checkpoint(str(output / name / 'last.pth.tar')) for name in ('full', 'part'))
    assert (output / 'full/summary.csv').read_bytes() == (output / 'part/summary.csv').read_bytes()
    assert all(torch.equal(tensor, part['state_dict'][name]) for name, tensor in full['state_dict'].items())
    assert full['task_state']['teacher_drop'] == part['task_state']['teacher_drop']
    assert full['task_state']['teacher_drop']['step'] == 6
    for name in ('adapter', 'methods'):
        state = full['task_state'][name]
        assert state and all(torch.equal(tensor, part['task_state'][name][key]) for key, tensor in state.items())


def test_a_checkpoint_of_two_teachers_is_a_plain_one_of_timm(output: Path) -> None:
    path = str(output / 'full/last.pth.tar')
    model = timm.create_model('test_efficientnet', num_classes=10, checkpoint_path=path)
    assert all(torch.equal(model.state_dict()[name], x) for name, x in read_checkpoint(path)['state_dict'].items())


def test_summary_report_and_provenance_know_each_teacher(output: Path) -> None:
    losses = {f'train_{name}_loss' for name in ('norm@a', 'norm@b', 'kd@b', 'feature@a', 'feature@b', 'task')}
    columns = set(rows(output / 'full')[0])
    assert losses <= columns and 'eval_agreement@b' in columns
    page = (output / 'full/report.html').read_text()
    assert 'distilled from test_vit and test_resnet' in page and 'teacher b top-1, %' in page
    checkpoint = read_checkpoint(str(output / 'full/last.pth.tar'))
    teacher = checkpoint['provenance']['teacher']
    assert teacher['name'] == {'a': 'test_vit', 'b': 'test_resnet'}
    assert teacher['sha256 of its weights'].keys() == checkpoint['teacher_input'].keys() == {'a', 'b'}
    assert 'test_vit and test_resnet' in (output / 'full/hub/README.md').read_text()


def test_another_teacher_under_one_of_the_names_is_refused(
        output: Path, digits_dir: Path, tmp_path: Path) -> None:
    other = timm.create_model('test_resnet', num_classes=10)
    torch.save(other.state_dict(), tmp_path / 'other.pth')
    with pytest.raises(UsageError, match="teacher 'b' with other weights"):
        weights = f'b={tmp_path / "other.pth"}'
        run(digits_dir, output, 'part', '--resume', 'auto', '--epochs', 3, '--teacher-checkpoint', weights)
    with pytest.raises(UsageError, match="a teacher 'a' with other preprocessing: std"):
        run(digits_dir, output, 'part', '--resume', 'auto', '--epochs', 3, '--teacher-std', 'a=0.9')
    with pytest.raises(UsageError, match='of another run: --teacher'):
        run(digits_dir, output, 'part', '--resume', 'auto', '--teacher', 'b=test_resnet', 'a=test_vit')


def test_a_dry_run_checks_two_teachers(capsys: pytest.CaptureFixture) -> None:
    assert train_distill.main([str(flag) for flag in [*FLAGS, '--dry-run']]) is None
    out = capsys.readouterr().out
    assert 'a (test_vit), b (test_resnet) -> test_efficientnet' in out and 'teacher feature    a [64' in out


def test_two_teachers_teach_without_labels(
        digits_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = run(
        digits_dir, tmp_path, 'unlabelled', '--no-labels', '--no-report', '--kd', 'norm+feature', '--kd-weight',
        'norm=1', '--epochs', 1, '--num-classes', 0, '--probe-dir', digits_dir / 'validation', '--probe-interval', 1)
    row = rows(Path(result.output_dir))[0]
    assert {'eval_cosine@a', 'eval_cosine@b', 'eval_knn', 'eval_teacher_knn@a', 'eval_teacher_knn@b'} <= set(row)
    cosines = [float(row[f'eval_cosine@{name}']) for name in 'ab']
    assert float(row['eval_cosine']) == pytest.approx(sum(cosines) / 2)
