"""The crop of the CIFAR papers: what is cut out, what stays of timm's transform, and with which flags it goes."""
import argparse
import logging
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_loader
from torchvision.datasets import ImageFolder, VisionDataset
from torchvision.transforms.functional import pil_to_tensor

from timm_distill.args import check_train_args, create_train_parser, parse_args
from timm_distill.data import DataLoaders, create_loaders
from timm_distill.data.pad_crop import create_pad_crop, pad_size, use_pad_crop
from timm_distill.errors import UsageError

CPU = torch.device('cpu')
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
DATA_CONFIG: Dict[str, Any] = {
    'input_size': (3, 32, 32), 'mean': MEAN, 'std': STD, 'interpolation': 'bilinear', 'crop_pct': 1.,
    'crop_mode': 'center',
}
PLAIN = ('--color-jitter', '0', '--train-crop-mode', 'pad')


@pytest.fixture(scope='module')
def photos() -> Path:
    """A photograph."""
    pytest.importorskip('sklearn')
    from sklearn.datasets import load_sample_image
    return load_sample_image('china.jpg')


def write_photos(photos: Any, folder: Path, height: int = 32, width: int = 32) -> Path:
    """Write pieces of the photograph in two classes, four for training and one for validation each."""
    for split, count in (('train', 4), ('validation', 1)):
        for label in range(2):
            (folder / split / f'class{label}').mkdir(parents=True)
            for i in range(count):
                top, left = 60 * i + 20 * label, 70 * i + 30 * label
                piece = Image.fromarray(photos[top:top + height, left:left + width])
                piece.save(folder / split / f'class{label}' / f'{i}.png')
    return folder


@pytest.fixture
def folder(photos: Any, tmp_path: Path) -> Path:
    return write_photos(photos, tmp_path)


def train_args(folder: Path, *argv: str) -> argparse.Namespace:
    return parse_args(create_train_parser(), ['--data-dir', str(folder), '-b', '8', '-j', '0', *argv])


def loaders(folder: Path, *argv: str, **changes: Any) -> DataLoaders:
    return create_loaders(train_args(folder, *argv), {**DATA_CONFIG, **changes}, 2, CPU)


def normalized(image: torch.Tensor) -> torch.Tensor:
    return (image / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def shifts(image: torch.Tensor, rows: int = 4, columns: int = 4) -> List[torch.Tensor]:
    """Every crop of an image [C, H, W] among zeros, and its mirror image, normalised."""
    height, width = image.shape[1:]
    padded = F.pad(image, (columns, columns, rows, rows))
    crops = [
        padded[:, top:top + height, left:left + width]
        for top in range(2 * rows + 1) for left in range(2 * columns + 1)]
    return [normalized(view) for crop in crops for view in (crop, crop.flip(2))]


def draws(data: DataLoaders, epochs: int) -> Iterator[Tuple[torch.Tensor, int]]:
    for _ in range(epochs):
        for images, labels in data.train:
            yield from zip(images, labels.tolist())


def pixels_of(folder: Path) -> Dict[int, torch.Tensor]:
    """Return the training images of each class, [4, 3, H, W]."""
    return {
        label: torch.stack([
            pil_to_tensor(Image.open(path)).float() for path in sorted((folder / 'train' / f'class{label}').iterdir())])
        for label in range(2)}


@pytest.mark.parametrize('flags', [(), ('--no-prefetcher',)])
def test_training_image_is_one_of_the_81_shifts_of_the_image_among_black(folder: Path, flags: Tuple[str, ...]) -> None:
    allowed = {
        label: torch.stack([view for image in images for view in shifts(image)])
        for label, images in pixels_of(folder).items()}
    assert len(allowed[0]) == 4 * 81 * 2
    for image, label in draws(loaders(folder, *PLAIN, *flags), epochs=4):
        assert (allowed[label] - image).abs().amax(dim=(1, 2, 3)).min() < 1e-5


def test_every_shift_is_drawn_about_equally_often(photos: Any) -> None:
    image = Image.fromarray(photos[:32, :32])
    crop = create_pad_crop((32, 32), interpolation='bilinear', crop_pct=1.)
    torch.manual_seed(0)
    counts: Dict[bytes, int] = {}
    for _ in range(8100):
        key = crop(image).tobytes()
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 81
    assert 50 < min(counts.values()) and max(counts.values()) < 160


@pytest.mark.parametrize('height, width, crop_pct, mode', [
    (48, 64, 1., 'center'), (48, 64, 0.875, 'center'), (20, 20, 1., 'center'), (40, 60, 1., 'squash'),
    (40, 60, 1., 'border')])
def test_image_of_another_size_is_padded_as_validation_sees_it(
        photos: Any, tmp_path: Path, height: int, width: int, crop_pct: float, mode: str) -> None:
    write_photos(photos, tmp_path, height, width)
    data = loaders(tmp_path, *PLAIN, '--val-split', 'train', crop_pct=crop_pct, crop_mode=mode)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    seen = [((image * std + mean) * 255).round() for images, _ in data.eval for image in images]
    allowed = torch.stack([view for image in seen for view in shifts(image)])
    for image, _ in draws(data, epochs=1):
        assert (allowed - image).abs().amax(dim=(1, 2, 3)).min() < 1e-5


@pytest.mark.parametrize('size, padding', [
    ((32, 32), (4, 4)), ((64, 64), (8, 8)), ((224, 224), (28, 28)), ((32, 48), (4, 6)), ((36, 36), (4, 4))])
def test_zeros_are_an_eighth_of_the_size_on_each_side(
        photos: Any, size: Tuple[int, int], padding: Tuple[int, int]) -> None:
    assert pad_size(size) == padding
    height, width = size
    crop = create_pad_crop(size, interpolation='bilinear', crop_pct=1.)
    white = Image.new('RGB', (width, height), 'white')
    rows, columns = 0, 0
    torch.manual_seed(0)
    for _ in range(400):
        image = pil_to_tensor(crop(white))[0] > 0
        rows, columns = max(rows, height - int(image.any(1).sum())), max(columns, width - int(image.any(0).sum()))
    assert (rows, columns) == padding


@pytest.mark.parametrize('flags', [
    (), ('--aa', 'rand-m9-mstd0.5-inc1'), ('--aa', 'augmix-m3-w2'), ('--aa', 'original'), ('--vflip', '0.5'),
    ('--hflip', '0'), ('--color-jitter-prob', '0.3', '--grayscale-prob', '0.2'), ('--no-prefetcher', '--reprob', '0.4'),
    ('--aug-splits', '3', '--aa', 'rand-m9'), ('--train-img-sizes', '32', '64'), ('--use-multi-epochs-loader',),
])
def test_all_other_steps_of_timms_transform_are_unchanged(folder: Path, flags: Tuple[str, ...]) -> None:
    def steps(mode: str) -> List[List[Any]]:
        dataset = loaders(folder, '--train-crop-mode', mode, *flags).train.dataset
        chosen = getattr(dataset, 'transforms', None) or [dataset.transform]
        parts = [getattr(dataset, name, None) for name in ('augmentation', 'normalize')]
        return [list(t.transforms) for t in [*chosen, *parts] if t is not None]

    ours, theirs = steps('pad'), steps('rrc')
    assert len(ours) == len(theirs)
    for i, (changed, original) in enumerate(zip(ours, theirs)):
        first = i < (2 if '--train-img-sizes' in flags else 1)  # the splits' own transforms have no crop
        assert 'RandomResizedCrop' in repr(original[:1]) or not first
        assert 'RandomCrop' in repr(changed[:1]) or not first
        assert [type(step) for step in changed[first:]] == [type(step) for step in original[first:]]
        assert repr(changed[first:]) == repr(original[first:])


def test_sizes_of_a_schedule_have_an_eighth_each(folder: Path) -> None:
    transforms = loaders(folder, *PLAIN, '--train-img-sizes', '32', '64').train.dataset.transforms
    crops = [transform.transforms[0].transforms[-1] for transform in transforms]
    assert [(crop.size, tuple(crop.padding)) for crop in crops] == [((32, 32), (4, 4)), ((64, 64), (8, 8))]


@pytest.mark.parametrize('flags', [
    ('--aug-splits', '3', '--aa', 'rand-m9', '--reprob', '0.4', '--resplit'),
    ('--reprob', '0.4', '--mixup', '0.2'), ('-j', '2'), ('--aa', 'augmix-m3-w2', '--no-prefetcher'),
    ('--max-bad-images', '2'),
])
def test_pad_goes_with_the_other_augmentations(folder: Path, flags: Tuple[str, ...]) -> None:
    images, _ = next(iter(loaders(folder, *PLAIN, *flags).train))
    assert images.shape[1:] == (3, 32, 32) and images.isfinite().all()


def test_first_view_of_a_split_image_is_a_shift(folder: Path) -> None:
    data = loaders(folder, *PLAIN, '--aug-splits', '2', '--aa', 'rand-m9')
    allowed = torch.stack([view for images in pixels_of(folder).values() for image in images for view in shifts(image)])
    images, labels = next(iter(data.train))
    assert len(images) == 16
    for image in images[:8]:
        assert (allowed - image).abs().amax(dim=(1, 2, 3)).min() < 1e-5


@pytest.mark.parametrize('indexed', [False, True])
def test_readers_of_torchvision_are_cropped_too(folder: Path, indexed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(*_: Any, split: str, **__: Any) -> VisionDataset:
        return ImageFolder(str(folder / split))

    monkeypatch.setattr('timm_distill.data.datasets.create_dataset', create)
    args = train_args(folder, *PLAIN, '--dataset', 'torch/image_folder')
    data = create_loaders(args, DATA_CONFIG, 2, CPU, with_indices=indexed)
    allowed = torch.stack([view for images in pixels_of(folder).values() for image in images for view in shifts(image)])
    for images, _ in data.train:
        for image in images:
            assert (allowed - image).abs().amax(dim=(1, 2, 3)).min() < 1e-5


def test_streamed_images_are_cropped_too(folder: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip('webdataset')
    for split in ('train', 'validation'):
        with webdataset.TarWriter(str(tmp_path / f'{split}-0000.tar')) as writer:
            for i, path in enumerate(sorted((folder / split).rglob('*.png'))):
                writer.write({'__key__': f'{i:04d}', 'png': path.read_bytes(), 'cls': int(path.parent.name[-1])})
    splits = ('--train-split', 'train-{0000..0000}.tar', '--val-split', 'validation-{0000..0000}.tar')
    sizes = ('--train-num-samples', '8', '--val-num-samples', '2')
    data = loaders(tmp_path, *PLAIN, '--dataset', 'wds/photos', *splits, *sizes)
    allowed = torch.stack([view for images in pixels_of(folder).values() for image in images for view in shifts(image)])
    count = 0
    for image, _ in draws(data, epochs=1):
        assert (allowed - image).abs().amax(dim=(1, 2, 3)).min() < 1e-5
        count += 1
    assert count == 8


def test_grey_images_are_padded_with_black(folder: Path) -> None:
    data = loaders(
        folder, *PLAIN, '--in-chans', '1', input_size=(1, 32, 32), mean=(0.5,), std=(0.25,))
    images = torch.cat([images for images, _ in data.train])
    assert images.shape[1:] == (1, 32, 32) and images.min() == -2


def test_no_aug_wins_over_pad(folder: Path) -> None:
    steps = loaders(folder, *PLAIN, '--no-aug').train.dataset.transform.transforms
    assert 'Random' not in repr(steps)


def test_crop_pct_that_enlarges_the_image_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loaders(folder, *PLAIN)
        assert '--crop-pct' not in caplog.text
        loaders(folder, *PLAIN, crop_pct=0.875)
    assert '--crop-pct 1' in caplog.text


def test_pad_is_refused_for_patch_sequences(folder: Path) -> None:
    with pytest.raises(UsageError, match='--train-crop-mode pad works without it'):
        check_train_args(train_args(folder, *PLAIN, '--naflex-loader'))


@pytest.mark.parametrize('flag, values', [('--scale', ('0.5', '1')), ('--ratio', ('1', '1'))])
def test_flags_of_the_resized_crop_warn_that_they_have_no_effect(
        folder: Path, caplog: pytest.LogCaptureFixture, flag: str, values: Tuple[str, ...]) -> None:
    with caplog.at_level(logging.WARNING):
        check_train_args(train_args(folder, *PLAIN))
        assert flag not in caplog.text
        check_train_args(train_args(folder, *PLAIN, flag, *values))
    assert f'{flag} has no effect with --train-crop-mode pad' in caplog.text


def test_transform_without_timms_crop_is_an_error_and_not_left_as_it_is(folder: Path) -> None:
    dataset = ImageFolder(str(folder / 'train'))
    create_loader(dataset, (3, 32, 32), 4, is_training=True, train_crop_mode='rkrc', num_workers=0, device=CPU)
    with pytest.raises(RuntimeError, match='does not begin with'):
        use_pad_crop(dataset, interpolation='bilinear')
