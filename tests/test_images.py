"""Promises about image files that cannot be read."""
import shutil
from pathlib import Path

import pytest
from timm.data import create_dataset, create_loader

from timm_distill.data import StrictImageDataset
from timm_distill.errors import UsageError


@pytest.fixture
def damaged_dir(digits_dir: Path, tmp_path: Path) -> Path:
    """Folder of ten images, of which the third and the fourth are cut off."""
    for i, path in enumerate(sorted((digits_dir / 'train' / '0').iterdir())[:10]):
        target = tmp_path / 'images' / str(i % 2) / f'{i}.png'
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for path in sorted((tmp_path / 'images').rglob('*.png'))[2:4]:
        path.write_bytes(path.read_bytes()[:60])
    return tmp_path / 'images'


def create(folder: Path, max_bad: int) -> StrictImageDataset:
    return StrictImageDataset(create_dataset('', root=str(folder)), max_bad)


def test_unreadable_image_is_replaced_by_the_next_one_with_a_warning(damaged_dir, caplog):
    dataset = create(damaged_dir, max_bad=2)
    images = [dataset[i][0].tobytes() for i in range(len(dataset))]
    assert images[2] == images[3] == images[4]
    assert dataset.num_bad == 2
    names = [dataset.filename(i) for i in (2, 3)]
    assert all(name in caplog.text for name in names) and '2 of at most 2' in caplog.text


def test_one_unreadable_image_too_many_stops_the_run(damaged_dir):
    dataset = create(damaged_dir, max_bad=1)
    with pytest.raises(UsageError, match=r'cannot read image .*--max-bad-images 1'):
        for i in range(len(dataset)):
            dataset[i]


def test_file_seen_in_every_epoch_counts_once(damaged_dir):
    dataset = create(damaged_dir, max_bad=2)
    for _ in range(3):
        for i in range(len(dataset)):
            dataset[i]
    assert dataset.num_bad == 2


@pytest.mark.parametrize('max_bad', [1, 2])
def test_loader_processes_count_together(damaged_dir, max_bad):
    dataset = create(damaged_dir, max_bad)
    loader = create_loader(  # one image a batch: the two damaged ones go to different processes
        dataset, (3, 8, 8), 1, is_training=False, num_workers=2, use_prefetcher=False, persistent_workers=False)
    if max_bad == 1:
        with pytest.raises(UsageError, match='--max-bad-images 1'):
            list(loader)
    else:
        assert len(list(loader)) == 10
        assert dataset.num_bad == 2


def test_default_stops_at_the_first(damaged_dir):
    with pytest.raises(UsageError, match='repair or remove it'):
        create(damaged_dir, max_bad=0)[2]
