"""Sample indices of a training set, for methods that keep something of each sample."""
from typing import Any, Iterable, Optional, Tuple

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from ..errors import UsageError


class IndexedDataset(Dataset):
    """A dataset whose target is the pair (label, index of the sample), an int64 array of two.

    Batches of it have targets [B, 2], with timm's collate function and prefetcher as well as with torch's.

    Args:
        dataset: Gives (image, label) by index; its transform is set through this one.
    """

    def __init__(self, dataset: Dataset):
        self.dataset: Any = dataset

    @property
    def transform(self) -> Any:
        """Transform of the images, which timm's loaders set."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def __getitem__(self, index: int) -> Tuple[Any, np.ndarray]:
        image, label = self.dataset[index][:2]
        return image, np.array([label, index], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:  # reader, set_epoch
        if name == 'dataset':  # not yet set: copy and pickle ask before __init__
            raise AttributeError(name)
        return getattr(self.dataset, name)


class SpacedDataset(IndexedDataset):
    """Some samples of a dataset, evenly spaced over its order, as they come.

    Args:
        dataset: Gives (image, label) by index; its transform is set through this one.
        count: How many at most.
    """

    def __init__(self, dataset: Dataset, count: int):
        super().__init__(dataset)
        size = len(self.dataset)
        self.indices = np.linspace(0, size, min(count, size), endpoint=False).astype(np.int64).tolist()

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]

    def __len__(self) -> int:
        return len(self.indices)


def index_samples(dataset: Dataset) -> IndexedDataset:
    """Return the dataset with (label, index) as targets.

    Raises:
        UsageError: If its images come as a stream, without an index.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, '__len__'):
        raise UsageError(
            'This --kd reads the index of each training image, which a streamed --dataset does not give: '
            'use class folders, a tar file or hfds, or a method that needs no indices (--list-kd).')
    return IndexedDataset(dataset)


def read_labels(dataset: Any) -> Optional[torch.Tensor]:
    """Return the label of every sample without reading images, [N]; None where the dataset does not tell."""
    labels = list(_iter_labels(dataset))
    if len(labels) != len(dataset):
        return None
    transform = getattr(dataset, 'target_transform', None)
    return torch.tensor([transform(label) if transform else label for label in labels], dtype=torch.int64)


def _iter_labels(dataset: Any) -> Iterable[Any]:
    reader = getattr(dataset, 'reader', None)
    if hasattr(reader, 'iter_targets'):  # of Hugging Face
        return reader.iter_targets()
    for source in (dataset, reader):  # of torchvision, and of timm for tar files in a folder
        if hasattr(source, 'targets'):
            return source.targets
    return [label for _, label in getattr(reader, 'samples', ())]  # of timm for folders and tar files
