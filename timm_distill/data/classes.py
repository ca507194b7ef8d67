"""Class names and labels of datasets, and checks of class folders where timm would go on with shifted labels."""
from argparse import Namespace
from typing import Any, Dict, List, Optional, cast

from torch.utils.data import Dataset

from ..errors import UsageError
from ..utils.text import printable


def class_to_idx(dataset: Dataset) -> Optional[Dict[str, int]]:
    """Labels by class folder name, or by the name that a dataset has for a class; None where it has none."""
    reader = getattr(dataset, 'reader', dataset)
    # torchvision's ImageNet has several names for a class, and one WordNet id
    names = ('wnid_to_idx', 'class_to_idx', 'class_name_to_idx')
    return next((getattr(reader, name) for name in names if getattr(reader, name, None)), None)


def class_indices_differ(dataset: Dataset, other: Dataset) -> bool:
    """Whether two datasets of class folders number other classes."""
    return class_to_idx(dataset) != class_to_idx(other)


def class_names(dataset: Dataset, num_classes: int) -> List[str]:
    """Return a name for every class, as it can be written: of its folder or of the dataset, else its index."""
    return [name or str(index) for index, name in enumerate(known_names(dataset, num_classes))]


def known_names(dataset: Dataset, num_classes: int) -> List[str]:
    """Return the name of every class, as it can be written; '' for one that the dataset does not name."""
    names = [''] * num_classes
    for name, index in (class_to_idx(_viewed(dataset)) or {}).items():
        if 0 <= index < num_classes:
            names[index] = printable(str(name))
    return names


def _viewed(dataset: Any) -> Any:
    """Return the dataset that a view is of."""
    while not hasattr(dataset, 'reader') and hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    return dataset


def label_names(dataset: Dataset, num_classes: int) -> Optional[List[str]]:
    """Return the name of every class in label order; None where the dataset does not name them all."""
    classes = class_to_idx(_viewed(dataset)) or {}
    if set(classes.values()) != set(range(num_classes)):
        return None
    return class_names(dataset, num_classes)


def check_class_count(args: Namespace, dataset: Dataset, num_classes: int) -> None:
    """Check that class folders are as many as the classes of the model.

    Raises:
        UsageError: If they are not, if images lie outside of them, or if there is but one.
    """
    classes = class_to_idx(dataset)
    if classes is None:
        return
    folder = cast(Any, dataset).reader.root
    if args.class_map:
        needed = max(classes.values()) + 1
        if needed > num_classes:
            raise UsageError(
                f'--class-map {args.class_map} numbers {needed} classes, but the model has {num_classes}: '
                f'pass --num-classes {needed}')
    elif '' in classes:
        raise UsageError(
            f'{folder} holds images outside of class folders: move each into the folder of its class, or take all as '
            'images without labels: --no-labels')
    elif len(classes) < 2:
        raise UsageError(
            f'{folder} has only one class folder with images ({next(iter(classes))}), two are the least; for images '
            'without labels: --no-labels')
    elif len(classes) != num_classes:
        raise UsageError(
            f'{folder} has {len(classes)} class folders with images, but the model has {num_classes} '
            f'classes: pass --num-classes {len(classes)}')


def check_same_classes(args: Namespace, dataset_train: Dataset, dataset_eval: Dataset) -> None:
    """Check that two splits have the same class folders: one more or less shifts all labels after it.

    Raises:
        UsageError: If they differ.
    """
    train, val = class_to_idx(dataset_train), class_to_idx(dataset_eval)
    if args.class_map or train is None or val is None or train == val:
        return
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    parts = [
        f'only in {split}: {", ".join(names[:5])}{", ..." if len(names) > 5 else ""}'
        for split, names in ((args.train_split, only_train), (args.val_split, only_val)) if names]
    raise UsageError(
        f'the class folders of --train-split {args.train_split} and --val-split {args.val_split} differ '
        f'({"; ".join(parts)}): make them equal, or give the labels with --class-map')
