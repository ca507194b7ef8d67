"""Loaders of the training and the validation data, as timm builds them."""
import copy
import logging
from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Optional, Tuple, cast

import torch
from timm.data import AugMixDataset, create_loader
from timm.data.scheduled_sampler import ScheduledTransformDataset
from torch.utils.data import Dataset, IterableDataset

from ..errors import UsageError
from ._pillow import posterize_to_black
from .batch_scale import BatchScale
from .datasets import create_datasets
from .fingerprint import Fingerprint, fingerprint_dataset
from .indexing import IndexedDataset, SpacedDataset, index_samples
from .mixup import create_mixup, create_view_mixing
from .naflex import PatchSize, create_naflex_eval_loader, create_naflex_train_loader
from .pad_crop import use_pad_crop
from .resumable import ResumableLoader, find_resumable, make_resumable
from .views import ViewDataset, ViewGrid, create_view_grid, replay_views

_logger = logging.getLogger(__name__)


@dataclass
class DataLoaders:
    """Loaders of a training run.

    Attributes:
        train: Training loader; with the prefetcher its batches lie on the device, normalised and mixed.
        eval: Validation loader, None without validation data.
        mixup_fn: To call on each (input, target) of `train`; None where there is no mixup or the loader does it.
        batch_size: Images of a training batch, on average where batches differ.
        batch_scale: Factor on the loss of a batch by its size; None where all are alike.
        fingerprints: What tells the 'training' and the 'validation' data from others.
        grid: The views that `train` replays; None where they are drawn anew.
    """
    train: Any
    eval: Optional[Any]
    mixup_fn: Optional[Callable] = None
    batch_size: float = 0.
    batch_scale: Optional[BatchScale] = None
    fingerprints: Dict[str, Fingerprint] = field(default_factory=dict)
    grid: Optional[ViewGrid] = None

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
        patch_size: Optional[PatchSize] = None,
        num_views: int = 0,
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
        patch_size: The student's (height, width) of a patch, for `--naflex-loader`.
        num_views: Training images are replayed views, so many of each, and targets carry their keys (`split_keys`) in
            place of indices; 0 for views that are drawn anew.

    Raises:
        UsageError: As `create_datasets`, and for settings that leave the training loader without a batch or an index.
    """
    if args.aug_repeats and not distributed:
        raise UsageError(f'--aug-repeats {args.aug_repeats:g} works in distributed training only: leave it out')
    dataset_train, dataset_eval = create_datasets(args, data_config, num_classes)
    datasets = {'training': dataset_train, 'validation': dataset_eval}
    fingerprints = {name: fingerprint_dataset(data) for name, data in datasets.items() if data is not None}
    grid = create_view_grid(args, dataset_train, num_views) if num_views else None
    if with_indices and grid is None:
        dataset_train = index_samples(dataset_train)
    common: Dict[str, Any] = {'model_dtype': model_dtype, 'distributed': distributed, 'patch_size': patch_size}
    with posterize_to_black():
        loader_train, mixup_fn = _create_train_loader(
            args, data_config, dataset_train, device, num_classes, grid=grid, **common)
    if not isinstance(dataset_train, IterableDataset) and len(loader_train) == 0:
        raise UsageError(
            f'--batch-size {args.batch_size} is more than the training images of a process '
            f'({len(loader_train.sampler)}): there would be no full batch, pass a smaller one')
    loader_eval = None
    if dataset_eval is not None:
        batch_size = args.validation_batch_size
        loader_eval = create_eval_loader(args, data_config, dataset_eval, device, batch_size=batch_size, **common)
    if grid is not None and find_resumable(loader_eval) is not None:
        # starting its processes draws from the run's generator, early where a live teacher is evaluated first
        cast(ResumableLoader, find_resumable(loader_eval)).loader.generator = torch.Generator()
    batch_size, batch_scale = _batch_sizes(args, loader_train, device, distributed)
    return DataLoaders(loader_train, loader_eval, mixup_fn, batch_size, batch_scale, fingerprints, grid)


def _batch_sizes(
        args: Namespace,
        loader: Any,
        device: torch.device,
        distributed: bool,
) -> Tuple[float, Optional[BatchScale]]:
    """Return the images of a training batch, and what a batch counts where batches differ in size."""
    if args.naflex_loader:
        exchange = device if distributed else None
        return float(args.batch_size), BatchScale(args.naflex_loss_scale, args.batch_size, exchange)
    if args.train_img_sizes is None:
        return float(args.batch_size), None
    sampler = loader.batch_sampler
    _logger.info(
        f'Training sizes {args.train_img_sizes} with batches of {sampler.batch_sizes} images, on average '
        f'{sampler.average_batch_size:.2f}, {len(sampler)} batches per epoch.')
    return sampler.average_batch_size, BatchScale(args.variable_batch_loss_scale, sampler.average_batch_size)


def create_eval_loader(
        args: Namespace,
        data_config: Dict[str, Any],
        dataset: Dataset,
        device: torch.device,
        batch_size: Optional[int] = None,
        model_dtype: Optional[torch.dtype] = None,
        distributed: bool = False,
        patch_size: Optional[PatchSize] = None,
        persistent: bool = True,
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
        patch_size: The model's (height, width) of a patch, for `--naflex-loader`.
        persistent: Keep the loader processes between two passes.
    """
    num_workers = args.workers
    if distributed and ('tfds' in args.dataset or 'wds' in args.dataset):
        num_workers = min(2, num_workers)  # each worker of each process may pad the end of a streamed dataset
    kwargs: Dict[str, Any] = dict(
        _common_kwargs(args, data_config, device, model_dtype, distributed),
        batch_size=batch_size or args.batch_size,
        is_training=False,
        num_workers=num_workers,
        **_resize_kwargs(args, data_config),
    )
    if args.naflex_loader:
        return make_resumable(create_naflex_eval_loader(args, dataset, patch_size or (16, 16), **kwargs))
    tf_preprocessing = getattr(args, 'tf_preprocessing', False)
    return make_resumable(create_loader(
        cast(Any, dataset),  # torchvision's datasets work too
        input_size=data_config['input_size'],
        tf_preprocessing=tf_preprocessing,
        persistent_workers=persistent,
        **kwargs,
    ))


def _resize_kwargs(args: Namespace, data_config: Dict[str, Any]) -> Dict[str, Any]:
    """How validation brings an image to the input size."""
    return dict(
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        crop_border_pixels=getattr(args, 'crop_border_pixels', None),
    )


def _common_kwargs(
        args: Namespace,
        data_config: Dict[str, Any],
        device: torch.device,
        model_dtype: Optional[torch.dtype],
        distributed: bool,
) -> Dict[str, Any]:
    """What training and validation have in common."""
    return dict(
        mean=data_config['mean'],
        std=data_config['std'],
        pin_memory=args.pin_mem,
        img_dtype=model_dtype or torch.float32,
        device=device,
        distributed=distributed,
        use_prefetcher=not args.no_prefetcher,
    )


def create_pass_loader(
        args: Namespace,
        data_config: Dict[str, Any],
        dataset: Dataset,
        device: torch.device,
        training_transform: bool = False,
        num_images: Optional[int] = None,
        **kwargs: Any,
) -> Any:
    """Loader of every training image once and in order, unmixed; the training loader stays as it is.

    Args:
        args: Training arguments.
        data_config: Resolved by `timm.data.resolve_data_config`.
        dataset: Dataset of the training loader, with its transform.
        device: Where the prefetcher puts batches.
        training_transform: Keep that transform; else the images are as in validation.
        num_images: So many of them at most, evenly spaced; of a stream all.
        kwargs: As for `create_eval_loader`.
    """
    if training_transform and (args.train_img_sizes is not None or args.aug_splits > 1):
        raise UsageError(
            '--nd-class-means-transform train does not go with --train-img-sizes and --aug-splits: use '
            'eval.')
    while isinstance(dataset, (AugMixDataset, IndexedDataset, ScheduledTransformDataset, ViewDataset)):
        dataset = dataset.dataset
    copied = copy.copy(dataset)
    if num_images is not None and hasattr(copied, '__len__') and not isinstance(copied, IterableDataset):
        copied = SpacedDataset(copied, num_images)
    loader = create_eval_loader(args, data_config, copied, device, batch_size=args.validation_batch_size, **kwargs)
    if training_transform:
        cast(Any, copied).transform = cast(Any, dataset).transform
    return loader


def _create_train_loader(
        args: Namespace,
        data_config: Dict[str, Any],
        dataset: Dataset,
        device: torch.device,
        num_classes: int,
        model_dtype: Optional[torch.dtype] = None,
        distributed: bool = False,
        patch_size: Optional[PatchSize] = None,
        grid: Optional[ViewGrid] = None,
) -> Tuple[Any, Optional[Callable]]:
    """Return the loader, and mixup where the loader does not do it."""
    kwargs = {**_common_kwargs(args, data_config, device, model_dtype, distributed), **_train_kwargs(args, data_config)}
    if args.naflex_loader:
        rank, world_size = getattr(args, 'rank', 0), getattr(args, 'world_size', 1)
        loader = create_naflex_train_loader(
            args, dataset, num_classes, patch_size or (16, 16), rank, world_size, **kwargs)
        return make_resumable(loader), None
    collate_fn, mixup_fn = create_mixup(args, num_classes) if grid is None else (None, None)
    if args.aug_splits > 1:
        dataset = AugMixDataset(dataset, num_splits=args.aug_splits)
    reads_ahead = args.use_multi_epochs_loader and args.workers > 0  # without workers there is nothing to keep alive
    try:
        loader = create_loader(
            cast(Any, dataset),
            input_size=data_config['input_size'],
            collate_fn=collate_fn,
            use_multi_epochs_loader=reads_ahead,
            **_size_schedule_kwargs(args),
            **kwargs,
        )
    except (TypeError, ValueError) as error:
        if args.train_img_sizes is None:
            raise
        raise UsageError(f'--train-img-sizes cannot be scheduled like this: {error}') from error
    if args.train_crop_mode == 'pad' and not args.no_aug:
        _pad_crop(args, data_config, loader)
    if reads_ahead:
        _logger.warning(
            '--use-multi-epochs-loader reads beyond the end of an epoch, which no resumed run can repeat: '
            'after a stop this run goes on, but not as if it had never stopped. Loader processes live as '
            'long as the run without it, too.')
    loader = loader if reads_ahead else make_resumable(loader)
    if grid is not None:
        replay_views(loader, grid, create_view_mixing(args, num_classes, grid.num_samples))
    return loader, mixup_fn


def _pad_crop(args: Namespace, data_config: Dict[str, Any], loader: Any) -> None:
    if data_config['crop_pct'] != 1:
        _logger.warning(
            f'--train-crop-mode pad pads images as validation sees them, enlarged and cropped at its crop_pct '
            f'{data_config["crop_pct"]}. For the papers\' pre-processing, which keeps the pixels, give --crop-pct 1.')
    use_pad_crop(loader.dataset, mean=data_config['mean'], **_resize_kwargs(args, data_config))


def _train_kwargs(args: Namespace, data_config: Dict[str, Any]) -> Dict[str, Any]:
    """Augmentation and batching."""
    use_own = args.train_interpolation and not args.no_aug
    return dict(
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        re_split=args.resplit,
        train_crop_mode=None if args.train_crop_mode == 'pad' else args.train_crop_mode,  # timm's are of its own
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
        num_aug_splits=args.aug_splits,
        interpolation=args.train_interpolation if use_own else data_config['interpolation'],
        num_workers=args.workers,
        worker_seeding=args.worker_seeding,
    )


def _size_schedule_kwargs(args: Namespace) -> Dict[str, Any]:
    """Which image sizes the batches have."""
    return dict(
        input_size_choices=args.train_img_sizes,
        batch_size_choices=args.train_batch_sizes,
        batch_choice_weights=args.train_size_probs,
        batch_choice_seed=args.seed,
        batch_choice_schedule=args.train_size_schedule,
        batch_schedule_epochs=args.epochs if args.train_size_schedule == 'progressive' else None,
        batch_schedule_spread=args.train_size_schedule_spread,
        batch_schedule_random_mix=args.train_size_random_mix,
        num_batches=args.train_batches_per_epoch,
    )


def set_loader_epoch(loader: Any, epoch: int) -> None:
    """Tell dataset and sampler the epoch, for those that shuffle by it."""
    if hasattr(loader.dataset, 'set_epoch'):
        loader.dataset.set_epoch(epoch)
    for sampler in (loader.batch_sampler, loader.sampler):
        if hasattr(sampler, 'set_epoch'):
            sampler.set_epoch(epoch)
            break
