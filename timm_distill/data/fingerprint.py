"""Fingerprint of a dataset: its classes, how many images each has and a hash of them, to tell other data from the same.

No image is decoded: names, labels and a look at the bytes of a few files, so that the start of a run does not wait.
Where the data lie does not count, so that a copy elsewhere is the same data.
"""
import hashlib
import os
import stat
from collections import Counter
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from torch.utils.data import Dataset

Fingerprint = Dict[str, Any]  # plain values, for a checkpoint

_LOOKED_AT = 4096  # files of a dataset
_LOOKED_AT_OF_A_GROUP = 4
_LOOKED_AT_UNLABELLED = 256  # of the one group that images without labels are
_BLOCK = 1 << 16
_BATCH = 1 << 16  # rows of a table
_NAMES_SHOWN = 5


class _Samples(NamedTuple):
    """Every image of a dataset in its order: name, label and what is known of its bytes."""
    names: Sequence[str]
    labels: Sequence[Any]
    look: Callable[[int], bytes]


def fingerprint_dataset(dataset: Dataset) -> Fingerprint:
    """Return what tells a dataset from another.

    Args:
        dataset: Of timm's readers or of torchvision, wrapped or not.

    Returns:
        'reader': what reads it; 'num_samples'; 'classes': label by name; 'groups': number of images and hash by class,
        or by file of a streamed dataset; 'order': hash of the labels of all images in their order, where that is fixed.
    """
    while not hasattr(dataset, 'reader') and hasattr(dataset, 'dataset'):
        dataset = dataset.dataset  # augmented splits
    reader = getattr(dataset, 'reader', dataset)
    classes = class_indices(dataset)
    found: Fingerprint = {'reader': type(reader).__name__, 'num_samples': _count(dataset, reader), 'classes': classes}
    samples = _list_samples(reader)
    if samples is not None:
        return {**found, **_hash_samples(samples, classes)}
    return {**found, 'groups': {name: [count, content] for name, count, content in _iter_shards(reader)}}


def class_indices(dataset: Any) -> Dict[str, int]:
    """Return the labels by class name, empty where a dataset has no names."""
    reader = getattr(dataset, 'reader', dataset)
    indices = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None) or {}
    return {str(name): int(index) for name, index in indices.items()}


def _count(dataset: Any, reader: Any) -> Optional[int]:
    if hasattr(reader, 'num_samples'):  # the length of a stream depends on batches and processes
        return int(reader.num_samples)
    return len(dataset) if hasattr(dataset, '__len__') else None


def _list_samples(reader: Any) -> Optional[_Samples]:
    """Return the images of a dataset that has a list of them; None for a stream."""
    samples = getattr(reader, 'samples', None)
    if samples is not None and len(samples) and isinstance(samples[0][0], str):
        paths = [sample[0] for sample in samples]
        return _Samples(_inside_classes(paths, reader.root), [s[1] for s in samples], lambda i: _look_at(paths[i]))
    if samples is not None and hasattr(reader, 'targets'):  # of tar files
        names = [f'{member.name.rpartition("/")[2]} {member.size}' for member, _, _ in samples]
        return _Samples(names, reader.targets, lambda i: _look_inside_tar(reader, *samples[i]))
    if hasattr(reader, 'image_key') and hasattr(reader, 'label_key'):  # a table of Hugging Face
        return _list_rows(reader)
    if hasattr(reader, 'targets'):  # of torchvision, with arrays or without
        images = getattr(reader, 'data', None)
        return _Samples(
            [''] * len(reader.targets), reader.targets,
            lambda i: b'' if images is None else np.asarray(images[i]).tobytes())
    return None


def sample_names(reader: Any) -> Optional[List[str]]:
    """Return a name of every image that does not depend on where the data lie; None for a stream or another reader."""
    samples = getattr(reader, 'samples', None)
    if isinstance(samples, list) and samples and isinstance(samples[0][0], str):
        return [os.path.relpath(path, reader.root) for path, _ in samples]
    listed = _list_samples(reader) if samples is not None or hasattr(reader, 'image_key') else None
    return None if listed is None else list(listed.names)


def _inside_classes(paths: Sequence[str], root: str) -> List[str]:
    """Return names of files without root and class folder, so that those of a renamed class stay as they are."""
    start = len(root.rstrip(os.sep)) + 1
    names = []
    for path in paths:
        folder, _, name = path[start:].rpartition(os.sep)
        above = folder.rpartition(os.sep)[0]
        names.append(f'{above}/{name}' if above else name)
    return names


def _list_rows(reader: Any) -> _Samples:
    table, image_key, label_key = reader.dataset, reader.image_key, reader.label_key
    names = [path or '' for batch in _columns(table, image_key) for path in batch.field('path').to_pylist()]
    labels: List[Any] = [''] * len(names)
    if label_key in table.column_names and label_key != image_key:  # without labels it is
        labels = [label for batch in _columns(table, label_key) for label in batch.to_pylist()]

    def _look(index: int) -> bytes:
        image = table[index][image_key]
        return image['bytes'] or (_look_at(image['path']) if image['path'] else b'')

    return _Samples([os.path.basename(name) for name in names], labels, _look)


def _columns(table: Any, name: str) -> Iterator[Any]:
    """Yield a column in parts as Arrow arrays; the bytes of images stay on disk."""
    for batch in table.select_columns([name]).with_format('arrow').iter(_BATCH):
        yield from batch[name].chunks


def _look_at(path: str) -> bytes:
    """Return size and middle of a file; nothing of what is none or cannot be opened."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return b''
        with open(path, 'rb') as file:
            file.seek(max(0, (status.st_size - _BLOCK) // 2))
            return b'%d ' % status.st_size + file.read(_BLOCK)
    except OSError:
        return b''


def _look_inside_tar(reader: Any, member: Any, tar: Optional[str], inner_tar: Any) -> bytes:
    """Return the middle of a member, read past the reader: a tar file that it had open would be shared by processes."""
    start = member.offset_data + (inner_tar.offset_data if inner_tar is not None else 0)
    try:
        with open(os.path.join(reader.root, tar) if tar else reader.root, 'rb') as file:
            file.seek(start + max(0, (member.size - _BLOCK) // 2))
            return file.read(min(_BLOCK, member.size))
    except OSError:
        return b''


def _hash_samples(samples: _Samples, classes: Dict[str, int]) -> Fingerprint:
    class_names = {index: name for name, index in classes.items()}
    groups = [_group_name(label, class_names) for label in samples.labels]
    counts = Counter(groups)
    hashes = {name: hashlib.sha256() for name in counts}
    for name, group in zip(samples.names, groups):
        hashes[group].update(name.encode('utf-8', 'surrogatepass') + b'\n')  # names of files need not be UTF-8
    for index, group in _choose(groups, counts, _LOOKED_AT_UNLABELLED if not class_names and len(counts) == 1 else 0):
        hashes[group].update(samples.look(index))
    numbers = {name: i for i, name in enumerate(sorted(counts))}
    order = hashlib.sha256(np.array([numbers[group] for group in groups], dtype='<i4').tobytes())
    return {
        'groups': {name: [counts[name], hashes[name].hexdigest()[:16]] for name in numbers},
        'order': order.hexdigest()[:16],
    }


def _group_name(label: Any, class_names: Dict[int, str]) -> str:
    if isinstance(label, (int, np.integer)):
        return class_names.get(int(label), str(int(label)))
    return '' if label is None or isinstance(label, (list, tuple, np.ndarray)) else str(label)


def _choose(groups: Sequence[str], counts: Dict[str, int], at_least: int = 0) -> Iterator[Tuple[int, str]]:
    """Yield the images that are looked at: a few of every group, evenly spread over it."""
    each = max(at_least, min(_LOOKED_AT_OF_A_GROUP, max(1, _LOOKED_AT // max(1, len(counts)))))
    wanted = {name: {i * count // each for i in range(each)} for name, count in counts.items()}
    seen: Dict[str, int] = dict.fromkeys(counts, 0)
    for index, group in enumerate(groups):
        if seen[group] in wanted[group]:
            yield index, group
        seen[group] += 1


def _iter_shards(reader: Any) -> Iterator[Tuple[str, int, str]]:
    """Yield name, images (-1 where unknown) and hash of each file of a streamed dataset, as far as it tells."""
    split, builder = getattr(reader, 'split_info', None), getattr(reader, 'builder', None)
    paths = [str(path) for path in getattr(split, 'filenames', None) or ()]
    lengths = [int(length) for length in getattr(split, 'shard_lengths', None) or ()]
    folder = str(getattr(builder, 'data_dir', None) or getattr(reader, 'root', None) or '')
    if not paths:
        files = getattr(getattr(builder, 'config', None), 'data_files', None) or {}
        paths = [str(path) for path in files.get(getattr(reader, 'split', ''), ())]
    if len(lengths) != len(paths):
        lengths = [-1] * len(paths)
    for path, length in sorted(zip(paths, lengths)):
        content = _look_at(os.path.join(folder, path))
        yield os.path.basename(path), length, hashlib.sha256(content).hexdigest()[:16]


def digest_fingerprint(fingerprint: Fingerprint) -> str:
    """Return a fingerprint as 16 hex digits."""
    return hashlib.sha256(repr(_sorted(fingerprint)).encode()).hexdigest()[:16]


def _sorted(value: Any) -> Any:
    return sorted((key, _sorted(item)) for key, item in value.items()) if isinstance(value, dict) else value


def describe_changes(before: Fingerprint, after: Fingerprint) -> List[str]:
    """Return in words what two fingerprints differ in; empty where they are those of the same data."""
    if digest_fingerprint(before) == digest_fingerprint(after):
        return []
    words = []
    has_same_reader = before['reader'] == after['reader']  # hashes of different readers say nothing of each other
    if not has_same_reader:
        words.append(f"read by {before['reader']} before, by {after['reader']} now")
    if before['num_samples'] != after['num_samples']:
        words.append(f"{before['num_samples']} images before, {after['num_samples']} now")
    old, new = before['groups'], after['groups']
    moved = _find_moved(old, new) if has_same_reader else {}
    words += _describe_moved(moved, old, new)
    told = {*moved, *moved.values()}
    old, new = ({name: value for name, value in groups.items() if name not in told} for groups in (old, new))
    words += _describe_counts(old, new, has_same_reader)
    words += _join(
        f"class '{name}' has the number {index} for {before['classes'][name]}"
        for name, index in after['classes'].items() if before['classes'].get(name, index) != index)
    return words or ['the images come in another order']


def _describe_moved(moved: Dict[str, str], old: Dict[str, Any], new: Dict[str, Any]) -> List[str]:
    renamed = {name: source for name, source in moved.items() if name not in old and source not in new}
    return [
        *_join(f"'{source}' is called '{name}' now" for name, source in renamed.items()),
        *_join(f"'{name}' holds what '{source}' held" for name, source in moved.items() if name not in renamed),
    ]


def _describe_counts(old: Dict[str, Any], new: Dict[str, Any], compare_hashes: bool) -> List[str]:
    both = [(name, old[name], new[name]) for name in new if name in old]
    return [
        *_join(f"'{name}' is new ({_images(count)})" for name, (count, _) in new.items() if name not in old),
        *_join(f"'{name}' is gone ({_images(count)})" for name, (count, _) in old.items() if name not in new),
        *_join(_describe_count(name, a[0], b[0]) for name, a, b in both if a[0] != b[0]),
        *_join(
            f"'{name}' has as many images, but others"
            for name, a, b in both if compare_hashes and a[0] == b[0] and a[1] != b[1]),
    ]


def _find_moved(old: Dict[str, Any], new: Dict[str, Any]) -> Dict[str, str]:
    """Return the groups that hold exactly what another one held, with its name."""
    times = Counter(tuple(value) for value in old.values())
    sources = {tuple(value): name for name, value in old.items() if times[tuple(value)] == 1}
    return {
        name: sources[tuple(value)] for name, value in new.items()
        if old.get(name) != value and tuple(value) in sources
    }


def _describe_count(name: str, old: int, new: int) -> str:
    change = f'{new - old} added' if new > old else f'{old - new} removed'
    return f"'{name}' has {_images(new)} for {old} ({change} on balance)"


def _images(count: int) -> str:
    return 'images' if count < 0 else '1 image' if count == 1 else f'{count} images'


def _join(parts: Any) -> List[str]:
    """Return the first few of what is to be said of single classes, and how many more there are."""
    parts = list(parts)
    more = len(parts) - _NAMES_SHOWN
    return [*parts[:_NAMES_SHOWN], *([f'and {more} more of that'] if more > 0 else [])]
