"""Images without labels, from every source that timm reads, and the part of them that is held out."""
import argparse
import io
import json
import logging
import shutil
import tarfile
from pathlib import Path
from typing import Any, List, Set

import pytest
import torch
from PIL import Image

from timm_distill.args import create_train_parser, parse_args
from timm_distill.data import create_datasets, create_loaders, find_missing_labels, fingerprint_dataset
from timm_distill.data.holdout import choose_by_name
from timm_distill.errors import UsageError

CPU = torch.device('cpu')
DATA_CONFIG = {
    'input_size': (3, 32, 32), 'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'interpolation': 'bicubic', 'crop_pct': 1.0,
    'crop_mode': 'center'}


def image_bytes(shade: int = 0) -> bytes:
    data = io.BytesIO()
    Image.new('RGB', (36, 34), color=(shade % 256, 100, 50)).save(data, format='png')
    return data.getvalue()


def write_images(folder: Path, count: int, start: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f'{start + i}.png').write_bytes(image_bytes(9 * (start + i)))


def write_tar(path: Path, names: List[str]) -> None:
    with tarfile.open(path, 'w') as tar:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            data = b'7' if name.endswith('.cls') else image_bytes(9 * i)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def args_of(root: Path, *argv: str) -> argparse.Namespace:
    return parse_args(create_train_parser(), ['--data-dir', str(root), '-b', '4', '-j', '0', *argv])


def datasets_of(root: Path, *argv: str) -> Any:
    return create_datasets(args_of(root, '--no-labels', *argv), DATA_CONFIG, 0)


def names_of(dataset: Any) -> Set[str]:
    return {dataset.reader.filename(i) for i in range(len(dataset))}


def test_images_in_the_data_folder_or_its_training_folder_have_no_labels(tmp_path: Path) -> None:
    write_images(tmp_path / 'flat', 5)
    write_images(tmp_path / 'split' / 'train', 5)
    for root in (tmp_path / 'flat', tmp_path / 'split'):
        assert 'no class folders' in find_missing_labels(args_of(root))
        dataset, dataset_eval = datasets_of(root)
        assert len(dataset) == 5 and dataset_eval is None
        assert {dataset[i][1] for i in range(5)} == {0}


def test_class_folders_have_labels_and_a_mixture_is_left_to_the_user(tmp_path: Path) -> None:
    write_images(tmp_path / 'train' / 'ant', 2)
    write_images(tmp_path / 'train' / 'bee', 2)
    assert find_missing_labels(args_of(tmp_path)) == ''
    write_images(tmp_path / 'train', 1)
    assert find_missing_labels(args_of(tmp_path)) == ''
    with pytest.raises(UsageError, match='outside of class folders.*--no-labels'):
        create_datasets(args_of(tmp_path, '--val-split', ''), DATA_CONFIG, 2)
    assert len(datasets_of(tmp_path)[0]) == 5


def test_no_labels_takes_images_nested_at_will_and_leaves_the_validation_folder_out(tmp_path: Path) -> None:
    write_images(tmp_path / '2024' / 'may', 3)
    write_images(tmp_path / '2024' / 'june' / 'trip', 4, start=3)
    write_images(tmp_path, 2, start=7)
    write_images(tmp_path / 'val' / 'ant', 2, start=20)
    dataset, dataset_eval = datasets_of(tmp_path)
    assert len(dataset) == 9 and names_of(dataset_eval) == {'ant/20.png', 'ant/21.png'}
    assert not any('val' in name for name in names_of(dataset))


@pytest.mark.parametrize('split', ['train', ''], ids=['training folder', 'data folder'])
def test_an_empty_folder_is_one_message(tmp_path: Path, split: str) -> None:
    (tmp_path / split).mkdir(exist_ok=True)
    with pytest.raises(UsageError, match='Found 0 images') as error:
        datasets_of(tmp_path)
    assert '\n' not in str(error.value)


def test_a_tar_file_without_folders_has_no_labels(tmp_path: Path) -> None:
    write_tar(tmp_path / 'flat.tar', ['a.png', './b.png', 'c.png'])
    write_tar(tmp_path / 'classes.tar', ['ant/a.png', 'bee/b.png'])
    assert 'in no folders' in find_missing_labels(args_of(tmp_path / 'flat.tar'))
    assert find_missing_labels(args_of(tmp_path / 'classes.tar')) == ''
    for name, count in (('flat.tar', 3), ('classes.tar', 2)):
        dataset, dataset_eval = datasets_of(tmp_path / name)
        assert len(dataset) == count and dataset_eval is None
        assert {dataset[i][1] for i in range(count)} == {0}


@pytest.mark.parametrize('kind', ['hfds', 'hfids'])
def test_a_table_without_a_label_column_has_no_labels(tmp_path: Path, kind: str) -> None:
    hf = pytest.importorskip('datasets')
    images = [{'bytes': image_bytes(9 * i), 'path': f'{i}.png'} for i in range(6)]
    (tmp_path / 'data').mkdir()
    table = hf.Dataset.from_dict({'image': images, 'place': list('abcdef')}, features=hf.Features(
        image=hf.Image(), place=hf.Value('string')))
    table.to_parquet(str(tmp_path / 'data' / 'train.parquet'))
    flags = ['--dataset', f'{kind}/{tmp_path / "data"}', '--train-num-samples', '6']
    assert 'no column label' in find_missing_labels(args_of(tmp_path / 'cache', *flags))
    dataset, dataset_eval = datasets_of(tmp_path / 'cache', *flags)
    assert dataset_eval is None
    samples = [dataset[i] for i in range(6)] if kind == 'hfds' else list(dataset)
    assert len(samples) >= 6 and {target for _, target in samples} == {0}  # a stream fills its last batch
    if kind == 'hfds':
        assert fingerprint_dataset(dataset)['num_samples'] == 6
        train, held_out = datasets_of(tmp_path / 'cache', *flags, '--val-split', '0.34')
        assert len(train) == 4 and len(held_out) == 2


@pytest.mark.parametrize('with_classes', [False, True])
def test_shards_are_read_without_classes(tmp_path: Path, with_classes: bool) -> None:
    pytest.importorskip('webdataset')
    names = [name for i in range(4) for name in (f'{i}.png', f'{i}.cls')[:1 + with_classes]]
    write_tar(tmp_path / 'train-0.tar', names)
    split = dict(name='train', num_samples=4, filenames=['train-0.tar'], shard_lengths=[4])
    (tmp_path / '_info.json').write_text(json.dumps({'splits': {'train': split}}))
    assert bool(find_missing_labels(args_of(tmp_path, '--dataset', 'wds/x'))) is not with_classes
    dataset, _ = datasets_of(tmp_path, '--dataset', 'wds/x')
    assert [target for _, target in dataset] == [0] * 4


def test_batches_without_labels_are_augmented_mixed_and_indexed_as_others(tmp_path: Path) -> None:
    write_images(tmp_path, 8)
    args = args_of(tmp_path, '--no-labels', '--mixup', '0.2', '--reprob', '0.2')
    images, target = next(iter(create_loaders(args, DATA_CONFIG, 0, CPU).train))
    assert images.shape == (4, 3, 32, 32) and target.shape == (4, 1)
    indexed = create_loaders(args_of(tmp_path, '--no-labels'), DATA_CONFIG, 0, CPU, with_indices=True).train
    targets = torch.cat([target for _, target in indexed])
    assert targets[:, 0].tolist() == [0] * 8 and sorted(targets[:, 1].tolist()) == list(range(8))


def test_held_out_images_are_never_trained_on_and_the_same_whatever_seed_and_place(tmp_path: Path) -> None:
    write_images(tmp_path / 'a', 30)
    write_images(tmp_path / 'a' / 'more', 10, start=20)  # names that are there twice
    train, held_out = datasets_of(tmp_path / 'a', '--val-split', '0.2')
    assert len(train) == 32 and len(held_out) == 8
    assert not names_of(train) & names_of(held_out)
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    assert names_of(datasets_of(tmp_path / 'b', '--val-split', '0.2', '--seed', '7')[1]) == names_of(held_out)
    write_images(tmp_path / 'b', 4, start=90)
    assert len(names_of(datasets_of(tmp_path / 'b', '--val-split', '0.2')[1]) & names_of(held_out)) >= 7


def test_labelled_images_can_be_held_out_as_well(tmp_path: Path) -> None:
    for name in ('ant', 'bee'):
        write_images(tmp_path / 'train' / name, 10)
    train, held_out = create_datasets(args_of(tmp_path, '--val-split', '0.1'), DATA_CONFIG, 2)
    assert len(train) == 18 and len(held_out) == 2
    assert {train[i][1] for i in range(18)} == {0, 1}


def test_a_fraction_that_leaves_nothing_and_a_stream_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    with pytest.raises(UsageError, match='leaves none to train on'):
        datasets_of(tmp_path, '--val-split', '0.9')
    assert choose_by_name(['a', 'b', 'a'], 3) == [0, 1, 2]


def test_unreadable_images_without_labels_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path, 8)
    (tmp_path / '3.png').write_bytes(b'not an image')
    with pytest.raises(UsageError, match='cannot read image'):
        list(create_loaders(args_of(tmp_path, '--no-labels'), DATA_CONFIG, 0, CPU).train)
    with caplog.at_level(logging.WARNING):
        list(create_loaders(args_of(tmp_path, '--no-labels', '--max-bad-images', '1'), DATA_CONFIG, 0, CPU).train)
    assert '1 of at most 1' in caplog.text


def test_other_images_without_labels_are_told_apart(tmp_path: Path) -> None:
    write_images(tmp_path, 100)
    before = fingerprint_dataset(datasets_of(tmp_path)[0])
    (tmp_path / '57.png').write_bytes(image_bytes(2))
    assert fingerprint_dataset(datasets_of(tmp_path)[0]) != before
