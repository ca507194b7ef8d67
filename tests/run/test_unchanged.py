"""A resumed run goes on with the data and the teacher that it was trained with, or says what is different."""
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List

import pytest
import timm
import torch
from timm.models import save_for_hf

import train_distill
from timm_distill import UsageError
from timm_distill.checkpoint.file import read_checkpoint
from timm_distill.checkpoint.lock import LOCK_NAME
from timm_distill.run import unchanged

FAST = [
    '--num-classes', '4', '--img-size', '32', '-b', '10', '--warmup-epochs', '0', '--device', 'cpu', '-j', '0',
    '--epochs', '2', '--student', 'test_resnet', '--no-report', '--no-teacher-eval']


@pytest.fixture(scope='module')
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('teacher')
    torch.manual_seed(0)
    save_for_hf(timm.create_model('test_efficientnet', num_classes=4), str(folder))
    return folder


@pytest.fixture
def data_dir(digits_dir: Path, tmp_path: Path) -> Path:
    for split, count in (('train', 10), ('validation', 5)):
        for label in range(4):
            (tmp_path / 'data' / split / str(label)).mkdir(parents=True)
            for i, path in enumerate(sorted((digits_dir / split / str(label)).iterdir())[:count]):
                shutil.copy(path, tmp_path / 'data' / split / str(label) / f'{i}.png')
    return tmp_path / 'data'


def run(data_dir: Path, output: Path, teacher: Path, *flags: str) -> Any:
    return train_distill.main([
        '--data-dir', str(data_dir), '--output', str(output), '--experiment', 'run', *FAST,
        '--teacher', f'local-dir:{teacher}', *flags])


def swap(data_dir: Path) -> None:
    os.rename(data_dir / 'train' / '1', data_dir / 'aside')
    os.rename(data_dir / 'train' / '2', data_dir / 'train' / '1')
    os.rename(data_dir / 'aside', data_dir / 'train' / '2')


def remove(data_dir: Path) -> None:
    for i in range(4):
        (data_dir / 'train' / '3' / f'{i}.png').unlink()


def listing(folder: Path) -> Dict[str, Any]:
    paths = [path for path in sorted(folder.rglob('*')) if path.name != LOCK_NAME]  # says who looked last
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


@pytest.mark.parametrize('change, words', [
    (swap, ["'1' holds what '2' held"]),
    (remove, ['40 images before, 36 now', "'3' has 6 images for 10 (4 removed"]),
    (lambda data: (data / 'validation' / '0' / '0.png').unlink(), ['validation data', "'0' has 4 images for 5"]),
])
def test_resume_with_other_data_is_refused_with_the_difference_and_leaves_the_run_as_it_was(
        data_dir: Path, teacher_dir: Path, tmp_path: Path, change: Callable, words: List[str]) -> None:
    run(data_dir, tmp_path / 'output', teacher_dir, '--kd', 'kd', '--stop-epoch', '1')
    before = listing(tmp_path / 'output')
    change(data_dir)
    with pytest.raises(UsageError) as error:
        run(data_dir, tmp_path / 'output', teacher_dir, '--kd', 'kd', '--resume', 'auto')
    assert all(word in str(error.value) for word in [*words, '--resume-data-changed']), error.value
    assert listing(tmp_path / 'output') == before


@pytest.mark.parametrize('change', [swap, remove])
def test_run_that_goes_on_with_other_data_has_their_labels_banks_and_class_means(
        data_dir: Path, teacher_dir: Path, tmp_path: Path, change: Callable, caplog: Any) -> None:
    kd = ['--kd', 'crd+nd', '--kd-kwargs', 'crd.negatives=8', '--model-ema']
    run(data_dir, tmp_path / 'output', teacher_dir, *kd, '--stop-epoch', '1')
    change(data_dir)
    second = run(data_dir, tmp_path / 'output', teacher_dir, *kd, '--resume', 'auto', '--resume-data-changed')
    fresh = run(data_dir, tmp_path / 'fresh', teacher_dir, *kd)
    now, new = (read_checkpoint(f'{result.output_dir}/last.pth.tar') for result in (second, fresh))
    for name in ('crd.labels', 'crd.by_class', 'nd.class_means'):
        assert torch.equal(now['task_state']['memory'][name], new['task_state']['memory'][name]), name
    assert now['datasets'] == new['datasets'] and now['epoch'] == 1
    assert 'not as if it had never stopped' in caplog.text and 'begins anew' in caplog.text


def test_run_stopped_inside_an_epoch_goes_on_with_fewer_images(
        data_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    flags = ['--kd', 'kd', '-b', '2', '--recovery-interval', '9']
    result = run(data_dir, tmp_path / 'output', teacher_dir, *flags, '--stop-epoch', '1')
    recovery = next(Path(result.output_dir).glob('recovery-*'))
    for label in range(4):
        for i in range(3, 10):
            (data_dir / 'train' / str(label) / f'{i}.png').unlink()
    result = run(
        data_dir, tmp_path / 'output', teacher_dir, *flags, '--resume', str(recovery),
        '--resume-data-changed')
    assert read_checkpoint(f'{result.output_dir}/last.pth.tar')['epoch'] == 1


def test_copy_of_the_data_elsewhere_is_resumed_from(data_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    run(data_dir, tmp_path / 'output', teacher_dir, '--kd', 'kd', '--stop-epoch', '1')
    shutil.copytree(data_dir, tmp_path / 'copy')
    result = run(tmp_path / 'copy', tmp_path / 'output', teacher_dir, '--kd', 'kd', '--resume', 'auto')
    assert read_checkpoint(f'{result.output_dir}/last.pth.tar')['epoch'] == 1


def test_resume_with_a_teacher_of_other_preprocessing_is_refused_with_the_difference(
        data_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    teacher = tmp_path / 'teacher'
    shutil.copytree(teacher_dir, teacher)
    run(data_dir, tmp_path / 'output', teacher, '--kd', 'nd', '--stop-epoch', '1')
    before = listing(tmp_path / 'output')
    config = json.loads((teacher / 'config.json').read_text())
    config['pretrained_cfg']['mean'] = [0.1, 0.2, 0.3]
    (teacher / 'config.json').write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r'other preprocessing: mean .* -> 0\.1 0\.2 0\.3'):
        run(data_dir, tmp_path / 'output', teacher, '--kd', 'nd', '--resume', 'auto')
    assert listing(tmp_path / 'output') == before


@pytest.fixture(scope='module')
def other_teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of six classes, four of which are those of the data in another order."""
    folder = tmp_path_factory.mktemp('other_teacher')
    torch.manual_seed(0)
    model = timm.create_model('test_efficientnet', num_classes=6)
    save_for_hf(model, str(folder), model_config={'label_names': ['3', 'x', '1', '2', '0', 'y']})
    return folder


def test_a_run_keeps_its_map_of_the_teachers_classes(
        data_dir: Path, other_teacher_dir: Path, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level('INFO')
    (tmp_path / 'map.txt').write_text('0\tx\n')
    flags = ['--kd', 'kd', '--teacher-eval', '--teacher-classes', str(tmp_path / 'map.txt')]
    run(data_dir, tmp_path / 'output', other_teacher_dir, *flags, '--stop-epoch', '1')
    assert "Teacher classes: 4 of 6 (its weights) for 4 of the student's 4" in caplog.text
    assert 'Teacher local-dir' in caplog.text and 'top-1' in caplog.text
    before, path = listing(tmp_path / 'output'), tmp_path / 'output' / 'run' / 'last.pth.tar'
    assert read_checkpoint(str(path), 'x')['teacher_classes'] == [[1], [2], [3], [0]]
    by_name = [*flags[:3], '--teacher-classes', 'auto']
    with pytest.raises(UsageError, match=r'other classes of the teacher.*class 0 \(0\) 1 -> 4'):
        run(data_dir, tmp_path / 'output', other_teacher_dir, *by_name, '--resume', 'auto')
    with pytest.raises(UsageError, match='the teacher has 6 classes and the student 4'):
        run(data_dir, tmp_path / 'output', other_teacher_dir, *flags[:3], '--resume', 'auto')
    assert listing(tmp_path / 'output') == before
    (tmp_path / 'map.txt').rename(tmp_path / 'moved.txt')
    moved = [*flags[:3], '--teacher-classes', str(tmp_path / 'moved.txt')]
    assert run(data_dir, tmp_path / 'output', other_teacher_dir, *moved, '--resume', 'auto').best_epoch is not None


def test_a_dry_run_prints_the_map_of_the_teachers_classes(
        data_dir: Path, other_teacher_dir: Path, tmp_path: Path, capsys: Any) -> None:
    run(data_dir, tmp_path / 'output', other_teacher_dir, '--kd', 'kd', '--teacher-classes', 'auto', '--dry-run')
    words = capsys.readouterr().out.split()
    start = words.index('classes')
    assert words[start + 1:start + 9] == ['0', '(4)', '1', '(2)', '2', '(3)', '3', '(0)']
    assert not (tmp_path / 'output').exists()


def test_checkpoint_that_knows_nothing_of_its_data_is_resumed() -> None:
    loaders = SimpleNamespace(fingerprints={'training': {}})
    assert not unchanged.check_same_data(SimpleNamespace(loaders=loaders), {})  # type: ignore[arg-type]


def test_processes_with_other_data_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def _gather(ranks: List[Any], mine: Any) -> None:
        ranks[:] = [mine, {'training': 'other'}, mine]

    monkeypatch.setattr(unchanged.dist, 'get_world_size', lambda: 3)
    monkeypatch.setattr(unchanged.dist, 'all_gather_object', _gather)
    args: Any = SimpleNamespace(distributed=True, data_dir='images')
    with pytest.raises(UsageError, match='processes 1 than for process 0'):
        unchanged.check_equal_data(args, {'training': {'num_samples': 3}})


def weights_run(**weights: float) -> Any:
    task = SimpleNamespace(task_loss_weight=1., weights=weights)
    return SimpleNamespace(task=task, args=SimpleNamespace(resume='last.pth.tar'))


@pytest.mark.parametrize(('training', 'expected'), [
    ({'weights': {'task': 1., 'pkt': 1.}}, r'pkt 1\.0 -> 30000\.'),
    ({'weights': {'task': 1.}}, 'pkt none -> 30000'),
    ({'weights': {'task': 0.1, 'pkt': 30000.}}, r'task 0\.1 -> 1\.'),
    ({}, 'does not say which weights .* pkt 30000'),
    (None, 'does not say which weights .* pkt 30000'),
])
def test_other_weights_of_the_loss_terms_are_said_at_a_resume(training: Any, expected: str, caplog: Any) -> None:
    unchanged.check_same_weights(weights_run(pkt=30000.), {'provenance': {'training': training}} if training else {})
    assert re.search(expected, caplog.text), caplog.text


def test_same_weights_and_runs_without_a_teacher_are_silent_at_a_resume(caplog: Any) -> None:
    saved = {'provenance': {'training': {'weights': {'task': 1., 'pkt': 30000.}}}}
    unchanged.check_same_weights(weights_run(pkt=30000.), saved)
    unchanged.check_same_weights(weights_run(), {})
    assert not caplog.records
