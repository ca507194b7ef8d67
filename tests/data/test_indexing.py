"""Targets that say which sample of the training set an image is."""
import tarfile
from pathlib import Path
from typing import Any, List

import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from timm_distill.args import create_train_parser, parse_args
from timm_distill.data import IndexedDataset, create_loaders, index_samples, read_labels
from timm_distill.errors import UsageError

DATA_CONFIG = {
    'input_size': (3, 16, 16), 'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'interpolation': 'bicubic', 'crop_pct': 1.0,
    'crop_mode': 'center',
}


def create_train_loader(root: Path, *flags: str) -> Any:
    argv = ['--data-dir', str(root), '--val-split', '', '--no-aug', '-b', '4', '-j', '0', *flags]
    args = parse_args(create_train_parser(), argv)
    return create_loaders(args, DATA_CONFIG, 3, torch.device('cpu'), with_indices=True).train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of three images; the n-th of all is of brightness 20 n."""
    for label, name in enumerate(('ant', 'bee', 'cat')):
        (tmp_path / 'train' / name).mkdir(parents=True)
        for i in range(3):
            Image.new('RGB', (16, 16), color=(20 * (3 * label + i),) * 3).save(tmp_path / 'train' / name / f'{i}.png')
    return tmp_path


@pytest.mark.parametrize('flags', [[], ['--no-prefetcher'], ['-j', '2']])
def test_every_target_is_the_label_and_the_index_of_its_image(folder: Path, flags: List[str]) -> None:
    loader = create_train_loader(folder, *flags)
    seen = []
    for images, target in loader:
        assert (target.dtype, target.shape) == (torch.int64, (4, 2))
        brightness = (images.mean((1, 2, 3)) * 0.5 + 0.5) * 255
        torch.testing.assert_close(brightness, 20. * target[:, 1], rtol=0, atol=0.5)
        assert torch.equal(target[:, 0], target[:, 1] // 3)
        seen += target[:, 1].tolist()
    assert len(set(seen)) == len(seen) == 8


def test_labels_are_read_without_reading_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = create_train_loader(folder).dataset
    monkeypatch.setattr(Image, 'open', None)
    assert isinstance(dataset, IndexedDataset)
    assert read_labels(dataset).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_labels_of_a_tar_file_are_read(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / 'images.tar', 'w') as tar:
        tar.add(folder / 'train', arcname='.')
    loader = create_train_loader(tmp_path / 'images.tar')
    assert read_labels(loader.dataset).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_dataset_that_does_not_tell_its_labels_gives_none() -> None:
    class Silent(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 3

    assert read_labels(Silent()) is None


def test_streamed_dataset_is_refused() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(())

    with pytest.raises(UsageError, match='class folders'):
        index_samples(Stream())
