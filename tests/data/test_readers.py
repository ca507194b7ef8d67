"""Data sets that are no class folders, read by the packages that users read them with."""
import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest

import train_distill
from timm_distill import UsageError

SPLITS = ('train', 'validation')
FLAGS = [
    '--student', 'test_resnet', '--num-classes', '10', '--img-size', '32', '-b', '50', '-j', '0', '--epochs', '1',
    '--warmup-epochs', '0', '--lr', '0.05', '--device', 'cpu', '--no-report']


def list_images(folder: Path, split: str) -> List[Tuple[Path, int]]:
    """Return images and labels in the order of the class folders."""
    classes = sorted(path.name for path in (folder / split).iterdir())
    return [(path, label) for label, name in enumerate(classes) for path in sorted((folder / split / name).iterdir())]


def write_parquet(folder: Path, root: Path) -> None:
    """Write a folder that `datasets.load_dataset` reads."""
    datasets = pytest.importorskip('datasets')
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=10))
    root.mkdir()
    for split in SPLITS:
        images = list_images(folder, split)
        columns = {
            'image': [{'bytes': path.read_bytes(), 'path': path.name} for path, _ in images],
            'label': [label for _, label in images]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(root / f'{split}.parquet'))


def write_shards(folder: Path, root: Path, per_shard: int = 50) -> None:
    """Write shards of WebDataset and the `_info.json` that timm reads."""
    pytest.importorskip('webdataset')
    root.mkdir()
    splits = {}
    for split in SPLITS:
        images = list_images(folder, split)
        shards = [images[i:i + per_shard] for i in range(0, len(images), per_shard)]
        names = [f'{split}-{i:04d}.tar' for i in range(len(shards))]
        for name, shard in zip(names, shards):
            with tarfile.open(root / name, 'w') as tar:
                for member, data in iter_members(shard):
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        splits[split] = dict(
            name=split, num_samples=len(images), filenames=names,
            shard_lengths=[len(shard) for shard in shards])
    (root / '_info.json').write_text(json.dumps({'splits': splits}))


def iter_members(shard: List[Tuple[Path, int]]) -> Iterator[Tuple[str, bytes]]:
    for i, (path, label) in enumerate(shard):
        yield f'{i:04d}.jpg', path.read_bytes()  # the key, whatever the format inside
        yield f'{i:04d}.cls', str(label).encode()


def train(output: Path, *argv: Any) -> Dict[str, str]:
    """Train an epoch; returns the row of its summary without times and rates."""
    train_distill.main([*FLAGS, '--output', str(output), '--experiment', 'run', *(str(arg) for arg in argv)])
    with open(output / 'run' / 'summary.csv') as f:
        row = list(csv.DictReader(f))[-1]
    return {name: value for name, value in row.items() if 'loss' in name or 'top' in name}


@pytest.fixture(scope='module')
def from_folders(digits_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Dict[str, str]:
    return train(tmp_path_factory.mktemp('folders'), '--data-dir', digits_dir)


def test_hugging_face_dataset_trains_as_the_class_folders_do(
        digits_dir: Path, tmp_path: Path, from_folders: Dict[str, str]) -> None:
    write_parquet(digits_dir, tmp_path / 'parquet')
    row = train(tmp_path / 'output', '--dataset', f'hfds/{tmp_path / "parquet"}', '--data-dir', tmp_path / 'cache')
    assert row == from_folders


@pytest.mark.parametrize('reader', ['hfids', 'wds'])
def test_streams_are_read_whole(
        digits_dir: Path, tmp_path: Path, reader: str, from_folders: Dict[str, str]) -> None:
    if reader == 'hfids':
        write_parquet(digits_dir, tmp_path / 'data')
        flags = [
            '--dataset', f'hfids/{tmp_path / "data"}', '--train-num-samples', 300, '--val-num-samples', 100,
            '--data-dir', tmp_path / 'cache']
    else:
        write_shards(digits_dir, tmp_path / 'data')
        flags = ['--dataset', 'wds/digits', '--data-dir', tmp_path / 'data']
    # a rate of nothing: the order of a stream is its own, the weights that are validated are the same
    row = train(tmp_path / 'output', *flags, '--lr', '1e-12', '--epochs', 1)
    still = train(tmp_path / 'still', '--data-dir', digits_dir, '--lr', '1e-12')
    assert row['eval_top1'] == still['eval_top1'] != from_folders['eval_top1']
    assert float(row['eval_loss']) == pytest.approx(float(still['eval_loss']), rel=1e-2)


def test_distillation_reads_a_stream_and_methods_that_need_indices_refuse_it(digits_dir: Path, tmp_path: Path) -> None:
    write_shards(digits_dir, tmp_path / 'data')
    flags = [
        '--dataset', 'wds/digits', '--data-dir', tmp_path / 'data', '--teacher', 'test_efficientnet',
        '--no-teacher-pretrained', '--teacher-kwargs', 'num_classes=10']
    row = train(tmp_path / 'output', *flags, '--kd', 'norm+kd')
    assert float(row['train_loss']) > 0
    with pytest.raises(UsageError, match='needs no indices'):
        train(tmp_path / 'refused', *flags, '--kd', 'crd')
