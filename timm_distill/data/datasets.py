"""Datasets of the splits, with checks of class folders where timm would go on with other data than the user meant."""
import importlib.util
import logging
import os
import tarfile
from argparse import Namespace
from functools import partial
from typing import Any, Dict, List, Optional, Tuple, cast

from timm.data import ImageDataset, create_dataset
from torch.utils.data import Dataset

from ..errors import UsageError
from .class_map import read_class_map, report_class_map, settle_order
from .classes import check_class_count, check_same_classes, class_to_idx, known_names
from .decoding import ImageDecoder
from .holdout import hold_out, read_fraction
from .images import DecodedStream, StrictImageDataset, load_file
from .targets import set_multi_label_targets
from .unlabelled import find_split, forget_labels, split_names, why_folder_is_unlabelled, why_reader_is_unlabelled

_logger = logging.getLogger(__name__)

# Readers that bring their own splits and labels, each with the package that it needs and that package's name for pip;
# all other datasets are class folders or tar files.
_READERS = {
    'torch': ('torchvision', 'torchvision'),
    'hfds': ('datasets', 'datasets'),
    'hfids': ('datasets', 'datasets'),
    'tfds': ('tensorflow_datasets', 'tensorflow-datasets'),
    'wds': ('webdataset', 'webdataset'),
}
_STREAMS_OF_IMAGES = ('hfids', 'wds')
_TABLES = ('hfds', 'hfids')
_DEFAULT_VAL_SPLIT = 'validation'


def create_datasets(
        args: Namespace,
        data_config: Dict[str, Any],
        num_classes: int,
) -> Tuple[Dataset, Optional[Dataset]]:
    """Training and validation dataset; the latter is None where `--val-split` is empty.

    Without labels it is also None where nothing says which images to validate on.

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
        no_labels=args.no_labels,
    )
    _fit_targets(args, dataset_train, num_classes)
    if not args.val_split:
        return dataset_train, None
    fraction = read_fraction(args.val_split)
    if fraction is not None and (args.dataset or find_split(args.data_dir or args.data, args.val_split) is None):
        return hold_out(dataset_train, fraction, args.max_bad_images)
    dataset_eval = _create_eval_split(args, data_config)
    if dataset_eval is None:
        return dataset_train, None
    if _is_folder_dataset(args.dataset):
        check_same_classes(args, dataset_train, dataset_eval)
    if args.task == 'multilabel':
        set_multi_label_targets(args, dataset_eval, num_classes)
    return dataset_train, dataset_eval


def read_class_names(args: Namespace, data_config: Dict[str, Any], num_classes: int) -> List[str]:
    """Return the name of every class of the training data, '' for one without; no image is read.

    Raises:
        UsageError: As `create_datasets` does.
    """
    dataset = _create_split(args, data_config, '--train-split', args.train_split, is_training=True, seed=args.seed)
    _fit_targets(args, dataset, num_classes)
    return known_names(dataset, num_classes)


def _create_eval_split(args: Namespace, data_config: Dict[str, Any]) -> Optional[Dataset]:
    """Return the split to validate on; None where there are no labels and the data do not have the default one."""
    try:
        return _create_split(
            args,
            data_config,
            '--val-split',
            args.val_split,
            is_training=False,
            num_samples=args.val_num_samples,
            no_labels=args.no_labels,
        )
    except UsageError as error:
        if not args.no_labels or args.val_split != _DEFAULT_VAL_SPLIT:
            raise
        _logger.info(f'Nothing is held out for validation ({error}); --val-split 0.05 holds out a part.')
        return None


def find_missing_labels(args: Namespace) -> str:
    """Return, in words, why the training data have no labels; '' where they seem to have some, or do not open.

    Args:
        args: Training arguments.
    """
    root = args.data_dir or args.data
    if args.task == 'multilabel' or args.class_map:
        return ''
    if _is_folder_dataset(args.dataset):
        return why_folder_is_unlabelled(root, args.train_split, args.val_split) if root and os.path.exists(root) else ''
    if args.dataset.partition('/')[0].lower() not in (*_TABLES, 'wds'):
        return ''
    try:
        dataset = _create_split(
            args, {'input_size': (3, 1, 1)}, '--train-split', args.train_split, is_training=True, seed=args.seed,
            num_samples=args.train_num_samples)
    except UsageError:
        return ''  # said where it is opened for training
    return why_reader_is_unlabelled(cast(Any, dataset).reader, args.target_key)


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
    _fit_targets(args, dataset, num_classes)
    return dataset


def create_class_folders(args: Namespace, data_config: Dict[str, Any], folder: str, flag: str) -> Dataset:
    """Dataset of a folder or tar file of class folders that a flag names, as validation sees images."""
    if not os.path.exists(folder):
        raise UsageError(f"{flag} '{folder}' does not exist")
    own = Namespace(**{**vars(args), 'dataset': '', 'class_map': '', 'target_key': None, 'task': 'classification'})
    dataset = _create_split(own, data_config, flag, folder, is_training=False, folder=folder)
    if '' in (class_to_idx(dataset) or {}):
        raise UsageError(f'{folder} holds images outside of class folders: move each into the folder of its class')
    return dataset


def create_splits(args: Namespace, data_config: Dict[str, Any], fit_split: str, split: str) -> List[Dataset]:
    """Datasets of two splits as validation sees images; of the second alone where a folder lacks the first."""
    root = args.data_dir or args.data
    is_folder = _is_folder_dataset(args.dataset)
    has_fit = bool(fit_split) and not (is_folder and root and find_split(root, fit_split) is None)
    named = (('--fit-split', fit_split), ('--split', split))
    return [
        _create_split(args, data_config, flag, name, is_training=False, seed=args.seed, num_samples=args.num_samples)
        for flag, name in named[not has_fit:]]


def _fit_targets(args: Namespace, dataset: Dataset, num_classes: int) -> None:
    if getattr(args, 'no_labels', False):
        return
    if args.task == 'multilabel':
        set_multi_label_targets(args, dataset, num_classes)
    elif _is_folder_dataset(args.dataset):
        check_class_count(args, dataset, num_classes)


def _create_split(
        args: Namespace,
        data_config: Dict[str, Any],
        flag: str,
        split: str,
        no_labels: bool = False,
        folder: Optional[str] = None,
        **kwargs: Any,
) -> Dataset:
    root = folder or args.data_dir or args.data
    is_folder = _is_folder_dataset(args.dataset)
    leave_out = None
    if folder:
        kwargs['search_split'] = False
    elif is_folder and no_labels:
        root, leave_out = _unlabelled_folder(args, flag, split)
        kwargs['search_split'] = False
    elif is_folder:
        _check_split_folder(root, flag, split)
    kwargs = dict(
        kwargs,
        root=root,
        split=split,
        class_map=_read_class_map(args, is_folder, root, split),
        download=args.dataset_download,
        batch_size=args.batch_size,
        input_img_mode=args.input_img_mode or ('RGB' if data_config['input_size'][0] == 3 else 'L'),
        input_key=args.input_key,
        target_key=_unlabelled_key(args) if no_labels else args.target_key,
        target_format=args.target_format if args.task == 'multilabel' else None,
        trust_remote_code=args.dataset_trust_remote_code,
    )
    if getattr(args, 'tf_preprocessing', False):
        kwargs['load_bytes'] = True
    dataset = _create_folder_dataset(args, flag, kwargs) if is_folder else _create_reader_dataset(args, flag, kwargs)
    if no_labels:
        forget_labels(dataset, leave_out)
    if is_folder:
        _settle_folders(args, dataset)
    # in validation a replaced image would make the numbers wrong
    max_bad = args.max_bad_images if kwargs.get('is_training') else 0
    return StrictImageDataset(dataset, max_bad) if isinstance(dataset, ImageDataset) else dataset


def _read_class_map(args: Namespace, is_folder: bool, root: Optional[str], split: str) -> Optional[Dict[Any, int]]:
    if args.class_map and args.dataset.lower().startswith('torch/'):
        raise UsageError(
            f'--class-map {args.class_map} does not go with --dataset {args.dataset}, whose labels are '
            'its own: leave it out')
    folders = [*(os.path.join(root, name) for name in split_names(split)), root] if root else []
    classes = read_class_map(args.class_map, folders)
    if classes and not is_folder and all(name.isdecimal() for name in classes):
        return {int(name): index for name, index in classes.items()}  # labels that have no names
    return dict(classes) if classes else None


def _settle_folders(args: Namespace, dataset: Any) -> None:
    reader = dataset.reader
    settle_order(reader, bool(args.class_map))
    if args.class_map and isinstance(reader.samples, list):
        report_class_map(args.class_map, reader.root, reader.class_to_idx, reader.samples)


def _create_folder_dataset(args: Namespace, flag: str, kwargs: Dict[str, Any]) -> Dataset:
    if args.target_key is not None:
        raise UsageError(f'--target-key {args.target_key} needs a --dataset with columns, class folders have none')
    if args.task == 'multilabel':
        raise UsageError(
            '--task multilabel needs a --dataset with several labels per image (hfds/, hfids/, tfds/ or '
            'wds/), class folders give one')
    try:
        return create_dataset(args.dataset, **kwargs)
    except (AssertionError, OSError, RuntimeError, ValueError, tarfile.TarError) as error:
        # timm's own words say whether images, the class map or a tar file is at fault
        raise UsageError(
            f"no dataset in {kwargs['root']} for {flag} '{kwargs['split']}': {' '.join(str(error).split())}") from error


def _create_reader_dataset(args: Namespace, flag: str, kwargs: Dict[str, Any]) -> Dataset:
    reader = args.dataset.partition('/')[0].lower()
    module, package = _READERS[reader]
    if importlib.util.find_spec(module) is None:
        raise UsageError(
            f'--dataset {args.dataset} needs the package {package}, which is not installed: '
            f'pip install {package}')
    mode = kwargs['input_img_mode']
    if reader in _STREAMS_OF_IMAGES:
        kwargs = {**kwargs, 'input_img_mode': ''}  # images come as they are and are converted by us
    try:
        return _decode_here(create_dataset(args.dataset, **kwargs), mode, reader)
    except Exception as error:  # each of these libraries raises its own
        reason = ' '.join(str(error).split())[:300] or type(error).__name__
        raise UsageError(
            f"--dataset {args.dataset} cannot be opened with {flag} '{kwargs['split']}' and --data-dir "
            f"{kwargs['root']}: {reason}") from error


def _decode_here(dataset: Any, mode: str, reader: str) -> Dataset:
    """Let images be converted as those of class folders are, where the reader would do it."""
    if reader in _STREAMS_OF_IMAGES:
        return DecodedStream(dataset, mode)
    if callable(getattr(dataset, 'loader', None)):  # torchvision's datasets of files
        dataset.loader = partial(load_file, decode=ImageDecoder(mode))
    return dataset


def _is_folder_dataset(name: str) -> bool:
    prefix, sep, _ = name.partition('/')
    if not sep:
        return True
    if prefix.lower() not in _READERS:
        raise UsageError(f"--dataset '{name}': unknown reader '{prefix}', must be one of {', '.join(_READERS)}")
    return False


def _unlabelled_folder(args: Namespace, flag: str, split: str) -> Tuple[str, Optional[str]]:
    """Return the folder, or tar file, of a split without labels, and a folder in it that is another split.

    The training images are those of the split's folder, or all of `--data-dir` where it has no such folder.
    """
    root = args.data_dir or args.data
    _check_root(root, flag, split)
    if os.path.isfile(root):
        return root, None
    folder = find_split(root, split)
    if folder is not None:
        return folder, None
    if flag == '--val-split':
        raise _no_split_folder(root, flag, split)
    return root, find_split(root, args.val_split) if args.val_split else None


def _unlabelled_key(args: Namespace) -> Optional[str]:
    """Return a column that is there: that of the images, where the one of the labels is not."""
    return (args.input_key or 'image') if args.dataset.partition('/')[0].lower() in _TABLES else None


def _check_root(root: Optional[str], flag: str, split: str) -> None:
    if not root:
        raise UsageError('no dataset given: pass its folder as --data-dir DIR')
    if not os.path.exists(root):
        raise UsageError(f"--data-dir '{root}' does not exist")
    if '[' in split:
        raise UsageError(f"{flag} '{split}': class folders cannot be sliced, pass the name of a folder")
    if not os.path.isdir(root) and flag == '--val-split':  # a tar file would be read as both splits
        raise UsageError(f"--data-dir '{root}' is one file without splits: pass --val-split '' with it")


def _check_split_folder(root: Optional[str], flag: str, split: str) -> None:
    """Reject what timm's search for a split would replace by the whole data folder."""
    _check_root(root, flag, split)
    if root and os.path.isdir(root) and find_split(root, split) is None:
        raise _no_split_folder(root, flag, split)


def _no_split_folder(root: str, flag: str, split: str) -> UsageError:
    hint = ', or an empty one to train without validation' if flag == '--val-split' else ''
    labels = '. For images without labels, nested at will: --no-labels' if flag == '--train-split' else ''
    return UsageError(
        f"no folder for {flag} '{split}' in --data-dir '{root}' (looked for {', '.join(split_names(split))}): "
        f'pass {flag} with the name of its folder{hint}{labels}')
