"""Runs whose targets are standardised: measured before the first update, kept in checkpoints, the same for all."""
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest
import timm
import torch
from timm.models import save_for_hf

import train_distill
from timm_distill import UsageError
from timm_distill.checkpoint.file import read_checkpoint
from timm_distill.data.indexing import IndexedDataset, SpacedDataset
from timm_distill.run import epochs

FLAGS = [
    '--student', 'test_efficientnet', '--num-classes', '10', '--img-size', '32', '-b', '20', '-j', '0',
    '--warmup-epochs', '0', '--lr', '0.05', '--device', 'cpu', '--no-report', '--epochs', '2', '--no-teacher-eval',
    '--train-num-samples', '100']


@pytest.fixture(scope='module')
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('teacher')
    torch.manual_seed(0)
    save_for_hf(timm.create_model('test_resnet', num_classes=10), str(folder))
    return folder


class Runs:
    """Runs on one folder of images with one teacher."""

    def __init__(self, root: Path, data_dir: Path, teacher: Path):
        self.root, self.data_dir, self.teacher = root, data_dir, teacher

    def __call__(self, name: str, *flags: str) -> Dict[str, Any]:
        """Train and return the last checkpoint."""
        train_distill.main([
            '--data-dir', str(self.data_dir), *FLAGS, '--teacher', f'local-dir:{self.teacher}', '--teacher-img-size',
            '32', '--output', str(self.root), '--experiment', name, *flags])
        return read_checkpoint(str(self.root / name / 'last.pth.tar'))


@pytest.fixture
def runs(tmp_path: Path, few_digits_dir: Path, teacher_dir: Path) -> Runs:
    return Runs(tmp_path, few_digits_dir, teacher_dir)


def assert_equal(one: Dict[str, Any], other: Dict[str, Any]) -> None:
    for part in ('state_dict', 'task_state'):
        expected, actual = flat(one[part]), flat(other[part])
        assert expected.keys() == actual.keys()
        assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())


def flat(state: Dict[str, Any], prefix: str = '') -> Dict[str, torch.Tensor]:
    tensors: Dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            tensors.update(flat(value, f'{prefix}{name}.'))
        elif isinstance(value, torch.Tensor):
            tensors[prefix + name] = value
    return tensors


def test_a_run_that_was_stopped_ends_as_one_that_was_not_and_measures_once(
        runs: Runs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    flags = ['--kd', 'norm+tokens', '--teacher-standardize', 'phi-s', '--model-ema']
    whole = runs('whole', *flags)
    assert whole['task_state']['standardized']['']['kd'] == ['norm', 'tokens']
    assert whole['provenance']['teacher']['targets standardised'] == 'phi-s'

    class Stop(Exception):
        pass

    def stop(*args: Any, **kwargs: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(epochs, 'validate_student', stop)
        with pytest.raises(Stop):
            runs('parts', *flags, '--recovery-interval', '1')
    caplog.clear()
    with caplog.at_level(logging.INFO):
        parts = runs('parts', *flags, '--resume', 'auto')
    assert not [m for m in caplog.messages if 'statistics of the targets' in m]
    assert_equal(whole, parts)


@pytest.mark.parametrize('kd, flags, words', [
    ('norm', ['--teacher-standardize', 'channel'], 'standardised none, here channel for norm'),
    ('tokens', ['--teacher-standardize', 'none'], 'standardised channel for tokens, here none'),
])
def test_a_run_is_not_resumed_with_other_targets(runs: Runs, kd: str, flags: List[str], words: str) -> None:
    runs('run', '--kd', kd, '--stop-epoch', '1')
    with pytest.raises(UsageError, match=f'{words}.*--teacher-standardize'):
        runs('run', '--kd', kd, *flags, '--resume', 'auto')


def test_naming_the_default_resumes_the_run(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    runs('run', '--kd', 'tokens', '--stop-epoch', '1')
    assert runs('run', '--kd', 'tokens', '--teacher-standardize', 'channel', '--resume', 'auto')['epoch'] == 1
    assert not [m for m in caplog.messages if 'Flags differ' in m]


def test_statistics_depend_on_no_seed_and_no_augmentation_and_move_no_random_number(runs: Runs) -> None:
    first = runs('first', '--kd', 'norm', '--teacher-standardize', 'channel', '--epochs', '1')
    second = runs(
        'second', '--kd', 'norm', '--teacher-standardize', 'channel', '--epochs', '1', '--seed', '7', '-b', '50',
        '--aa', 'rand-m9-mstd0.5-inc1', '--mixup', '0.2')
    for name, tensor in first['task_state']['standardized'][''].items():
        if isinstance(tensor, torch.Tensor):
            torch.testing.assert_close(second['task_state']['standardized'][''][name], tensor, rtol=1e-6, atol=1e-6)
    raw = runs('raw', '--kd', 'kd+norm', '--kd-weight', 'norm=0', '--epochs', '1')
    unused = runs(
        'unused', '--kd', 'kd+norm', '--kd-weight', 'norm=0', '--epochs', '1', '--teacher-standardize', 'channel')
    assert all(torch.equal(tensor, unused['state_dict'][name]) for name, tensor in raw['state_dict'].items())


def test_a_run_that_fills_a_cache_and_one_that_reads_it_have_the_same_targets(runs: Runs, tmp_path: Path) -> None:
    flags = ['--kd', 'tokens', '--teacher-cache', str(tmp_path / 'cache'), '--cache-views', '2']
    filled, read = runs('filled', *flags), runs('read', *flags)
    assert filled['task_state']['standardized'][''].keys() >= {'feature.mean', 'pre_logits.deviation'}
    assert_equal(filled, read)
    raw = runs('raw', *flags, '--teacher-standardize', 'none')
    assert 'standardized' not in raw['task_state']


def test_images_without_labels_and_a_student_without_classifier(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        state = runs('run', '--kd', 'tokens', '--no-labels', '--num-classes', '0', '--val-split', '0.2')
    assert state['task_state']['standardized']['']['mode'] == 'channel'
    assert len([m for m in caplog.messages if m.startswith('Targets standardised')]) == 1


@pytest.mark.parametrize('kd', ['tokens', 'nd'])
def test_images_of_several_sizes_are_measured_at_the_size_of_validation(runs: Runs, kd: str) -> None:
    state = runs('run', '--kd', kd, '--train-img-sizes', '32', '64', '--epochs', '1')
    assert all(tensor.isfinite().all() for tensor in flat(state['task_state']).values() if tensor.is_floating_point())


def test_a_dry_run_needs_no_images(capsys: pytest.CaptureFixture) -> None:
    for mode in ('channel', 'phi-s'):
        train_distill.main([
            '--dry-run', '--teacher', 'test_vit', '--student', 'test_efficientnet', '--kd', 'tokens+norm',
            '--teacher-standardize', mode, '--device', 'cpu'])
        assert 'works' in capsys.readouterr().out


def test_a_flag_without_a_method_that_takes_it_is_refused_before_anything_is_written(
        runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='--teacher-standardize channel has nothing to standardise: --kd kd'):
        runs('run', '--kd', 'kd', '--teacher-standardize', 'channel')
    assert not (tmp_path / 'run').exists()


def test_spaced_samples_go_through_the_whole_set_once() -> None:
    class Numbers(torch.utils.data.Dataset):
        transform: Any = None

        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> Any:
            return index, 0

    spaced = SpacedDataset(Numbers(), 4)
    assert [spaced[i][0] for i in range(len(spaced))] == [0, 2, 5, 7]
    assert len(SpacedDataset(Numbers(), 99)) == 10
    spaced.transform = SimpleNamespace()
    assert spaced.dataset.transform is spaced.transform and isinstance(spaced, IndexedDataset)
