"""Replayed views: what augmentation makes of an image as a function of the image's index and a number.

The generators that transforms draw from are put to a state that depends on nothing else, so that worker count, batch
size, number of processes and order leave a view as it is, to the bit. With `num_views` views the epochs behind them see
the first ones again. Targets carry the key of the view, by which what a teacher said of it is found.
"""
import copy
import math
from argparse import Namespace
from dataclasses import dataclass
from typing import Any, Iterator, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.random_erasing import RandomErasing
from timm.data.scheduled_sampler import ScheduledTransformDataset
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..errors import UsageError
from ..utils._compat import replace_dataset
from ..utils.random import RandomState, seed_generators
from .resumable import find_resumable
from .view_mixing import ViewMixing

_LOW_BITS = 20  # of a key in a float target: float32 holds whole numbers up to 2 ** 24
_IMAGE, _ERASING = 1, 2  # what is drawn for a view, each from generators of its own


class View(NamedTuple):
    """A view of an image.

    Attributes:
        sample: Index of the image in the training set.
        number: Of the view.
        size: Index of its size, with several training sizes.
        split: Which of the augmented splits it is.
    """
    sample: int
    number: int
    size: int = 0
    split: int = 0


@dataclass(frozen=True)
class ViewGrid:
    """All views of a training set, numbered.

    Attributes:
        num_samples: Images.
        num_views: Views of each.
        num_sizes: Sizes of each view.
        num_splits: Augmented splits of each.
        num_repeats: How often an epoch sees an image; each time it is another view.
    """
    num_samples: int
    num_views: int
    num_sizes: int = 1
    num_splits: int = 1
    num_repeats: int = 1

    def __len__(self) -> int:
        return self.num_samples * self.num_views * self.num_sizes * self.num_splits

    def number_of(self, epoch: int, repeat: int = 0) -> int:
        """Return the number of the view that an epoch shows."""
        return (epoch * self.num_repeats + repeat) % self.num_views

    def key(self, view: View) -> int:
        """Return the number of a view among all."""
        return (
            (view.sample * self.num_views + view.number) * self.num_sizes + view.size) * self.num_splits + view.split

    def view(self, key: int) -> View:
        """Return the view of a key."""
        key, split = divmod(int(key), self.num_splits)
        key, size = divmod(key, self.num_sizes)
        return View(*divmod(key, self.num_views), size, split)

    def batch_keys(self, keys: torch.Tensor) -> torch.Tensor:
        """Return the keys of a batch, [B], whose splits follow one another and came with that of the first."""
        return keys + torch.arange(len(keys), device=keys.device) // max(1, len(keys) // self.num_splits)

    def indices(self, keys: torch.Tensor) -> torch.Tensor:
        """Return the index of the image of each key."""
        return keys // (self.num_views * self.num_sizes * self.num_splits)


class ViewDataset(Dataset):
    """A training set whose items are views; its targets carry their keys, see `split_keys`.

    Args:
        dataset: Of a loader: gives (image, label) transformed, by index or by (index, size).
        grid: All views.
        mixing: Mixes a view with that of another image; None leaves them as they are.
    """

    def __init__(self, dataset: Any, grid: ViewGrid, mixing: Optional[ViewMixing] = None):
        self.dataset = dataset
        self.grid = grid
        self.mixing = mixing
        self._scheduled = isinstance(dataset, ScheduledTransformDataset)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by loader processes that run already

    def set_epoch(self, epoch: int) -> None:
        """Choose the views of an epoch."""
        self._epoch.fill_(epoch)
        if hasattr(self.dataset, 'set_epoch'):
            self.dataset.set_epoch(epoch)

    def __getitem__(self, item: Any) -> Tuple[Any, Any]:
        if isinstance(item, View):
            return self.read(item)
        item, size = item if self._scheduled else (item, 0)
        index, repeat = item if isinstance(item, tuple) else (item, 0)
        return self.read(View(int(index), self.grid.number_of(int(self._epoch), repeat), size))

    def read(self, view: View) -> Tuple[Any, Any]:
        """Return image and target of a view, the target with its key."""
        before = RandomState.take(cuda=False)
        try:
            image, target = self._read_unmixed(view)
            if self.mixing is not None:
                partner = self.mixing.partner(view.sample, view.number)
                seed_generators(*self.mixing.seed(view.sample, partner, view.number))
                image, target = self.mixing.mix(
                    image, target, lambda: self._read_unmixed(view._replace(sample=partner)))
        finally:
            before.restore()
        return image, join_key(target, self.grid.key(view))

    def _read_unmixed(self, view: View) -> Tuple[Any, Any]:
        seed_generators(_IMAGE, view.sample, view.number)
        image, target = self.dataset[(view.sample, view.size) if self._scheduled else view.sample][:2]
        return image, target

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:  # reader, transform, num_bad
        if name == 'dataset':  # not yet set: copy and pickle ask before __init__
            raise AttributeError(name)
        return getattr(self.dataset, name)


class RepeatedViews:
    """A sampler of (index, how often it came before in the epoch) over timm's sampler of repeated augmentation.

    Args:
        sampler: timm's.
    """

    def __init__(self, sampler: Any):
        self.sampler = sampler

    def __iter__(self) -> Iterator[Tuple[int, int]]:
        repeats, source = self.sampler.num_repeats, self.sampler
        total = int(np.ceil(repeats * len(source.dataset)))
        for i, index in enumerate(source):
            position = (source.rank + i * source.num_replicas) % total
            yield index, position - int(np.ceil(position // repeats * repeats))

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)


class ReplayedErasing(RandomErasing):
    """timm's random erasing of a batch on the device, drawn for each view alone.

    The noise comes from the CPU, whose generator gives the same on every machine.

    Args:
        erasing: timm's, of a loader with prefetcher.
        grid: All views.
    """

    def __init__(self, erasing: RandomErasing, grid: ViewGrid):
        self.__dict__.update(erasing.__dict__)
        self.device = 'cpu'
        self.grid = grid
        self._keys: Sequence[int] = ()

    def note(self, batch: Tuple[Any, torch.Tensor]) -> None:
        """Take the keys of the batch that is erased next."""
        self._keys = self.grid.batch_keys(split_keys(batch[1])[1].cpu()).tolist()

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        """Erase parts of a normalised batch, [B, C, H, W], in place."""
        num_images, channels, height, width = input.shape
        start = num_images // self.num_splits if self.num_splits > 1 else 0
        before = RandomState.take(cuda=False)
        try:
            for image, key in zip(input[start:], self._keys[start:]):
                view = self.grid.view(key)
                seed_generators(_ERASING, view.sample, view.number, view.split)
                self._erase(image, channels, height, width, torch.float32)
        finally:
            before.restore()
        return input


def join_key(target: Any, key: int) -> Any:
    """Return a target with the key of its view: int64 [label, key], or float32 [K + 2] of a target with K entries."""
    values = np.asarray(target)
    if values.ndim == 0:
        return np.array([int(values), key], dtype=np.int64)
    parts = [key >> _LOW_BITS, key & ((1 << _LOW_BITS) - 1)]
    return torch.cat([torch.as_tensor(target, dtype=torch.float32), torch.tensor(parts, dtype=torch.float32)])


def split_keys(target: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return the targets of a batch, [B] or [B, K], and the keys of its views, int64 [B].

    Args:
        target: Int64 [B, 2], or float [B, K + 2].
    """
    if not target.is_floating_point():
        return target[:, 0], target[:, 1]
    high, low = target[:, -2].long(), target[:, -1].long()
    return target[:, :-2], (high << _LOW_BITS) + low


def create_view_grid(args: Namespace, dataset: Any, num_views: int) -> ViewGrid:
    """Return the views of a training set that the flags ask for.

    Raises:
        UsageError: Where a view would depend on more than image and number; names what it is.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, '__len__'):
        raise UsageError(
            f'--teacher-cache finds an image by its index, which the streamed --dataset {args.dataset} does not give: '
            'use class folders, a tar file or hfds')
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    refused = {
        '--mixup-mode batch, which draws one factor for a whole batch: give --mixup-mode elem or pair':
            mixes and args.mixup_mode == 'batch',
        f'--mixup-off-epoch {args.mixup_off_epoch}, which changes views that are stored: leave it out':
            mixes and args.mixup_off_epoch,
        '--resplit without --aug-splits, which goes by the place in the batch: leave it out':
            args.resplit and not args.aug_splits,
        '--use-multi-epochs-loader, which reads ahead into an epoch whose views are not known: leave it out':
            args.use_multi_epochs_loader,
        '--naflex-loader, whose views are as long as those of their batch: leave it out':
            args.naflex_loader,
    }
    for words in [words for words, given in refused.items() if given]:
        raise UsageError(f'--teacher-cache replays views by image and number, which does not go with {words}')
    return ViewGrid(
        len(dataset), num_views, len(args.train_img_sizes or [0]), max(1, args.aug_splits),
        max(1, math.ceil(args.aug_repeats)))


def replay_views(loader: Any, grid: ViewGrid, mixing: Optional[ViewMixing] = None) -> None:
    """Let a loader of timm's, with prefetcher or without, give views.

    Args:
        loader: Resumable, not iterated over, and not mixing itself.
        grid: All views.
        mixing: Mixes views; None where they stay as they are.
    """
    resumable = find_resumable(loader)
    assert resumable is not None
    inner = resumable.loader
    replace_dataset(inner, ViewDataset(inner.dataset, grid, mixing))
    batches: Any = inner.batch_sampler
    if isinstance(batches.sampler, RepeatAugSampler):
        batches.sampler = RepeatedViews(batches.sampler)
    if getattr(loader, 'random_erasing', None) is not None:
        erasing = ReplayedErasing(loader.random_erasing, grid)
        loader.random_erasing, resumable.on_batch = erasing, erasing.note


class _KeyedViews(Sequence[View]):
    """The views of keys, as a sampler."""

    def __init__(self, grid: ViewGrid, keys: Any):
        self.grid = grid
        self.keys = keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: Any) -> Any:
        return self.grid.view(self.keys[i])


def load_views(
        loader: Any,
        keys: Any,
        batch_size: int,
        num_workers: int = 0,
) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    """Yield views as a loader of `replay_views` gives them, in the order of their keys.

    Args:
        loader: That loader, which is left as it is.
        keys: Of the first split of views of one size.
        batch_size: Images of a batch; the last may have fewer.
        num_workers: Loader processes.
    """
    resumable = find_resumable(loader)
    assert resumable is not None
    dataset: Any = resumable.loader.dataset
    # a generator of its own: no random number of the run is drawn
    batches: Any = DataLoader(
        dataset, batch_size, sampler=_KeyedViews(dataset.grid, keys), num_workers=num_workers,
        collate_fn=resumable.collate_fn, generator=torch.Generator())
    if loader is resumable:
        yield from batches
        return
    single = copy.copy(loader)
    erasing = loader.random_erasing
    for batch in batches:
        if erasing is not None:
            erasing.note(batch)
        single.loader = [batch]
        yield from single
