"""Part of a training set that is held out for validation, chosen by the names of its files alone."""
import copy
import hashlib
from collections import Counter
from typing import Any, List, Optional, Sequence, Tuple

import numpy as np
from torch.utils.data import Dataset

from ..errors import UsageError
from .fingerprint import sample_names
from .images import StrictImageDataset


def read_fraction(text: str) -> Optional[float]:
    """Return the number between 0 and 1 that a `--val-split` is; None where it is a name."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < 1 else None


def hold_out(dataset: Dataset, fraction: float, max_bad: int = 0) -> Tuple[Dataset, Dataset]:
    """Split a dataset into the images to train on and those to validate on, which no image is both.

    Which images are held out follows from a hash of their names: no seed and no order has a part in it, and most stay
    the same where images are added.

    Args:
        dataset: Of a folder, a tar file or a Hugging Face table.
        fraction: Part to hold out, at least one image.
        max_bad: As for `StrictImageDataset`, for the part to train on.

    Raises:
        UsageError: If the dataset is another one, or a part would be empty.
    """
    names = sample_names(dataset.reader) if isinstance(dataset, StrictImageDataset) else None
    if names is None:
        raise UsageError(
            f'--val-split {fraction:g} holds out images of folders, tar files and hfds/ datasets: name a split of '
            "this --dataset, or pass --val-split ''")
    count = max(1, round(fraction * len(names)))
    if count >= len(names):
        raise UsageError(f'--val-split {fraction:g} of {len(names)} images leaves none to train on')
    held_out = np.zeros(len(names), dtype=bool)
    held_out[choose_by_name(names, count)] = True
    return (
        take_samples(dataset, np.flatnonzero(~held_out).tolist(), max_bad),
        take_samples(dataset, np.flatnonzero(held_out).tolist()),
    )


def choose_by_name(names: Sequence[str], count: int) -> List[int]:
    """Return the indices of `count` names, those of the smallest hashes; equal names are told apart by their order."""
    times: Counter = Counter()
    keys = []
    for index, name in enumerate(names):
        times[name] += 1
        text = f'{name}\0{times[name]}'
        keys.append((hashlib.sha256(text.encode('utf-8', 'surrogatepass')).digest(), index))
    return sorted(index for _, index in sorted(keys)[:count])


def take_samples(dataset: Any, indices: Sequence[int], max_bad: int = 0) -> StrictImageDataset:
    """Return a dataset of some of the images of a `StrictImageDataset`, in its order."""
    part = copy.copy(dataset)
    part.reader = reader = copy.copy(dataset.reader)
    if hasattr(reader, 'image_key'):  # a table of Hugging Face
        reader.dataset = reader.dataset.select(indices)
        reader.num_samples = len(indices)
    elif hasattr(reader, 'targets'):  # tar files
        reader.samples, reader.targets = reader.samples[indices], reader.targets[indices]
    else:
        reader.samples = [reader.samples[i] for i in indices]
    return StrictImageDataset(part, max_bad)
