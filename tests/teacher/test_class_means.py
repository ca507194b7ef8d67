"""The teacher's class means: the pass, the cache, the file, and the script's phase."""
import itertools
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest
import timm
import torch
from golden_data import GoldenCase, case_id, golden_cases
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import save_file
from timm.data.distributed_sampler import OrderedDistributedSampler
from torch.utils.data import DataLoader, TensorDataset

import train_distill
from timm_distill import Teacher, UsageError, compute_class_means
from timm_distill.features.spec import Features
from timm_distill.run import prepare
from timm_distill.teacher import class_means
from timm_distill.teacher.class_means import (
    cached_class_means,
    class_means_key,
    load_class_means,
    save_class_means,
)
from timm_distill.teacher.preprocessing import InputRecord
from timm_distill.teacher.teacher import wrap_teacher

SIZE, CLASSES, WIDTH = (3, 32, 32), 5, 96


def create_teacher(seed: int = 0) -> Teacher:
    torch.manual_seed(seed)
    return Teacher(timm.create_model('test_resnet', num_classes=CLASSES), SIZE)


def create_data(size: int = 11) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(size, *SIZE, generator=generator), torch.arange(size) % 4)


def expected_means(teacher: Teacher, data: TensorDataset) -> torch.Tensor:
    images, labels = data.tensors
    features = teacher(images, frozenset({'pre_logits'})).pre_logits.double()
    means = [features[labels == k].mean(0) if (labels == k).any() else torch.zeros(WIDTH) for k in range(CLASSES)]
    return torch.stack([mean.float() for mean in means])


class GoldenTeacher(torch.nn.Module):
    """A teacher whose pre-logits are its input."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def tap_channels(self, point: str) -> int:
        return self.width

    def forward(self, images: torch.Tensor, outputs: Any) -> Features:
        return Features(pre_logits=images)


@pytest.mark.parametrize('case', golden_cases('nd', having='emb'), ids=case_id)
def test_means_equal_the_official_codes_up_to_its_rounding(case: GoldenCase) -> None:
    num_classes, width = case['class_means'].shape
    loader = DataLoader(TensorDataset(case['emb'], case['target']), batch_size=4)
    means = compute_class_means(GoldenTeacher(width), loader, num_classes)  # type: ignore[arg-type]
    tolerance = 1.01 * 10 ** -case.hparams['decimals']
    torch.testing.assert_close(means.double(), case['class_means'], rtol=0., atol=tolerance)


@pytest.mark.parametrize('batch_size', [3, 11])
def test_means_are_those_of_every_image_whatever_the_batches(batch_size: int, caplog: Any) -> None:
    teacher, data = create_teacher(), create_data()
    means = compute_class_means(teacher, DataLoader(data, batch_size=batch_size), CLASSES)
    torch.testing.assert_close(means, expected_means(teacher, data))
    assert means.dtype == torch.float32 and not means.requires_grad
    assert '1 of 5 classes have no training image' in caplog.text


def test_pass_leaves_the_random_state_as_it_was() -> None:
    teacher = create_teacher()
    state = torch.get_rng_state()
    compute_class_means(teacher, DataLoader(create_data(), batch_size=4, shuffle=True), CLASSES)
    assert torch.equal(torch.get_rng_state(), state)


def _run_rank(folder: Path, rank: int, world_size: int) -> torch.Tensor:
    teacher, data = create_teacher(), create_data()
    loader = DataLoader(data, batch_size=4, sampler=OrderedDistributedSampler(data))
    calls: List[int] = []

    def _compute() -> torch.Tensor:
        calls.append(1)
        return compute_class_means(teacher, loader, CLASSES, distributed=True)

    for _ in range(2):
        means = cached_class_means(
            f'{folder}/means.safetensors', (CLASSES, WIDTH), _compute, {}, torch.device('cpu'), distributed=True)
    assert len(calls) == 1, 'the second time it comes from the file'
    return means


@pytest.mark.dist
def test_ranks_share_the_pass_and_count_every_image_once(tmp_path: Path) -> None:
    expected = expected_means(create_teacher(), create_data())
    for means in run_ranks(partial(_run_rank, tmp_path), tmp_path):
        torch.testing.assert_close(means, expected)


def test_saved_means_are_read_again(tmp_path: Path) -> None:
    means, path = torch.randn(CLASSES, 3), str(tmp_path / 'new' / 'means.safetensors')
    save_class_means(path, means, {'teacher': 'test_resnet'})
    assert torch.equal(load_class_means(path, (CLASSES, 3)), means)
    with safe_open(path, 'pt') as file:
        metadata = file.metadata()
    assert metadata.pop('sha256') and metadata == {'teacher': 'test_resnet'}
    assert os.listdir(tmp_path / 'new') == ['means.safetensors']


@pytest.mark.parametrize('content, words', [
    (None, ['no such file']),
    (b'no safetensors file', ['not a safetensors file']),
    ({'means': torch.zeros(5, 3)}, ["no tensor 'class_means'", 'means']),
    ({'class_means': torch.zeros(5, 2)}, ['[5, 2]', '[5, 3]', 'Leave the flag out']),
    ({'class_means': torch.full((5, 3), torch.nan)}, ['not finite']),
])
def test_wrong_file_is_named_with_the_reason(tmp_path: Path, content: Any, words: List[str]) -> None:
    path = tmp_path / 'means.safetensors'
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file(content, str(path))
    with pytest.raises(UsageError) as error:
        load_class_means(str(path), (5, 3))
    assert all(word in str(error.value) for word in ['--nd-class-means', str(path), *words])


def test_key_depends_on_weights_files_labels_and_transform(digits_dir: Path, tmp_path: Path) -> None:
    def _key(seed: int = 0, root: Path = digits_dir, transform: str = 'resize') -> str:
        dataset = timm.data.create_dataset('', str(root), split='train')
        return class_means_key(create_teacher(seed), dataset, [transform])

    other = tmp_path / 'data'
    other.mkdir()
    (other / 'train').symlink_to(digits_dir / 'train')
    keys = [_key(), _key(seed=1), _key(transform='crop'), _key(root=digits_dir / 'validation')]
    assert len(set(keys)) == 4
    assert _key() == keys[0] == _key(root=other)  # where the folder lies does not matter


KINDS: Dict[str, Dict[str, Any]] = {
    'as it is': {},
    'activation': {'kwargs': {'act_layer': 'silu'}},
    'pooling': {'kwargs': {'global_pool': 'max'}},
    'stride': {'kwargs': {'output_stride': 16}},
    'mean': {'cfg': {'mean': (0.1, 0.2, 0.3)}},
    'std': {'cfg': {'std': (0.1, 0.2, 0.3)}},
    'size': {'records': [InputRecord('a file', size=(48, 48))]},
    'filter': {'records': [InputRecord('a file', size=(48, 48), interpolation='nearest')]},
    'precision': {'dtype': torch.bfloat16},
    'autocast': {'autocast': False},
    'image': {'image': b'other'},
    'label': {'rename': True},
    'run': {'settings': 'bfloat16'},
}


def test_key_depends_on_all_that_changes_the_numbers(digits_dir: Path, tmp_path: Path) -> None:
    """With weights that are the same throughout."""
    root = tmp_path / 'train'
    shutil.copytree(digits_dir / 'train', root)

    def _key(
            kwargs: Any = None, cfg: Any = None, settings: str = 'float32', image: bytes = b'', rename: bool = False,
            **teacher: Any,
    ) -> str:
        torch.manual_seed(0)
        model = timm.create_model('test_resnet', num_classes=CLASSES, **(kwargs or {}))
        model.pretrained_cfg = {**model.pretrained_cfg, **(cfg or {})}
        path = root / '3' / '0.png' if (root / '3' / '0.png').exists() else sorted((root / '3').iterdir())[0]
        content = path.read_bytes()
        path.write_bytes(content + image)
        if rename:
            os.rename(root / '3', root / '99')
        try:
            data = timm.data.create_dataset('', str(root))
            return class_means_key(wrap_teacher(model, SIZE, **teacher), data, [settings])
        finally:
            if rename:
                os.rename(root / '99', root / '3')
            path.write_bytes(content)

    keys = {name: _key(**kind) for name, kind in KINDS.items()}
    same = [pair for pair in itertools.combinations(keys, 2) if keys[pair[0]] == keys[pair[1]]]
    assert not same and _key() == keys['as it is']


@pytest.mark.parametrize('damage', ['cut', 'bit', 'empty', 'foreign', 'folder', 'link'])
def test_damaged_cache_is_computed_again_with_a_warning(tmp_path: Path, damage: str, caplog: Any) -> None:
    means, path = torch.randn(CLASSES, 3), tmp_path / 'means.safetensors'
    save_class_means(str(path), means, {})
    content = bytearray(path.read_bytes())
    if damage == 'bit':
        content[-3] ^= 1
    path.write_bytes({'cut': content[:-5], 'bit': content, 'empty': b'', 'foreign': b'means'}.get(damage, b''))
    if damage in ('folder', 'link'):
        path.unlink()
        path.mkdir() if damage == 'folder' else path.symlink_to('nowhere')
    found = cached_class_means(str(path), (CLASSES, 3), lambda: means, {}, torch.device('cpu'))
    assert torch.equal(found, means) and 'computed again' in caplog.text
    if damage != 'folder':
        assert torch.equal(load_class_means(str(path), (CLASSES, 3)), means)


def test_given_file_that_is_damaged_is_refused(tmp_path: Path) -> None:
    path = tmp_path / 'means.safetensors'
    save_class_means(str(path), torch.randn(CLASSES, 3), {})
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match='damaged'):
        load_class_means(str(path), (CLASSES, 3))


def test_means_are_flushed_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: List[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda handle: (steps.append('fsync'), fsync(handle)))
    monkeypatch.setattr(os, 'replace', lambda *paths: (steps.append('replace'), replace(*paths)))
    save_class_means(str(tmp_path / 'means.safetensors'), torch.zeros(2, 3), {'teacher': 'local-dir:/caf\udce9'})
    assert steps == ['fsync', 'replace', 'fsync']


def test_means_that_cannot_be_kept_are_used_all_the_same(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def _full(path: str) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(class_means, 'flush', _full)
    means = torch.randn(CLASSES, 3)
    path = str(tmp_path / 'means.safetensors')
    assert cached_class_means(path, (CLASSES, 3), lambda: means, {}, torch.device('cpu')) is means
    assert 'No space left' in caplog.text and not os.listdir(tmp_path)


FAST = [
    '--num-classes', '10', '--img-size', '32', '-b', '30', '--warmup-epochs', '0', '--device', 'cpu', '-j', '0',
    '--epochs', '1', '--no-teacher-pretrained', '--student', 'test_efficientnet', '--teacher', 'test_resnet',
    '--no-report']


def run(data_dir: Path, output: Path, *flags: str, teacher: Optional[Path] = None, experiment: str = 'run') -> Any:
    weights = ['--teacher-checkpoint', str(teacher)] if teacher else []
    return train_distill.main([
        '--data-dir', str(data_dir), '--output', str(output), '--experiment', experiment, *FAST,
        *weights, *flags])


@pytest.fixture(scope='module')
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('teacher') / 'teacher.safetensors'
    torch.manual_seed(0)
    save_file(timm.create_model('test_resnet', num_classes=10).state_dict(), str(path))
    return path


def read_history(result: Any) -> Dict[str, float]:
    return result.history[-1]['train']


def test_script_computes_caches_reuses_and_resumes(
        few_digits_dir: Path, teacher_file: Path, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level('INFO')
    first = run(few_digits_dir, tmp_path, '--kd', 'kd++', '--mixup', '0.2', teacher=teacher_file)
    (cached,) = (tmp_path / 'class_means').iterdir()
    means = load_class_means(str(cached), (10, WIDTH))
    assert (means.norm(dim=1) > 0).all() and 'are kept in' in caplog.text
    assert 0 < read_history(first)['nd_loss'] < 2

    def _no_pass(*args: Any, **kwargs: Any) -> None:
        raise AssertionError('there is nothing to compute')

    monkeypatch.setattr(prepare, 'compute_class_means', _no_pass)
    again = run(few_digits_dir, tmp_path, '--kd', 'kd++', '--mixup', '0.2', teacher=teacher_file, experiment='again')
    assert read_history(again) == read_history(first)  # the pass moves nothing of the run
    given = run(
        few_digits_dir, tmp_path / 'other', '--kd', 'kd++', '--mixup', '0.2', '--nd-class-means', str(cached),
        teacher=teacher_file)
    assert read_history(given) == read_history(first)
    cached.unlink()
    last = f'{first.output_dir}/last.pth.tar'
    resumed = run(few_digits_dir, tmp_path, '--kd', 'kd++', '--epochs', '2', '--resume', last, teacher=teacher_file)
    assert read_history(resumed)['nd_loss'] > 0
    assert not list((tmp_path / 'class_means').iterdir())


def test_script_reads_training_images_with_either_transform(
        few_digits_dir: Path, teacher_file: Path, tmp_path: Path) -> None:
    for transform in ('eval', 'train'):
        run(
            few_digits_dir, tmp_path, '--kd', 'nd', '--nd-class-means-transform', transform, '--train-crop-mode', 'rrc',
            teacher=teacher_file, experiment=transform)
    first, second = (load_class_means(str(path), (10, WIDTH)) for path in (tmp_path / 'class_means').iterdir())
    difference = (first - second).norm() / first.norm()
    assert 1e-3 < difference < 1


def test_dry_run_of_a_method_with_class_means_needs_none(caplog: Any, capsys: Any) -> None:
    train_distill.main([*FAST, '--kd', 'nd', '--dry-run'])
    assert 'works' in capsys.readouterr().out


def test_pass_of_a_run_that_reads_sample_indices_too(few_digits_dir: Path, teacher_file: Path, tmp_path: Path) -> None:
    for kd, options in (('nd', ()), ('crd+nd', ('--kd-kwargs', 'crd.negatives=8'))):
        run(few_digits_dir, tmp_path / kd, '--kd', kd, '--train-crop-mode', 'rrc', *options, teacher=teacher_file)
    plain, indexed = (next((tmp_path / kd / 'class_means').iterdir()) for kd in ('nd', 'crd+nd'))
    assert plain.name == indexed.name
    assert torch.equal(load_class_means(str(plain), (10, WIDTH)), load_class_means(str(indexed), (10, WIDTH)))


@pytest.mark.parametrize('transform', ['eval', 'train'])
def test_pass_of_a_run_with_augmented_splits(
        few_digits_dir: Path, teacher_file: Path, tmp_path: Path, transform: str) -> None:
    flags = ['--kd', 'nd', '--aa', 'rand-m3', '--aug-splits', '2', '-b', '20', '--nd-class-means-transform', transform]
    if transform == 'train':
        with pytest.raises(UsageError, match='--nd-class-means-transform'):
            run(few_digits_dir, tmp_path, *flags, teacher=teacher_file)
    else:
        run(few_digits_dir, tmp_path, *flags, teacher=teacher_file)
        assert len(list((tmp_path / 'class_means').iterdir())) == 1
