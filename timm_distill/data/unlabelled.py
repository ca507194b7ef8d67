"""Images without labels: folders nested at will, tar files, tables without a label column, shards without classes.

The target of each image is 0, so that all that handles labelled batches (sample indices, mixup) handles these.
"""
import os
import tarfile
from typing import Any, Iterator, List, Optional

from timm.data import get_img_extensions

from ..utils._compat import add_class_to_shards
from .decoding import check_regular_file

# Folder names that timm takes for one another when it looks for a split.
SPLIT_ALIASES = (
    ('train', 'training'),
    ('val', 'valid', 'validation', 'eval', 'evaluation'),
)
_LABEL_KEY = 'label'  # where timm looks for the labels of a table if no --target-key says otherwise


def find_split(root: str, split: str) -> Optional[str]:
    """Return the folder of a split, by its name or another that timm takes for it; None where there is none."""
    paths = [os.path.join(root, name) for name in split_names(split)]
    return next((path for path in paths if os.path.exists(path)), None)


def split_names(split: str) -> List[str]:
    """Return the names that the folder of a split may have."""
    return [split] + [alias for group in SPLIT_ALIASES if split in group for alias in group if alias != split]


def why_folder_is_unlabelled(root: str, split: str, val_split: str) -> str:
    """Return, in words, why a folder or tar file of images has no labels; '' where it seems to have some.

    Looks at names alone, and no further than the first image that has a label.

    Args:
        root: The folder of `--data-dir`, or a tar file.
        split: Name of the training split.
        val_split: Name of the validation split.
    """
    if os.path.isfile(root):
        return '' if _has_class_folders(root) else f'the images of {root} are in no folders'
    folder = find_split(root, split)
    other = find_split(root, val_split) if folder is None and val_split else None
    images = _iter_images(folder or root, leave_out=other)
    first = next(images, None)
    if first is None or os.path.dirname(first) or any(os.path.dirname(name) for name in images):
        return ''
    return f'{folder or root} has images, but no class folders'


def _iter_images(folder: str, leave_out: Optional[str] = None) -> Iterator[str]:
    """Yield the images of a folder by their path inside it, those that lie in it directly first."""
    extensions = tuple(get_img_extensions())
    for path, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if os.path.join(path, name) != leave_out]
        start = '' if path == folder else os.path.relpath(path, folder)
        yield from (os.path.join(start, name) for name in files if name.lower().endswith(extensions))


def _has_class_folders(path: str) -> bool:
    """Whether any image of a tar file lies in a folder, or in a tar file inside; true where there is no image."""
    extensions = tuple(get_img_extensions())
    found = False
    try:
        check_regular_file(path)
        with tarfile.open(path) as tar:
            for name in (os.path.normpath(member.name).lower() for member in tar if member.isfile()):
                if name.endswith('.tar') or name.endswith(extensions) and os.path.dirname(name):
                    return True
                found = found or name.endswith(extensions)
    except (OSError, tarfile.TarError):
        return True  # its reader says what is wrong
    return not found


def why_reader_is_unlabelled(reader: Any, target_key: Optional[str]) -> str:
    """Return, in words, why a Hugging Face set or a WebDataset has no labels; '' where it seems to have some.

    Args:
        reader: timm's.
        target_key: `--target-key`.
    """
    if target_key is not None:
        return ''
    if type(reader).__name__ == 'ReaderWds':
        return '' if reader.split_info.alt_label else _why_shards_are_unlabelled(reader)
    columns = _columns(reader)
    if not columns or _LABEL_KEY in columns:
        return ''
    return f'it has no column {_LABEL_KEY} (its columns: {", ".join(sorted(columns))}; --target-key names another)'


def _columns(reader: Any) -> List[str]:
    """Return the columns of a Hugging Face set; those of a stream are known once a row of it was read."""
    if hasattr(reader, 'dataset'):
        return list(reader.dataset.column_names)
    features = reader.builder.info.features
    return list(features or next(iter(reader.builder.as_streaming_dataset(split=reader.split)), {}))


def _why_shards_are_unlabelled(reader: Any) -> str:
    """Look for a class beside the image of the first sample."""
    for name in reader.split_info.filenames[:1]:
        path = os.path.join(reader.root, name)
        try:
            with tarfile.open(path) as tar:
                kinds = _first_sample(tar)
        except (OSError, tarfile.TarError):
            return ''
        if kinds and 'cls' not in kinds:
            return f'the samples of {path} are {" and ".join(kinds)} without cls'
    return ''


def _first_sample(tar: tarfile.TarFile) -> List[str]:
    """Return the extensions of a WebDataset's first sample."""
    kinds: List[str] = []
    first = None
    for member in tar:
        if not member.isfile():
            continue
        key, _, kind = os.path.basename(member.name).partition('.')
        first = key if first is None else first
        if key != first:
            break
        kinds.append(kind.lower())
    return kinds


class NoLabel:
    """Target of an image without a label, for `target_transform`."""

    def __call__(self, target: Any) -> int:
        return 0


def forget_labels(dataset: Any, leave_out: Optional[str] = None) -> None:
    """Give a dataset the target 0 for every image, and no classes.

    Args:
        dataset: Of timm or torchvision; is changed, its reader with it.
        leave_out: Folder whose images are not read: that of another split.
    """
    dataset.target_transform = NoLabel()
    reader = getattr(dataset, 'reader', None)
    samples = getattr(reader, 'samples', None)
    if isinstance(samples, list):
        start = os.path.join(leave_out, '') if leave_out else None
        reader.samples = [(path, 0) for path, _ in samples if start is None or not path.startswith(start)]
    elif hasattr(reader, 'targets'):
        reader.targets[:] = 0
        reader.class_idx_to_name = {}
    for name in ('class_to_idx', 'class_name_to_idx'):
        if hasattr(reader, name):
            setattr(reader, name, {})
    if type(reader).__name__ == 'ReaderWds':
        add_class_to_shards(reader)
