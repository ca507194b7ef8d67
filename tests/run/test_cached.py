"""Runs with cached targets: the first fills, later ones read, and what does not fit is refused."""
import errno
import shutil
from pathlib import Path
from typing import Any, Dict

import pytest
import torch

import train_distill
from timm_distill import UsageError
from timm_distill.cache import table as table_module
from timm_distill.cache.targets import CacheMismatchError
from timm_distill.run import cached

FLAGS = [
    '--student', 'test_resnet', '--num-classes', '10', '--img-size', '32', '-b', '48', '-j', '0', '--warmup-epochs',
    '0', '--lr', '0.05', '--device', 'cpu', '--no-report', '--aa', 'rand-m9-mstd0.5-inc1', '--reprob', '0.3',
    '--train-num-samples', '100']


@pytest.fixture(scope='module')
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import timm
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('teacher') / 'vit.pth'
    torch.save(timm.create_model('test_vit', num_classes=10, img_size=32).state_dict(), path)
    return path


class Runs:
    """Runs on one cache."""

    def __init__(self, root: Path, few_digits_dir: Path, teacher_file: Path):
        self.root = root
        self.cache = root / 'cache'
        self.data_dir = few_digits_dir
        self.teacher = [
            '--teacher', 'test_vit', '--teacher-checkpoint', str(teacher_file), '--teacher-kwargs', 'img_size=32',
            '--no-teacher-eval']
        self.count = 0
        self.first: Dict[str, torch.Tensor] = {}

    def __call__(self, *flags: str, cache: Any = None) -> Dict[str, torch.Tensor]:
        """Train and return the weights of the last checkpoint."""
        self.count += 1
        train_distill.main([
            '--data-dir', str(self.data_dir), *FLAGS, '--teacher-cache', str(cache or self.cache), '--output',
            str(self.root / 'out'), '--experiment', str(self.count), *flags])
        path = self.root / 'out' / str(self.count) / 'last.pth.tar'
        return torch.load(path, weights_only=False)['state_dict']


@pytest.fixture
def runs(tmp_path: Path, few_digits_dir: Path, teacher_file: Path) -> Runs:
    return Runs(tmp_path, few_digits_dir, teacher_file)


def assert_equal(one: Dict[str, torch.Tensor], other: Dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture
def no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on no teacher can be created."""
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError('a teacher was created')
    monkeypatch.setattr(cached, 'create_teacher', refuse)


@pytest.mark.parametrize('flags', [
    ['--kd', 'norm+kd', '--kd-kwargs', 'norm.segments=2', '--cache-precision', 'int8'],
    pytest.param(
        ['--kd', 'crd+feature', '--kd-kwargs', 'crd.negatives=16', '--cache-precision', 'int8'],
        marks=pytest.mark.slow),
    pytest.param(
        ['--kd', 'at', '--mixup', '0.4', '--cutmix', '1', '--mixup-mode', 'elem'], marks=pytest.mark.slow),
    pytest.param(['--kd', 'kd', '--aug-splits', '2', '--split-bn'], marks=pytest.mark.slow),
], ids=lambda flags: flags[1])
def test_later_run_without_teacher_is_the_first_run_to_the_bit(
        runs: Runs,
        flags: Any,
        request: pytest.FixtureRequest,
) -> None:
    first = runs(*flags, *runs.teacher, '--epochs', '3', '--cache-views', '2')
    request.getfixturevalue('no_teacher')
    later = runs(*flags, '--epochs', '3')
    assert_equal(first, later)


def test_another_student_batch_size_and_seed_read_a_cache_that_one_epoch_per_view_filled(
        runs: Runs,
        request: pytest.FixtureRequest,
) -> None:
    """Also the images that each epoch dropped with its last batch are there."""
    runs('--kd', 'kd', *runs.teacher, '--epochs', '2', '--cache-views', '2')
    request.getfixturevalue('no_teacher')
    runs('--kd', 'kd', '--epochs', '2', '--seed', '5', '-b', '20', '--student', 'test_efficientnet',
        '--mean', '0.5', '0.5', '0.5', '--std', '0.5', '0.5', '0.5')


def test_a_partial_fill_is_completed_by_another_run(runs: Runs, request: pytest.FixtureRequest) -> None:
    runs('--kd', 'kd', *runs.teacher, '--epochs', '1', '--cache-views', '2')
    with pytest.raises(UsageError, match='lacks 100 of 200 views .*give --teacher'):
        runs('--kd', 'kd', '--epochs', '2')
    runs('--kd', 'kd', *runs.teacher, '--epochs', '2', '-b', '32', '--seed', '3')
    request.getfixturevalue('no_teacher')
    runs('--kd', 'kd', '--epochs', '2')


def test_a_run_that_reads_more_adds_what_is_missing(runs: Runs, request: pytest.FixtureRequest) -> None:
    runs('--kd', 'kd', *runs.teacher, '--epochs', '1', '--cache-views', '1')
    with pytest.raises(UsageError, match='feature-float16.*give --teacher'):
        runs('--kd', 'norm+kd', '--epochs', '1')
    runs('--kd', 'norm+kd', *runs.teacher, '--epochs', '1')
    request.getfixturevalue('no_teacher')
    runs('--kd', 'norm+kd', '--epochs', '1')


@pytest.fixture(scope='module')
def filled(tmp_path_factory: pytest.TempPathFactory, few_digits_dir: Path, teacher_file: Path) -> Runs:
    """A cache of one view for kd, whose run is the first."""
    runs = Runs(tmp_path_factory.mktemp('filled'), few_digits_dir, teacher_file)
    runs.first = runs('--kd', 'kd', *runs.teacher, '--epochs', '1', '--cache-views', '1')
    return runs


@pytest.mark.parametrize('flags, words', [
    (['--aa', 'rand-m5'], '--aa rand-m9-mstd0.5-inc1 in the cache, rand-m5 here'),
    (['--img-size', '48'], '--input-size 3 32 32 in the cache, 3 48 48 here'),
    (['--mixup', '0.5', '--mixup-mode', 'elem'], '--mixup None in the cache, 0.5 here'),
    (['--cache-views', '3'], '--cache-views 3: the cache .* has 1'),
    (['--kd', 'srrl'], "the teacher's own head"),
])
def test_a_cache_of_something_else_is_refused_with_the_difference(filled: Runs, flags: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        filled('--kd', 'kd', '--epochs', '1', *flags)


def test_other_data_and_another_teacher_are_refused(
        filled: Runs,
        tmp_path: Path,
        few_digits_dir: Path,
        teacher_file: Path,
        monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = filled
    weights = torch.load(teacher_file)
    weights['head.bias'] += 1
    torch.save(weights, tmp_path / 'other.pth')
    other = ['--teacher-checkpoint', str(tmp_path / 'other.pth')]
    with pytest.raises(UsageError, match="the teacher's checkpoint"):
        runs('--kd', 'kd', *runs.teacher, *other, '--epochs', '1')
    with pytest.raises(UsageError, match="the teacher's checkpoint"):
        runs('--kd', 'kd', *runs.teacher, *other, '--epochs', '1', '--cache-check', '4')
    shutil.copytree(few_digits_dir, tmp_path / 'data')
    next((tmp_path / 'data' / 'train').glob('*/*')).unlink()
    monkeypatch.setattr(runs, 'data_dir', tmp_path / 'data')
    with pytest.raises(UsageError, match='training data: .*99 now'):
        runs('--kd', 'kd', '--epochs', '1')


def test_checks_pass_on_a_true_cache_and_stop_the_run_on_a_false_one(
        filled: Runs,
        monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = filled
    plain = runs('--kd', 'kd', '--epochs', '2')
    assert_equal(plain, runs('--kd', 'kd', *runs.teacher, '--epochs', '2', '--cache-check', '8'))
    from timm_distill.teacher.teacher import Teacher
    run = Teacher._run

    def drifted(self: Any, images: torch.Tensor, outputs: Any) -> Any:
        features = run(self, images, outputs)
        features.logits = features.logits * 1.05
        return features
    monkeypatch.setattr(Teacher, '_run', drifted)
    with pytest.raises(CacheMismatchError, match='other logits than --teacher-cache'):
        runs('--kd', 'kd', *runs.teacher, '--epochs', '2', '--cache-check', '8')


def test_a_full_disk_stops_the_fill_and_not_the_training(
        runs: Runs,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
) -> None:
    whole = runs('--kd', 'kd', *runs.teacher, '--epochs', '2', '--cache-views', '2')
    write, writes = table_module._write_all, []

    def fill_up(file: Any, data: bytes) -> None:
        writes.append(len(data))
        if len(writes) > 1:
            raise OSError(errno.ENOSPC, 'No space left on device')
        write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(table_module, '_write_all', fill_up)
        other = runs(
            '--kd', 'kd', *runs.teacher, '--epochs', '2', '--cache-views', '2', cache=runs.root / 'full')
    assert_equal(whole, other)
    assert 'nothing more is stored' in caplog.text
    runs('--kd', 'kd', *runs.teacher, '--epochs', '2', cache=runs.root / 'full')


def test_teacher_outputs_that_are_not_finite_are_not_stored(
        runs: Runs,
        monkeypatch: pytest.MonkeyPatch,
) -> None:
    from timm_distill.teacher.teacher import Teacher
    run = Teacher._run

    def spoil(self: Any, images: torch.Tensor, outputs: Any) -> Any:
        features = run(self, images, outputs)
        features.logits[0] = 1e5  # too large for float16
        return features
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, '_run', spoil)
        runs('--kd', 'kd', *runs.teacher, '--epochs', '1', '--cache-views', '1')
    with pytest.raises(UsageError, match='lacks 1 of 100 views'):  # the other was seen again at the end of the epoch
        runs('--kd', 'kd', '--epochs', '1')


def test_damage_found_while_a_run_reads_brings_its_teacher_and_is_mended(
        filled: Runs,
        caplog: pytest.LogCaptureFixture,
) -> None:
    damaged = filled.root / 'damaged'
    shutil.copytree(filled.cache, damaged)
    shard = next(damaged.glob('*/*.rows'))
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    assert_equal(filled.first, filled('--kd', 'kd', *filled.teacher, '--epochs', '1', cache=damaged))
    assert 'is damaged and was taken out' in caplog.text
    assert_equal(filled.first, filled('--kd', 'kd', '--epochs', '1', cache=damaged))


def test_a_run_without_teacher_leaves_the_cache_as_it_is(filled: Runs, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue('no_teacher')
    before = {path: path.read_bytes() for path in filled.cache.rglob('*') if path.is_file()}
    assert_equal(filled.first, filled('--kd', 'kd', '--epochs', '1'))
    assert before == {path: path.read_bytes() for path in filled.cache.rglob('*') if path.is_file()}
    assert len(before) == 4


def test_without_cache_and_teacher_the_message_says_what_to_give(runs: Runs) -> None:
    with pytest.raises(UsageError, match='has no cache.json: give the folder of a cache, or --teacher'):
        runs('--kd', 'kd', '--epochs', '1')
    assert not runs.cache.exists() and not (runs.root / 'out').exists()
