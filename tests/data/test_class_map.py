"""Promises about class maps, and about class folders whose names are odd."""
import os
import pickle
import shutil
from pathlib import Path
from typing import Any, Dict, List

import pytest
from timm.data import create_dataset

import train_distill
from timm_distill import UsageError
from timm_distill.args import create_train_parser
from timm_distill.data import class_names, create_datasets
from timm_distill.data.class_map import read_class_map, settle_order
from timm_distill.utils.text import model_file_name


class Planted:
    def __reduce__(self) -> Any:
        return os.mkdir, ('planted',)


def test_pickled_class_map_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for content in (pickle.dumps({'a': 0}), pickle.dumps(Planted())):
        (tmp_path / 'x.pkl').write_bytes(content)
        with pytest.raises(UsageError, match=r'--class-map x\.pkl must be a text file'):
            read_class_map('x.pkl')
    assert os.listdir(tmp_path) == ['x.pkl']


@pytest.mark.parametrize('content, words', [
    (None, 'no such file'),
    (b'', 'names no class'),
    (b'a\n\nb\n', 'line 2 is empty'),
    (b'a\nb\na\n', "'a' more than once"),
    ('a\nb\n'.encode('utf-16'), 'no text in UTF-8'),
])
def test_class_map_that_would_shift_labels_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    if content is not None:
        (tmp_path / 'map.txt').write_bytes(content)
    with pytest.raises(UsageError, match=words):
        read_class_map(str(tmp_path / 'map.txt'))


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='has no FIFOs')
def test_class_map_that_is_a_fifo_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / 'map.txt')
    with pytest.raises(UsageError, match='FIFO'):
        read_class_map(str(tmp_path / 'map.txt'))


@pytest.mark.parametrize('content', [
    b'b\na\n', b'\xef\xbb\xbfb\na\n', b'b\r\na\r\n', b'b \na\n\n\n'])
def test_class_map_is_read_as_editors_save_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / 'map.txt').write_bytes(content)
    assert read_class_map('map.txt', [str(tmp_path / 'nowhere'), str(tmp_path)]) == {'b': 0, 'a': 1}


def create(root: Path, *flags: str) -> Any:
    args = create_train_parser().parse_args(['--data-dir', str(root), '--val-split', '', *flags])
    return create_datasets(args, {'input_size': (3, 32, 32)}, 3)[0]


@pytest.fixture
def folders(digits_dir: Path, tmp_path: Path) -> Path:
    for label in ('0', '1', '2'):
        (tmp_path / 'data' / 'train' / label).mkdir(parents=True)
        for path in sorted((digits_dir / 'train' / label).iterdir())[:3]:
            shutil.copy(path, tmp_path / 'data' / 'train' / label)
    return tmp_path / 'data'


def test_folders_that_a_class_map_leaves_out_and_classes_without_images_are_named(folders: Path, caplog: Any) -> None:
    (folders / 'train' / 'map.txt').write_text('2\n0\nelephant\n')
    dataset = create(folders, '--class-map', 'map.txt')
    assert dataset.reader.class_to_idx == {'2': 0, '0': 1, 'elephant': 2} and len(dataset) == 6
    assert "leaves out 1 folders" in caplog.text and "'1'" in caplog.text
    assert "1 classes without an image" in caplog.text and "'elephant'" in caplog.text


def test_class_map_without_effect_is_refused(folders: Path) -> None:
    (folders / 'map.txt').write_text('2\n0\n1\n')
    with pytest.raises(UsageError, match='--class-map map.txt does not go with --dataset torch/image_folder'):
        create(folders, '--class-map', 'map.txt', '--dataset', 'torch/image_folder')


@pytest.mark.parametrize('order', [('A', 'a', '1', '01'), ('a', 'A', '01', '1')])
def test_labels_of_folders_that_differ_in_case_or_zeros_do_not_hang_on_chance(
        folders: Path, order: List[str], caplog: Any) -> None:
    images = sorted((folders / 'train' / '0').iterdir())
    shutil.rmtree(folders / 'train' / '1')
    for label in order:
        (folders / 'train' / label).mkdir()
        for name in ('x.png', 'X.png'):
            shutil.copy(images[0], folders / 'train' / label / name)
    reader = create_dataset('', str(folders / 'train')).reader
    # as a set of another order, and another file system, would have given it
    ranks = {name: i for i, name in enumerate([
        '0', *[n for n in order if 'a' not in n.lower()], '2',
        *[n for n in order if 'a' in n.lower()]])}
    reader.samples = [(path, ranks[Path(path).parent.name]) for path, _ in reversed(reader.samples)]
    reader.samples.sort(key=lambda sample: sample[0].lower().replace('01', '1'))
    reader.class_to_idx = ranks
    settle_order(reader, has_class_map=False)
    assert reader.class_to_idx == {'0': 0, '01': 1, '1': 2, '2': 3, 'A': 4, 'a': 5}
    assert all(
        Path(path).parent.name == {v: k for k, v in reader.class_to_idx.items()}[label]
        for path, label in reader.samples)
    names = [path for path, _ in reader.samples]
    assert [n for n in names if '/a/' in n.lower()] == sorted(n for n in names if '/a/' in n.lower())
    assert 'by chance' in caplog.text


def test_folders_of_ordinary_names_keep_timms_labels_and_order(folders: Path) -> None:
    plain, ours = create_dataset('', str(folders / 'train')), create(folders)
    assert ours.reader.samples == plain.reader.samples and ours.reader.class_to_idx == plain.reader.class_to_idx


ODD = os.fsdecode(b'caf\xe9')


@pytest.fixture
def odd_folders(folders: Path) -> Path:
    """Data folder and class folder whose names are no UTF-8, with training and validation images."""
    try:
        os.rename(folders / 'train' / '1', folders / 'train' / ODD)
    except OSError:
        pytest.skip('this file system takes UTF-8 alone')
    shutil.copytree(folders / 'train', folders / 'validation')
    os.rename(folders, folders.parent / f'data {ODD}')
    return folders.parent / f'data {ODD}'


def test_class_name_that_is_no_utf8_has_a_name_that_can_be_written(odd_folders: Path) -> None:
    names = class_names(create(odd_folders), 3)
    assert r'caf\xe9' in names and len(set(names)) == 3
    ''.join(names).encode()


def test_class_map_names_a_folder_that_is_no_utf8(odd_folders: Path) -> None:
    (odd_folders / 'map.txt').write_bytes(b'2\ncaf\xe9\n0\n')
    assert create(odd_folders, '--class-map', str(odd_folders / 'map.txt')).reader.class_to_idx[ODD] == 1


def test_run_on_folders_that_are_no_utf8_writes_all_its_files_and_resumes(odd_folders: Path, tmp_path: Path) -> None:
    flags = [
        '--data-dir', str(odd_folders), '--output', str(tmp_path / ODD), '--experiment', 'run',
        '--num-classes', '3', '--img-size', '32', '-b', '3', '--warmup-epochs', '0', '--device', 'cpu', '-j', '0',
        '--epochs', '2', '--student', 'test_resnet']
    train_distill.main([*flags, '--stop-epoch', '1', '--no-report'])
    result: Dict[str, Any] = vars(train_distill.main([*flags, '--resume', 'auto']))
    files = os.listdir(result['output_dir'])
    assert {'args.yaml', 'hub', 'last.pth.tar', 'summary.csv'} <= set(files)
    for path in (Path(result['output_dir']) / 'hub').iterdir():
        if path.suffix in ('.json', '.md'):
            assert '\udce9' not in path.read_text(encoding='utf-8')
    if 'report.html' in files:
        assert r'caf\xe9' in (Path(result['output_dir']) / 'report.html').read_text(encoding='utf-8')


def test_model_whose_name_is_a_long_path_has_a_short_name_in_files() -> None:
    assert len(model_file_name('local-dir:/' + '/'.join(99 * ['folder']))) == 100
    assert model_file_name('resnet50.a1_in1k') == 'resnet50_a1_in1k'
