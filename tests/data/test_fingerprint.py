"""What tells a dataset from another: by every reader, whatever changes, and not by where it lies."""
import os
import random
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import pytest
import reader_images
import torch
from reader_images import READERS
from timm.data import create_dataset

from timm_distill.args import create_train_parser
from timm_distill.data import create_datasets, describe_changes, digest_fingerprint, fingerprint_dataset


@pytest.fixture
def folder(digits_dir: Path, tmp_path: Path) -> Path:
    """Four classes of ten images, of the same names in each."""
    for label in range(4):
        (tmp_path / 'data' / f'class {label}').mkdir(parents=True)
        for i, path in enumerate(sorted((digits_dir / 'train' / str(label)).iterdir())[:10]):
            shutil.copy(path, tmp_path / 'data' / f'class {label}' / f'{i}.png')
    return tmp_path / 'data'


def read(folder: Path) -> Dict[str, Any]:
    return fingerprint_dataset(create_dataset('', str(folder)))


def remove(folder: Path) -> None:
    (folder / 'class 1' / '3.png').unlink()


def add(folder: Path) -> None:
    shutil.copy(folder / 'class 1' / '3.png', folder / 'class 1' / 'new.png')
    shutil.copy(folder / 'class 1' / '3.png', folder / 'class 2' / 'new.png')


def swap(folder: Path) -> None:
    os.rename(folder / 'class 1', folder / 'aside')
    os.rename(folder / 'class 3', folder / 'class 1')
    os.rename(folder / 'aside', folder / 'class 3')


def rename(folder: Path) -> None:
    os.rename(folder / 'class 1', folder / 'kitten')


def drop(folder: Path) -> None:
    shutil.rmtree(folder / 'class 1')


def rename_one(folder: Path) -> None:
    os.rename(folder / 'class 1' / '3.png', folder / 'class 1' / 'x.png')


def exchange(folder: Path) -> None:
    """Move an image to another class and another one back."""
    for source, target in (('class 1/3.png', 'class 2/from 1.png'), ('class 2/4.png', 'class 1/from 2.png')):
        os.rename(folder / source, folder / target)


def encode_again(folder: Path) -> None:
    for path in (folder / 'class 1').iterdir():
        path.write_bytes(path.read_bytes() + b'\0')


@pytest.mark.parametrize('change, words', [
    (remove, ['40 images before, 39 now', "'class 1' has 9 images for 10 (1 removed"]),
    (add, ['40 images before, 42 now', "'class 1' has 11 images for 10 (1 added", "'class 2' has 11"]),
    (swap, ["'class 1' holds what 'class 3' held", "'class 3' holds what 'class 1' held"]),
    (rename, ["'class 1' is called 'kitten' now", "class 'class 2' has the number 1 for 2"]),
    (drop, ['30 now', "'class 1' is gone (10 images)", "class 'class 3' has the number 2 for 3"]),
    (rename_one, ["'class 1' has as many images, but others"]),
    (exchange, ["'class 1' has as many images, but others", "'class 2' has as many"]),
    (encode_again, ["'class 1' has as many images, but others"]),
])
def test_change_of_class_folders_is_named(folder: Path, change: Callable[[Path], None], words: List[str]) -> None:
    before = read(folder)
    change(folder)
    changes = '; '.join(describe_changes(before, read(folder)))
    assert all(word in changes for word in words), changes


def test_folder_elsewhere_holds_the_same_data(folder: Path, tmp_path: Path) -> None:
    before = read(folder)
    (tmp_path / 'deeper').mkdir()
    names = sorted(path.relative_to(folder) for path in folder.rglob('*.png'))
    random.Random(0).shuffle(names)
    for name in names:  # written in another order
        (tmp_path / 'deeper' / 'copy' / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, tmp_path / 'deeper' / 'copy' / name)
    assert describe_changes(before, read(tmp_path / 'deeper' / 'copy')) == []
    assert describe_changes(before, read(Path(f'{folder}/'))) == []


def test_many_changes_are_not_all_listed(folder: Path) -> None:
    before = read(folder)
    for i in range(20):
        shutil.copytree(folder / 'class 0', folder / f'other {i}')
    changes = '; '.join(describe_changes(before, read(folder)))
    assert 'and 15 more of that' in changes and len(changes) < 1000


@pytest.mark.parametrize('reader', READERS)
def test_every_reader_tells_its_data_from_others(
        tmp_path: Path, reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write, flags = READERS[reader]

    def _read(name: str) -> Dict[str, Any]:
        root = tmp_path / name
        root.mkdir()
        write(root)
        args = create_train_parser().parse_args([str(flag) for flag in ['--batch-size', 2, *flags(root)]])
        return fingerprint_dataset(create_datasets(args, {'input_size': (3, 32, 32)}, 2)[0])

    first, again = _read('first'), _read('again')
    monkeypatch.setattr(reader_images, 'DEEP', 65535 - reader_images.DEEP)  # other images of the same names
    other = _read('other')
    assert first['num_samples'] == 2 and describe_changes(first, again) == []
    assert 'but others' in ' '.join(describe_changes(first, other))
    if reader not in ('wds', 'hfids'):
        assert first['classes'] == {'a': 0, 'b': 1}
        assert {name: count for name, (count, _) in first['groups'].items()} == {'a': 1, 'b': 1}


class Arrays(torch.utils.data.Dataset):
    """A dataset of torchvision that lies in memory."""

    def __init__(self, targets: List[int], data: np.ndarray):
        self.targets, self.data, self.class_to_idx = targets, data, {'cat': 0, 'dog': 1}

    def __len__(self) -> int:
        return len(self.targets)


def test_images_in_memory_have_labels_order_and_content() -> None:
    data = np.arange(4 * 12, dtype=np.uint8).reshape(4, 2, 2, 3)
    before = fingerprint_dataset(Arrays([0, 0, 1, 1], data))
    assert describe_changes(before, fingerprint_dataset(Arrays([0, 0, 1, 1], data.copy()))) == []
    relabelled, moved = Arrays([0, 1, 1, 1], data), Arrays([0, 0, 1, 1], data[[0, 1, 3, 2]])
    assert "'cat' has 1 image for 2" in ' '.join(describe_changes(before, fingerprint_dataset(relabelled)))
    assert "'dog' has as many images, but others" in describe_changes(before, fingerprint_dataset(moved))
    plain = np.zeros_like(data)
    orders = [fingerprint_dataset(Arrays(targets, plain)) for targets in ([0, 0, 1, 1], [0, 1, 0, 1])]
    assert describe_changes(*orders) == ['the images come in another order']


def test_unreadable_files_and_odd_names_have_a_fingerprint(folder: Path) -> None:
    os.mkdir(os.fsencode(folder) + b'/caf\xe9')
    (folder / 'class 0' / '0.png').rename(os.fsdecode(os.fsencode(folder) + b'/caf\xe9/\xff.png'))
    if hasattr(os, 'mkfifo'):
        os.mkfifo(folder / 'class 1' / 'a.png')
    os.symlink('nowhere.png', folder / 'class 1' / 'b.png')
    before = read(folder)
    assert before['groups'][os.fsdecode(b'caf\xe9')][0] == 1 and before['groups']['class 1'][0] >= 11
    assert digest_fingerprint(before) == digest_fingerprint(read(folder))
