"""Runs with cached targets: the first fills, later ones read, and what does not fit is refused."""
import errno
import shutil
from pathlib import Path
from typing import Any, Dict

import huggingface_hub
import pytest
import torch

import train_distill
from timm_distill import UsageError
from timm_distill.cache import location
from timm_distill.cache import table as table_module
from timm_distill.cache.targets import CacheMismatchError
from timm_distill.run import cache_teacher

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
    monkeypatch.setattr(cache_teacher, 'create_teacher', refuse)


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


def test_methods_that_need_layers_of_the_teacher_do_not_run_it_on_a_complete_cache(
        runs: Runs,
        monkeypatch: pytest.MonkeyPatch,
) -> None:
    from timm_distill.teacher.teacher import Teacher
    flags = ['--kd', 'srrl+wkd_l', *runs.teacher, '--epochs', '2']
    first = runs(*flags, '--cache-views', '2')
    monkeypatch.setattr(Teacher, 'forward', lambda *_: pytest.fail('the teacher ran'))
    assert_equal(first, runs(*flags))


def test_class_means_come_from_the_teacher_where_it_is_given_and_from_their_file_where_not(runs: Runs) -> None:
    first = runs('--kd', 'nd', *runs.teacher, '--epochs', '1', '--cache-views', '1')
    shutil.rmtree(runs.root / 'out' / 'class_means')
    assert_equal(first, runs('--kd', 'nd', *runs.teacher, '--epochs', '1'))
    with pytest.raises(UsageError, match='give --teacher, or their file with --nd-class-means'):
        runs('--kd', 'nd', '--epochs', '1')
    (means,) = (runs.root / 'out' / 'class_means').iterdir()
    assert_equal(first, runs('--kd', 'nd', '--epochs', '1', '--nd-class-means', str(means)))


def test_a_teacher_of_other_classes_is_cached_with_its_map_and_another_map_is_refused(runs: Runs) -> None:
    file, other = runs.root / 'classes.txt', runs.root / 'other.txt'
    file.write_text('0\t1\t2\n1\t0\n2\t3\n')
    other.write_text('0\t1\t2\n1\t0\n2\t4\n')
    flags = ['--kd', 'kd', '--epochs', '1']
    mapped = ['--teacher-classes', str(file)]
    first = runs(*flags, *runs.teacher, *mapped, '--cache-views', '1')
    assert_equal(first, runs(*flags, *mapped))
    assert_equal(first, runs(*flags, *mapped, *runs.teacher, '--cache-check', '8'))
    for difference in ([], ['--teacher-classes', str(other)]):
        for teacher in ([], runs.teacher):
            with pytest.raises(UsageError, match="the teacher's classes .* in the cache"):
                runs(*flags, *teacher, *difference)
    plain = runs.root / 'plain'
    runs(*flags, *runs.teacher, '--cache-views', '1', cache=plain)
    with pytest.raises(UsageError, match="the teacher's classes None in the cache"):
        runs(*flags, *mapped, cache=plain)


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
    with pytest.raises(UsageError, match='feature-avg1x1-float16.*give --teacher'):
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
    (['--kd', 'srrl'], 'layers of the teacher itself, which no cache holds: give --teacher'),
    (['--kd', 'sdd:wkd_l+kd'], '--kd sdd:wkd_l\\+wkd_l runs layers of the teacher'),
])
def test_a_cache_of_something_else_is_refused_with_the_difference(filled: Runs, flags: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        filled('--kd', 'kd', '--epochs', '1', *flags)


@pytest.mark.parametrize('flags, words', [
    (['--teacher-dtype', 'bfloat16'], "the teacher's precision float32 in the cache, bfloat16 here"),
    (['--teacher-mean', '0.1', '0.2', '0.3'], "the teacher's mean .* in the cache, 0.1 0.2 0.3 here"),
    (['--teacher-img-size', '64'], "the teacher's input size 3 32 32 in the cache, 3 64 64 here"),
    (['--teacher', 'test_resnet'], "the teacher's architecture test_vit in the cache, test_resnet here"),
])
@pytest.mark.parametrize('live', [False, True])
def test_flags_of_another_teacher_are_refused_also_where_the_cache_is_complete(
        filled: Runs,
        flags: Any,
        words: str,
        live: bool,
) -> None:
    if live and '--teacher' in flags:
        pytest.skip('its weights do not fit')
    teacher = filled.teacher if live else []
    with pytest.raises(UsageError, match=words):
        filled('--kd', 'kd', *teacher, '--epochs', '1', *flags, *(['--cache-check', '1'] if live else []))


def test_a_resumed_run_is_told_that_its_cache_has_other_views(
        filled: Runs,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
) -> None:
    def run(*flags: str) -> None:
        train_distill.main([
            '--data-dir', str(filled.data_dir), *FLAGS, '--kd', 'kd', *filled.teacher, '--teacher-cache',
            str(tmp_path / 'cache'), '--output', str(tmp_path), '--experiment', 'run', '--epochs', '2', *flags])

    run('--cache-views', '2', '--stop-epoch', '1')
    shutil.move(tmp_path / 'cache', tmp_path / 'two')
    shutil.copytree(filled.cache, tmp_path / 'cache')
    run('--resume', 'auto')
    assert 'other than when' in caplog.text and 'views of an image 2 -> 1' in caplog.text


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


def test_a_cache_of_the_hub_is_read_and_never_written(
        filled: Runs,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
) -> None:
    snapshot = tmp_path / 'snapshot'
    for path in [path for path in filled.cache.rglob('*') if path.is_file()]:
        target = snapshot / 'vit' / path.relative_to(filled.cache)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)  # as the hub's client lays them
    files = sorted(snapshot.rglob('*'))
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda *args, **kwargs: str(snapshot))
    location._download.cache_clear()
    place = 'hf://datasets/me/targets/vit'
    assert_equal(filled.first, filled('--kd', 'kd', '--epochs', '1', cache=place))
    filled('--kd', 'feature', *filled.teacher, '--epochs', '1', cache=place)  # what it lacks the teacher says each time
    with pytest.raises(UsageError, match='has no cache.json'):
        filled('--kd', 'kd', *filled.teacher, '--epochs', '1', cache='hf://datasets/me/targets')
    assert sorted(snapshot.rglob('*')) == files


def test_a_folder_that_cannot_be_written_is_refused_before_a_new_cache_is_filled(runs: Runs) -> None:
    runs.cache.write_text('a file')
    with pytest.raises(UsageError, match='holds no cache yet and cannot be written|cannot be read'):
        runs('--kd', 'kd', *runs.teacher, '--epochs', '1')
    assert runs.cache.read_text() == 'a file'
