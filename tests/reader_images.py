"""A grey image of 16 bits in every form that timm reads datasets from."""
import io
import json
import tarfile
from pathlib import Path
from typing import Any, Dict

import numpy as np
import pytest
from PIL import Image

DEEP = np.linspace(0, 65535, 48 * 40).round().reshape(48, 40).astype(np.uint16)


def write_folders(root: Path) -> None:
    for split in ('train', 'validation'):
        for label in ('a', 'b'):
            folder = root / split / label
            folder.mkdir(parents=True)
            Image.fromarray(DEEP).save(folder / f'{label}.png')


def write_tar(root: Path) -> None:
    write_folders(root / 'folders')
    with tarfile.open(root / 'images.tar', 'w') as tar:
        tar.add(root / 'folders' / 'train', arcname='.')


def write_parquet(root: Path) -> None:
    datasets = pytest.importorskip('datasets')
    write_folders(root / 'folders')
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=['a', 'b']))
    for split in ('train', 'validation'):
        paths = sorted((root / 'folders' / split).rglob('*.png'))
        columns = {'image': [{'bytes': path.read_bytes(), 'path': path.name} for path in paths], 'label': [0, 1]}
        (root / 'data').mkdir(exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(root / 'data' / f'{split}.parquet'))


def write_shards(root: Path) -> None:
    pytest.importorskip('webdataset')
    data = io.BytesIO()
    Image.fromarray(DEEP).save(data, format='png')
    splits = {}
    for split in ('train', 'validation'):
        with tarfile.open(root / f'{split}.tar', 'w') as tar:
            for i in range(2):
                for name, content in ((f'{i}.png', data.getvalue()), (f'{i}.cls', b'%d' % i)):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        splits[split] = dict(name=split, num_samples=2, filenames=[f'{split}.tar'], shard_lengths=[2])
    (root / '_info.json').write_text(json.dumps({'splits': splits}))


READERS: Dict[str, Any] = {
    'folders': (write_folders, lambda root: ['--data-dir', root]),
    'tar': (write_tar, lambda root: ['--data-dir', root / 'images.tar', '--val-split', '']),
    'hfds': (write_parquet, lambda root: ['--data-dir', root / 'cache', '--dataset', f'hfds/{root}/data']),
    'hfids': (write_parquet, lambda root: [
        '--data-dir', root / 'cache', '--dataset', f'hfids/{root}/data', '--train-num-samples', 2,
        '--val-num-samples', 2]),
    'wds': (write_shards, lambda root: ['--data-dir', root, '--dataset', 'wds/images']),
    'torch': (write_folders, lambda root: ['--data-dir', root, '--dataset', 'torch/image_folder']),
}
