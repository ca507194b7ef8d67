"""Promises about image files that cannot be read."""
import os
import shutil
import threading
from pathlib import Path

import pytest
from PIL import Image
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


def write_broken(folder: Path, name: str) -> None:
    """Write an image whose header is sound and whose rest is not, each in a way that PIL has its own exception for."""
    image = Image.radial_gradient('L').convert('RGB').resize((64, 64))
    kind = name.rpartition('.')[2]
    path = folder / name
    if kind == 'dds':
        image.save(path)
        data = bytearray(path.read_bytes())
        data[80:84] = (0x40000000).to_bytes(4, 'little')  # a pixel format that there is not
    elif kind == 'tif':
        image.save(path)
        data = bytearray(path.read_bytes())
        start = int.from_bytes(data[4:8], 'little')
        data[start + 4:start + 40] = bytes(36)  # tags of type 0
    elif kind == 'avif':
        image.save(path)
        data = bytearray(path.read_bytes())
        data[len(data) // 2:] = b'\xff' * (len(data) - len(data) // 2)
    elif kind == 'qoi':
        data = bytearray(b'qoif' + (64).to_bytes(4, 'big') * 2 + bytes([3, 0]) + b'\xff')
    else:  # a bomb
        data = bytearray(b'P5 60000 60000 255\n')
    path.write_bytes(data)


@pytest.mark.parametrize('kind', ['avif', 'dds', 'tif', 'qoi', 'pgm'])
def test_whatever_pil_raises_counts_as_one_unreadable_image(damaged_dir, caplog, kind):
    for path in sorted(damaged_dir.rglob('*.png'))[2:4]:
        path.unlink()
    try:
        write_broken(damaged_dir / '0', f'0.{kind}')
    except (KeyError, OSError, ValueError):
        pytest.skip(f'this PIL writes no {kind}')
    with pytest.raises(Exception) as error:
        Image.open(damaged_dir / '0' / f'0.{kind}').load()
    source = create_dataset('', root=str(damaged_dir), input_key=f'.png;.{kind}')
    assert len(source) == 9, error.value
    dataset = StrictImageDataset(source, max_bad=1)
    for i in range(len(dataset)):
        dataset[i]
    assert dataset.num_bad == 1 and f'0.{kind}' in caplog.text
    with pytest.raises(UsageError, match=rf'cannot read image .*0\.{kind}'):
        for i in range(len(dataset)):
            StrictImageDataset(source)[i]


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='has no FIFOs')
def test_fifo_among_the_images_is_one_unreadable_image_and_blocks_nobody(damaged_dir):
    for path in sorted(damaged_dir.rglob('*.png'))[2:4]:
        path.unlink()
    os.mkfifo(damaged_dir / '0' / 'pipe.png')
    os.symlink('nowhere.png', damaged_dir / '1' / 'link.png')
    counts = []

    def _read() -> None:
        dataset = create(damaged_dir, max_bad=2)
        for i in range(len(dataset)):
            dataset[i]
        counts.append(dataset.num_bad)

    thread = threading.Thread(target=_read, daemon=True)
    thread.start()
    thread.join(20)
    assert counts == [2]
    with pytest.raises(UsageError, match='no regular file but a FIFO'):
        dataset = create(damaged_dir, max_bad=0)
        dataset[[name.endswith('pipe.png') for name in dataset.filenames()].index(True)]
