"""Loaders of the training and the validation data, as timm builds them."""
import copy
from argparse import Namespace
from dataclasses import dataclass
from typing import Any, Callable, Dict, Optional, Tuple

import torch
from timm.data import FastCollateMixup, Mixup, create_loader
from torch.utils.data import Dataset, IterableDataset

from ..errors import UsageError
from .datasets import create_datasets
from .indexing import IndexedDataset, index_samples
from .targets import is_mixup_active
from .workers import ResumableLoader, find_resumable, make_resumable


@dataclass
class DataLoaders:
    """What a training run reads.

    Attributes:
        train: Training loader; with the prefetcher its batches lie on the device, normalised and mixed.
        eval: Validation loader, None without validation data.
        mixup_fn: To call on each (input, target) of `train`; None where there is no mixup or the loader does it.
    """
    train: Any
    eval: Optional[Any]
    mixup_fn: Optional[Callable]

    def _resumable(self) -> Dict[str, ResumableLoader]:
        loaders = {'train': find_resumable(self.train), 'eval': find_resumable(self.eval)}
        return {name: loader for name, loader in loaders.items() if loader is not None}

    def state_dict(self) -> Dict[str, Any]:
        """Return the random generators of all loader processes."""
        return {name: loader.state_dict() for name, loader in self._resumable().items()}

    def load_state_dict(self, state: Optional[Dict[str, Any]]) -> None:
        """Let loader processes, which must not run yet, start from the generators that `state_dict` returned."""
        for name, loader in self._resumable().items():
            if state and name in state:
                loader.load_state_dict(state[name])


def create_loaders(
        args: Namespace,
        data_config: Dict[str, Any],
        num_classes: int,
        device: torch.device,
        model_dtype: Optional[torch.dtype] = None,
        distributed: bool = False,
        with_indices: bool = False,
) -> DataLoaders:
    """Datasets, loaders and mixup of a training run.

    Args:
        args: Training arguments.
        data_config: Resolved by `timm.data.resolve_data_config`.
        num_classes: Outputs of the student.
        device: Where the prefetcher puts batches.
        model_dtype: Of the images; float32 if None.
        distributed: Whether each process takes its own part of the data.
        with_indices: Training targets are pairs (label, index of the sample), [B, 2].

    Raises:
        UsageError: As `create_datasets`, and for settings that leave the training loader without a batch or an index.
    """
    if args.aug_repeats and not distributed:
        raise UsageError(f'--aug-repeats {args.aug_repeats:g} works in distributed training only: leave it out')
    dataset_train, dataset_eval = create_datasets(args, data_config, num_classes)
    if with_indices:
        dataset_train = index_samples(dataset_train)
    collate_fn, mixup_fn = _create_mixup(args, num_classes)
    common: Dict[str, Any] = {'model_dtype': model_dtype, 'distributed': distributed}
    loader_train = _create_train_loader(args, data_config, dataset_train, device, collate_fn=collate_fn, **common)
    if not isinstance(dataset_train, IterableDataset) and len(loader_train) == 0:
        raise UsageError(
            f'--batch-size {args.batch_size} is more than the training images of a process '
            f'({len(loader_train.sampler)}): there would be no full batch, pass a smaller one')
    loader_eval = None
    if dataset_eval is not None:
        batch_size = args.validation_batch_size
        loader_eval = create_eval_loader(args, data_config, dataset_eval, device, batch_size=batch_size, **common)
    return DataLoaders(loader_train, loader_eval, mixup_fn)


def create_eval_loader(
        args: Namespace,
        data_config: Dict[str, Any],
        dataset: Dataset,
        device: torch.device,
        batch_size: Optional[int] = None,
        model_dtype: Optional[torch.dtype] = None,
        distributed: bool = False,
) -> Any:
    """Validation loader; both scripts use it, so that equal data configs give equal numbers.

    Args:
        args: Arguments of either script.
        data_config: Resolved by `timm.data.resolve_data_config`.
        dataset: Validation dataset.
        device: Where the prefetcher puts batches.
        batch_size: `--batch-size` if None.
        model_dtype: Of the images; float32 if None.
        distributed: Whether each process takes its own part of the data.
    """
    num_workers = args.workers
    if distributed and ('tfds' in args.dataset or 'wds' in args.dataset):
        num_workers = min(2, num_workers)  # each worker of each process may pad the end of a streamed dataset
    return _create_loader(
        args,
        data_config,
        dataset,
        device,
        model_dtype=model_dtype,
        distributed=distributed,
        batch_size=batch_size or args.batch_size,
        is_training=False,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        num_workers=num_workers,
    )


def create_pass_loader(
        args: Namespace,
        data_config: Dict[str, Any],
        dataset: Dataset,
        device: torch.device,
        training_transform: bool = False,
        **kwargs: Any,
) -> Any:
    """Loader of every training image once and in order, unmixed; the training loader stays as it is.

    Args:
        args: Training arguments.
        data_config: Resolved by `timm.data.resolve_data_config`.
        dataset: Dataset of the training loader, with its transform.
        device: Where the prefetcher puts batches.
        training_transform: Keep that transform; else the images are as in validation.
        kwargs: As for `create_eval_loader`.
    """
    if isinstance(dataset, IndexedDataset):
        dataset = dataset.dataset
    copied = copy.copy(dataset)
    loader = create_eval_loader(args, data_config, copied, device, batch_size=args.validation_batch_size, **kwargs)
    if training_transform:
        copied.transform = dataset.transform  # type: ignore[attr-defined]
    return loader


def _create_train_loader(
        args: Namespace,
        data_config: Dict[str, Any],
        dataset: Dataset,
        device: torch.device,
        **kwargs: Any,
) -> Any:
    use_own = args.train_interpolation and not args.no_aug
    return _create_loader(
        args,
        data_config,
        dataset,
        device,
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob,
        gaussian_blur_prob=args.gaussian_blur_prob,
        auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats,
        interpolation=args.train_interpolation if use_own else data_config['interpolation'],
        num_workers=args.workers,
        worker_seeding=args.worker_seeding,
        use_multi_epochs_loader=args.use_multi_epochs_loader,
        **kwargs,
    )


def _create_loader(
        args: Namespace,
        data_config: Dict[str, Any],
        dataset: Dataset,
        device: torch.device,
        model_dtype: Optional[torch.dtype] = None,
        **kwargs: Any,
) -> Any:
    """What training and validation have in common."""
    loader = create_loader(
        dataset,  # type: ignore[arg-type]  # torchvision's datasets work too
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        pin_memory=args.pin_mem,
        img_dtype=model_dtype or torch.float32,
        device=device,
        use_prefetcher=not args.no_prefetcher,
        **kwargs,
    )
    # the iterator of timm's multi-epochs loader reads beyond the end of an epoch, which no resumed run can repeat
    return loader if kwargs.get('use_multi_epochs_loader') else make_resumable(loader)


def _create_mixup(args: Namespace, num_classes: int) -> Tuple[Optional[Callable], Optional[Callable]]:
    """Mixup as a collate function or as a step of the loop: one of the two, or neither where it is off."""
    if not is_mixup_active(args):
        return None, None
    mixup = (Mixup if args.no_prefetcher else FastCollateMixup)(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )
    return (None, mixup) if args.no_prefetcher else (mixup, None)


def set_loader_epoch(loader: Any, epoch: int) -> None:
    """Tell dataset and sampler the epoch, for those that shuffle by it."""
    if hasattr(loader.dataset, 'set_epoch'):
        loader.dataset.set_epoch(epoch)
    for sampler in (loader.batch_sampler, loader.sampler):
        if hasattr(sampler, 'set_epoch'):
            sampler.set_epoch(epoch)
            break
