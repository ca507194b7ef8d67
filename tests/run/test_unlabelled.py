"""Runs on images without labels: what is trained, measured, saved and refused."""
import csv
import logging
import shutil
from pathlib import Path
from typing import Any, Dict, List

import pytest
import timm
import torch
from timm.models import save_for_hf

import train_distill
import validate
from timm_distill import UsageError
from timm_distill.checkpoint.file import read_checkpoint
from timm_distill.run import epochs

FAST = [
    '--img-size', '32', '-b', '10', '--warmup-epochs', '0', '--device', 'cpu', '-j', '0', '--epochs', '2',
    '--student', 'test_efficientnet', '--no-report', '--lr', '0.01']


@pytest.fixture(scope='module')
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('teacher')
    torch.manual_seed(0)
    save_for_hf(timm.create_model('test_resnet', num_classes=4), str(folder))
    return folder


@pytest.fixture(scope='module')
def photos(digits_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('photos')
    for path in sorted((digits_dir / 'train').rglob('*.png'))[::7]:
        shutil.copy(path, folder / f'{path.parent.name}-{path.name}')
    return folder


def run(data_dir: Path, output: Path, teacher: Path, *flags: str) -> Any:
    return train_distill.main([
        '--data-dir', str(data_dir), '--output', str(output), '--experiment', 'run', *FAST,
        '--teacher', f'local-dir:{teacher}', '--teacher-img-size', '32', *flags])


def rows(output: Path) -> List[Dict[str, str]]:
    with open(output / 'run' / 'summary.csv') as f:
        return list(csv.DictReader(f))


def test_photographs_alone_train_an_encoder_that_becomes_a_classifier(
        photos: Path, teacher_dir: Path, digits_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run(
            photos, tmp_path, teacher_dir, '--kd', 'norm+feature', '--val-split', '0.2', '--probe-interval', '1',
            '--probe-dir', str(digits_dir), '--eval-metric', 'knn')
    lines = [message for message in caplog.messages if 'without labels' in message]
    assert len(lines) == 1 and 'no classifier' in lines[0]
    for row in rows(tmp_path):
        for name in ('eval_knn', 'eval_linear_probe', 'eval_teacher_knn', 'eval_teacher_linear_probe'):
            assert 0 < float(row[name]) <= 100
        assert -1 <= float(row['eval_cosine']) <= 1
        assert float(row['eval_loss']) == pytest.approx(float(row['eval_norm_loss']) + float(row['eval_feature_loss']))
        assert 'train_task_loss' not in row
    hub = tmp_path / 'run' / 'hub'
    student = timm.create_model(f'local-dir:{hub}', pretrained=True).eval()
    assert student.num_classes == 0
    card = (hub / 'README.md').read_text()
    assert 'image-feature-extraction' in card and 'softmax' not in card
    best = read_checkpoint(str(tmp_path / 'run' / 'model_best.pth.tar'))
    assert student.state_dict().keys() == best['state_dict'].keys()
    assert best['metric'] == max(float(row['eval_knn']) for row in rows(tmp_path))
    classifier = timm.create_model(
        'test_efficientnet', pretrained=True, num_classes=10,
        pretrained_cfg_overlay=dict(file=str(hub / 'model.safetensors'), num_classes=0)).eval()
    torch.testing.assert_close(
        classifier.forward_features(torch.ones(1, 3, 32, 32)), student.forward_features(torch.ones(1, 3, 32, 32)))


def test_features_are_probed_in_validate_as_in_training(
        photos: Path, teacher_dir: Path, digits_dir: Path, tmp_path: Path) -> None:
    run(photos, tmp_path, teacher_dir, '--kd', 'feature', '--probe-interval', '2', '--probe-dir', str(digits_dir))
    trained, last = rows(tmp_path)
    assert not trained.get('eval_knn') and trained['eval_cosine']
    results = tmp_path / 'results.csv'
    assert validate.main([
        '--model', 'test_efficientnet', '--checkpoint', str(tmp_path / 'run' / 'last.pth.tar'), '--img-size', '32',
        '--data-dir', str(digits_dir), '--knn', '--probe', '-j', '0', '--device', 'cpu',
        '--results-file', str(results)]) == 0
    with open(results) as f:
        (row,) = csv.DictReader(f)
    assert float(row['knn']) == pytest.approx(float(last['eval_knn']), abs=1e-3)
    assert float(row['linear_probe']) == pytest.approx(float(last['eval_linear_probe']), abs=0.6)
    assert 'top1' not in row


def test_a_run_without_labels_that_was_stopped_ends_as_one_that_was_not(
        photos: Path, teacher_dir: Path, digits_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ['--kd', 'norm', '--val-split', '0.2', '--probe-interval', '1', '--probe-dir', str(digits_dir)]
    run(photos, tmp_path / 'whole', teacher_dir, *flags)

    class Stop(Exception):
        pass

    def stop(*args: Any, **kwargs: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(epochs, 'validate_student', stop)
        with pytest.raises(Stop):
            run(photos, tmp_path / 'parts', teacher_dir, *flags, '--recovery-interval', '1')
    run(photos, tmp_path / 'parts', teacher_dir, *flags, '--resume', 'auto')
    whole, parts = (read_checkpoint(str(tmp_path / name / 'run' / 'last.pth.tar')) for name in ('whole', 'parts'))
    for name, tensor in whole['state_dict'].items():
        assert torch.equal(tensor, parts['state_dict'][name]), name
    assert rows(tmp_path / 'whole') == rows(tmp_path / 'parts')


@pytest.mark.parametrize('flags, words', [
    (['--kd', 'dkd'], 'dkd needs labels.*What works here: .*kd.*norm'),
    (['--kd', 'crd'], 'crd needs labels'),
    (['--kd', 'kd+norm', '--num-classes', '0'], 'kd needs a student with a classifier.*works here: .*norm'),
    (['--kd', 'norm', '--task-loss-weight', '1'], '--task-loss-weight 1 needs labels'),
    (['--kd', 'norm', '--probe-interval', '1'], 'The probes need labelled images.*--probe-dir'),
    (['--kd', 'norm', '--probe-dir', '.'], '--probe-dir . is not read'),
    (['--kd', 'norm', '--probe-interval', '1', '--probe-dir', 'one'], 'images of one class'),
    (['--kd', 'norm', '--eval-metric', 'knn', '--probe-dir', 'nowhere'], "'nowhere' does not exist"),
    (['--kd', 'norm', '--loss', 'ce', '--no-labels'], '--loss and --jsd-loss are losses on labels'),
])
def test_what_reads_labels_is_one_message_and_nothing_is_written(
        flags: List[str], words: str, photos: Path, teacher_dir: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(photos, tmp_path / 'one' / 'class')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words) as error:
        run(photos, tmp_path / 'out', teacher_dir, *flags)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'out').exists() or not any((tmp_path / 'out').iterdir())
