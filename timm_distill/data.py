"""Datasets, loaders, mixup and the label loss, as timm builds them.

Takes the parsed arguments read-only and knows neither the parser nor models. On top of timm: mistakes in a folder of
images (missing split, shifted labels, unreadable file) stop the run with one line that says what to change, where
timm would go on with other data than the user meant.
"""
import os
import struct
import tarfile
import zlib
from argparse import Namespace
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

import torch
from PIL import Image, UnidentifiedImageError
from timm.data import FastCollateMixup, ImageDataset, Mixup, create_dataset, create_loader
from timm.loss import create_classification_loss
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from .errors import UsageError

# Readers that bring their own splits and labels; all other datasets are class folders or tar files.
_READERS = ('torch', 'hfds', 'hfids', 'tfds', 'wds')

# Folder names that timm takes for one another when it looks for a split.
_SPLIT_ALIASES = (
    ('train', 'training'),
    ('val', 'valid', 'validation', 'eval', 'evaluation'),
)
# All that PIL is known to raise on damaged or foreign files.
_DECODE_ERRORS = (
    OSError, EOFError, SyntaxError, ValueError, IndexError, struct.error, zlib.error, Image.DecompressionBombError)


class DataLoaders(NamedTuple):
    """What a training run reads.

    Attributes:
        train: Training loader; with the prefetcher its batches lie on the device, normalised and mixed.
        eval: Validation loader, None without validation data.
        mixup_fn: To call on each (input, target) of `train`; None where there is no mixup or the loader does it.
    """
    train: Any
    eval: Optional[Any]
    mixup_fn: Optional[Callable]


class StrictImageDataset(ImageDataset):
    """An `ImageDataset` that stops at an unreadable file, where timm goes on with the next image in its place.

    Args:
        dataset: Dataset to take over; its reader and settings are shared.
    """

    def __init__(self, dataset: ImageDataset):
        super().__init__(
            root=None,
            reader=dataset.reader,
            load_bytes=dataset.load_bytes,
            input_img_mode=dataset.input_img_mode,
            transform=dataset.transform,
            target_transform=dataset.target_transform,
            additional_features=dataset.additional_features,
        )

    def __getitem__(self, index: int) -> Tuple[Any, ...]:
        img, target, features = self._read(index)
        if self.transform is not None:
            img = self.transform(img)
        if target is None:
            target = -1
        elif self.target_transform is not None:
            target = self.target_transform(target)
        return (img, target) if self.additional_features is None else (img, target, *features)

    def _read(self, index: int) -> Tuple[Any, Any, list]:
        try:
            file, target, *features = self.reader[index]
            if self.load_bytes:
                return file.read(), target, features
            img: Image.Image = Image.open(file)
            if self.input_img_mode:
                img = img.convert(self.input_img_mode)
            img.load()  # pixels are decoded here, so that a truncated file fails here
            return img, target, features
        except _DECODE_ERRORS as error:
            is_foreign = isinstance(error, UnidentifiedImageError)
            reason = 'not an image of a known format' if is_foreign else ' '.join(str(error).split())
            raise UsageError(
                f'cannot read image {self.filename(index, absolute=True)}: {reason}; repair or remove it') from error


def user_message(error: UsageError) -> str:
    """One line to print for an error, also for one from a loader's worker process.

    Torch raises a worker's exception again in the main process, with the worker's whole traceback as its text.
    """
    return str(error).strip().split(f'{UsageError.__name__}: ')[-1]


def create_datasets(
        args: Namespace,
        data_config: Dict[str, Any],
        num_classes: int,
) -> Tuple[Dataset, Optional[Dataset]]:
    """Training and validation dataset; the latter is None where `--val-split` is empty.

    Args:
        args: Training arguments.
        data_config: Resolved by `timm.data.resolve_data_config`.
        num_classes: Outputs of the student.

    Raises:
        UsageError: For a missing folder or split, and for class folders that do not fit `num_classes` or each other.
    """
    dataset_train = _create_split(
        args,
        data_config,
        '--train-split',
        args.train_split,
        is_training=True,
        seed=args.seed,
        repeats=args.epoch_repeats,
        num_samples=args.train_num_samples,
    )
    _check_class_count(args, dataset_train, num_classes)
    if not args.val_split:
        return dataset_train, None
    dataset_eval = _create_split(
        args,
        data_config,
        '--val-split',
        args.val_split,
        is_training=False,
        num_samples=args.val_num_samples,
    )
    _check_same_classes(args, dataset_train, dataset_eval)
    return dataset_train, dataset_eval


def create_eval_dataset(args: Namespace, data_config: Dict[str, Any], num_classes: int) -> Dataset:
    """Dataset of the validation script, from `--split`, with the checks of `create_datasets`."""
    dataset = _create_split(
        args,
        data_config,
        '--split',
        args.split,
        is_training=False,
        seed=args.seed,
        num_samples=args.num_samples,
    )
    _check_class_count(args, dataset, num_classes)
    return dataset


def _create_split(
        args: Namespace,
        data_config: Dict[str, Any],
        flag: str,
        split: str,
        **kwargs: Any,
) -> Dataset:
    root = args.data_dir or args.data
    is_folder = _is_folder_dataset(args.dataset)
    if is_folder:
        _check_split_folder(root, flag, split)
    kwargs = dict(
        kwargs,
        root=root,
        split=split,
        class_map=args.class_map,
        download=args.dataset_download,
        batch_size=args.batch_size,
        input_img_mode=args.input_img_mode or ('RGB' if data_config['input_size'][0] == 3 else 'L'),
        input_key=args.input_key,
        target_key=args.target_key,
        trust_remote_code=args.dataset_trust_remote_code,
    )
    dataset = _create_folder_dataset(args, flag, kwargs) if is_folder else create_dataset(args.dataset, **kwargs)
    return StrictImageDataset(dataset) if isinstance(dataset, ImageDataset) else dataset


def _create_folder_dataset(args: Namespace, flag: str, kwargs: Dict[str, Any]) -> Dataset:
    if args.target_key is not None:
        raise UsageError(f'--target-key {args.target_key} needs a --dataset with columns, class folders have none')
    try:
        return create_dataset(args.dataset, **kwargs)
    except (AssertionError, OSError, RuntimeError, ValueError, tarfile.TarError) as error:
        # timm's own words say whether images, the class map or a tar file is at fault
        raise UsageError(
            f"no dataset in {kwargs['root']} for {flag} '{kwargs['split']}': {' '.join(str(error).split())}") from error


def _is_folder_dataset(name: str) -> bool:
    prefix, sep, _ = name.partition('/')
    if not sep:
        return True
    if prefix.lower() not in _READERS:
        raise UsageError(f"--dataset '{name}': unknown reader '{prefix}', must be one of {', '.join(_READERS)}")
    return False


def _check_split_folder(root: Optional[str], flag: str, split: str) -> None:
    """Reject what timm's search for a split would replace by the whole data folder."""
    if not root:
        raise UsageError('no dataset given: pass its folder as --data-dir DIR')
    if not os.path.exists(root):
        raise UsageError(f"--data-dir '{root}' does not exist")
    if '[' in split:
        raise UsageError(f"{flag} '{split}': class folders cannot be sliced, pass the name of a folder")
    if not os.path.isdir(root):
        if flag == '--val-split':  # a tar file would be read as both splits
            raise UsageError(f"--data-dir '{root}' is one file without splits: pass --val-split '' with it")
        return
    names = [split] + [alias for group in _SPLIT_ALIASES if split in group for alias in group if alias != split]
    if not any(os.path.exists(os.path.join(root, n)) for n in names):
        hint = ', or an empty one to train without validation' if flag == '--val-split' else ''
        raise UsageError(
            f"no folder for {flag} '{split}' in --data-dir '{root}' (looked for {', '.join(names)}): "
            f'pass {flag} with the name of its folder{hint}')


def _class_to_idx(dataset: Dataset) -> Optional[Dict[str, int]]:
    """Labels by class folder name; None where they do not come from folders."""
    reader = getattr(dataset, 'reader', None)
    return getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None)


def _check_class_count(args: Namespace, dataset: Dataset, num_classes: int) -> None:
    classes = _class_to_idx(dataset) if _is_folder_dataset(args.dataset) else None
    if classes is None:
        return
    folder = dataset.reader.root  # type: ignore[attr-defined]
    if args.class_map:
        needed = max(classes.values()) + 1
        if needed > num_classes:
            raise UsageError(f'--class-map {args.class_map} numbers {needed} classes, but the model has {num_classes}: '
                             f'pass --num-classes {needed}')
    elif '' in classes:
        raise UsageError(f'{folder} holds images outside of class folders: move each into the folder of its class')
    elif len(classes) < 2:
        raise UsageError(f'{folder} has only one class folder with images ({next(iter(classes))}), two are the least')
    elif len(classes) != num_classes:
        raise UsageError(f'{folder} has {len(classes)} class folders with images, but the model has {num_classes} '
                         f'classes: pass --num-classes {len(classes)}')


def _check_same_classes(args: Namespace, dataset_train: Dataset, dataset_eval: Dataset) -> None:
    """Labels are numbered per split: one folder more or less in either shifts all labels after it."""
    train, val = _class_to_idx(dataset_train), _class_to_idx(dataset_eval)
    if args.class_map or not _is_folder_dataset(args.dataset) or train is None or val is None or train == val:
        return
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    parts = [f'only in {split}: {", ".join(names[:5])}{", ..." if len(names) > 5 else ""}'
             for split, names in ((args.train_split, only_train), (args.val_split, only_val)) if names]
    raise UsageError(
        f'the class folders of --train-split {args.train_split} and --val-split {args.val_split} differ '
        f'({"; ".join(parts)}): make them equal, or give the labels with --class-map')


def is_mixup_active(args: Namespace) -> bool:
    """Whether training targets are mixed, which makes them soft: [B, num_classes]."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def create_loaders(
        args: Namespace,
        data_config: Dict[str, Any],
        num_classes: int,
        device: torch.device,
        model_dtype: Optional[torch.dtype] = None,
        distributed: bool = False,
) -> DataLoaders:
    """Datasets, loaders and mixup of a training run.

    Args:
        args: Training arguments.
        data_config: Resolved by `timm.data.resolve_data_config`.
        num_classes: Outputs of the student.
        device: Where the prefetcher puts batches.
        model_dtype: Of the images; float32 if None.
        distributed: Whether each process takes its own part of the data.

    Raises:
        UsageError: As `create_datasets`, and for settings that leave the training loader without a batch.
    """
    if args.aug_repeats and not distributed:
        raise UsageError(f'--aug-repeats {args.aug_repeats:g} works in distributed training only: leave it out')
    dataset_train, dataset_eval = create_datasets(args, data_config, num_classes)
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
    return create_loader(
        dataset,  # type: ignore[arg-type]  # torchvision's datasets work too
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        pin_memory=args.pin_mem,
        img_dtype=model_dtype or torch.float32,
        device=device,
        use_prefetcher=not args.no_prefetcher,
        # Workers that live on keep generators that no checkpoint can restore; new ones are seeded at every epoch
        # from the main process, so that a resumed run sees what it would have seen without the stop.
        persistent_workers=False,
        **kwargs,
    )


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


def create_train_loss(args: Namespace, device: Optional[torch.device] = None) -> nn.Module:
    """Loss on the labels: cross entropy or BCE, smoothed here for class indices and by mixup for mixed targets."""
    loss_fn = create_classification_loss(
        'bce' if args.bce_loss else 'ce',
        smoothing=args.smoothing,
        soft_targets=is_mixup_active(args),
        bce_target_thresh=args.bce_target_thresh,
        bce_sum=args.bce_sum,
        pos_weight=args.bce_pos_weight,
    )
    return loss_fn.to(device=device)


def set_loader_epoch(loader: Any, epoch: int) -> None:
    """Tell dataset and sampler the epoch, for those that shuffle by it."""
    if hasattr(loader.dataset, 'set_epoch'):
        loader.dataset.set_epoch(epoch)
    for sampler in (loader.batch_sampler, loader.sampler):
        if hasattr(sampler, 'set_epoch'):
            sampler.set_epoch(epoch)
            break
