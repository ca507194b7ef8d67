"""Labelled images that frozen features are probed on: class folders, or a labelled validation split."""
import copy
import os
from argparse import Namespace
from typing import Any, Dict, List, Optional, Tuple

from torch.utils.data import Dataset, IterableDataset

from ..errors import UsageError
from .classes import class_indices_differ
from .datasets import create_class_folders, create_splits
from .fingerprint import sample_names
from .holdout import choose_by_name, take_samples
from .images import StrictImageDataset
from .indexing import read_labels
from .unlabelled import find_split

_FIT, _TEST = 'train', 'validation'


def create_probe_datasets(
        args: Namespace,
        data_config: Dict[str, Any],
        dataset_eval: Optional[Dataset],
) -> List[Dataset]:
    """Return the images to fit and those to test, or one set that is both by halves.

    Args:
        args: Training arguments.
        data_config: Resolved by `timm.data.resolve_data_config`.
        dataset_eval: The validation images, where these are labelled.

    Raises:
        UsageError: If there are no labelled images, or they are of one class.
    """
    if args.probe_dir:
        folders, source = _probe_folders(args.probe_dir), f'--probe-dir {args.probe_dir}'
    elif dataset_eval is not None:
        folders, source = (), f"--val-split '{args.val_split}'"
    else:
        root = args.data_dir or args.data
        folder = find_split(root, args.val_split) if root and args.val_split and not args.dataset else None
        if folder is None:
            raise UsageError(
                'The probes need labelled images, and there are none: give a folder of class folders as --probe-dir, '
                'or leave out --probe-interval and --eval-metric')
        folders, source = (folder,), f"--val-split '{args.val_split}'"
    datasets = [create_class_folders(args, data_config, folder, source.split()[0]) for folder in folders]
    if dataset_eval is not None and not folders:
        datasets = [copy.copy(dataset_eval)]
    if len(datasets) > 1 and class_indices_differ(*datasets):
        raise UsageError(f'{source}: {folders[0]} and {folders[1]} have other class folders: make them equal')
    for dataset in datasets:
        check_probe_labels(dataset, source, halved=len(datasets) == 1)
    return datasets


def _probe_folders(root: str) -> Tuple[str, ...]:
    """Return the splits of a folder, else the folder itself."""
    splits = [find_split(root, split) for split in (_FIT, _TEST)] if os.path.isdir(root) else []
    return tuple(folder for folder in splits if folder) if splits and all(splits) else (root,)


def create_probe_splits(args: Namespace, data_config: Dict[str, Any]) -> List[Dataset]:
    """Return what `--fit-split` and `--split` name, or the latter alone where there is no such split.

    Args:
        args: Arguments of the validation script.
        data_config: Resolved by `timm.data.resolve_data_config`.

    Raises:
        UsageError: If a split cannot be opened, or is of one class.
    """
    datasets = create_splits(args, data_config, args.fit_split, args.split)
    if len(datasets) > 1 and class_indices_differ(*datasets):
        raise UsageError(
            f"The class folders of --fit-split '{args.fit_split}' and --split '{args.split}' differ: make them equal, "
            "or give --fit-split ''")
    for dataset in datasets:
        check_probe_labels(dataset, '--data-dir', halved=len(datasets) == 1)
    return datasets


def check_probe_labels(dataset: Any, source: str, halved: bool) -> None:
    """Refuse labelled images that say nothing: of one class, or with one image of each.

    Args:
        dataset: Labelled images; a stream is not looked at.
        source: Flag that names them.
        halved: Whether they are both those to fit and those to test.

    Raises:
        UsageError: Names the flag.
    """
    labels = read_labels(dataset) if hasattr(dataset, '__len__') and not isinstance(dataset, IterableDataset) else None
    if labels is None:
        return
    counts = labels.bincount()
    if (counts > 0).sum() < 2:
        raise UsageError(f'{source} has images of one class, the probes need two or more')
    if halved and (counts > 1).sum() < 2:
        raise UsageError(f'{source} has one image of each class, the probes need two or more: one to fit, one to test')


def choose_images(dataset: Any, count: int) -> Optional[StrictImageDataset]:
    """Return at most `count` images of a dataset, the same ones in every run; None where it has no names of them."""
    while not isinstance(dataset, StrictImageDataset) and hasattr(dataset, 'dataset'):
        dataset = dataset.dataset  # of indices, views
    names = sample_names(dataset.reader) if isinstance(dataset, StrictImageDataset) else None
    if names is None:
        return None
    return take_samples(dataset, choose_by_name(names, min(count, len(names))))
