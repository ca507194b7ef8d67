"""The teacher's mean pre-logits of every class: computed in a pass over the training set, cached, read from a file."""
import hashlib
import json
import logging
import os
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import timm
import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from timm.task import evaluation_sample_limit

from ..checkpoint.file import flush, put_in_place
from ..data import digest_fingerprint, fingerprint_dataset
from ..engine.train_log import progress_bar
from ..errors import UsageError
from ..utils._compat import list_non_persistent_buffers
from ..utils.random import get_rng_state, set_rng_state
from ..utils.text import printable
from .teacher import Teacher

_logger = logging.getLogger(__name__)

_NAME = 'class_means'  # of the tensor in a file
_CHECKSUM = 'sha256'  # of its content, in the file's metadata
# Of a module, what says nothing of its numbers; preprocessing has an entry of its own.
_NO_SETTINGS = ('training', 'pretrained_cfg', 'default_cfg', 'grad_checkpointing')


@torch.no_grad()
def compute_class_means(
        teacher: Teacher,
        loader: Any,
        num_classes: int,
        device: Optional[torch.device] = None,
        model_dtype: Optional[torch.dtype] = None,
        amp_autocast: Callable = nullcontext,
        distributed: bool = False,
        progress: Optional[bool] = None,
) -> torch.Tensor:
    """Run a teacher over a loader and average its pre-logits by class; every image counts once, whatever the ranks.

    The run's random state stays as it was.

    Args:
        teacher: Frozen teacher.
        loader: Yields (images normalised for the student, class indices [B]).
        num_classes: K.
        device: Where the teacher lives; that of its parameters by default.
        model_dtype: Of the images, where the loader does not set it.
        amp_autocast: Makes the context of each forward pass.
        distributed: Each rank has its part of the data; all get the means of the whole.
        progress: Show a progress bar; None shows one where stderr is a terminal.

    Returns:
        Means [K, D], float32; zeros for classes without images.
    """
    device = device or next(teacher.parameters()).device
    precise = torch.float32 if device.type == 'mps' else torch.float64
    sums = torch.zeros(num_classes, teacher.tap_channels('pre_logits'), dtype=precise, device=device)
    counts = torch.zeros(num_classes, 1, dtype=precise, device=device)
    remaining = evaluation_sample_limit(loader)
    state = get_rng_state()
    primary = not distributed or dist.get_rank() == 0
    with progress_bar(loader, 'Class means', progress if primary else False) as bar:
        for images, target in bar:
            with amp_autocast():
                pre_logits = teacher(images.to(device=device, dtype=model_dtype), frozenset({'pre_logits'})).pre_logits
            target = target.to(device)[:remaining]
            if remaining is not None:
                remaining -= len(target)  # what a distributed sampler adds to make ranks even comes last
            sums.index_add_(0, target, pre_logits[:len(target)].to(precise))
            counts.index_add_(0, target, torch.ones_like(target, dtype=precise)[:, None])
    set_rng_state(state)
    if distributed:
        dist.all_reduce(sums)
        dist.all_reduce(counts)
    empty = int((counts == 0).sum())
    if empty and primary:
        _logger.warning(f'{empty} of {num_classes} classes have no training image: they have no class mean.')
    return (sums / counts.clamp_min(1)).float()


def class_means_key(teacher: Teacher, dataset: Any, settings: Sequence[Any]) -> str:
    """Return what names the class means of a teacher on a dataset, as 16 hex digits: all that the numbers depend on.

    Args:
        teacher: The teacher: its weights, its architecture with all arguments, its precision and its preprocessing.
        dataset: Training dataset.
        settings: All else that images and numbers depend on (transform, precision of the run), with stable texts.
    """
    precision = str(next(teacher.parameters()).dtype), teacher.autocast
    model = teacher.digest, _hash_structure(teacher.model), timm.__version__, precision
    parts = [*model, sorted(teacher.preprocessing.values().items()), _hash_data(dataset), *settings]
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:16]


def _hash_structure(model: nn.Module) -> str:
    """Return the SHA-256 of what a model computes with beside its weights: its modules, their settings, their tables.

    Two models of the same weights can differ in it: by their activation, their pooling, a stride, an epsilon.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        settings = sorted((key, _describe_setting(value)) for key, value in vars(module).items() if key[:1] != '_')
        kept = [(key, text) for key, text in settings if text and key not in _NO_SETTINGS]
        digest.update(f'{name} {type(module).__module__} {type(module).__qualname__} {kept}\n'.encode())
        for key in list_non_persistent_buffers(module):  # the state dict of sharded weights takes all processes
            table = getattr(module, key)
            if table is not None:
                digest.update(table.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _describe_setting(value: Any) -> str:
    """Return a setting as a text that is the same in every process, '' for what is none."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.Size)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return f'[{", ".join(_describe_setting(v) for v in value)}]'
    if isinstance(value, partial):
        return f'{_describe_setting(value.func)} {_describe_setting(value.args)} {_describe_setting(value.keywords)}'
    if isinstance(value, dict):
        return _describe_setting([[str(key), item] for key, item in value.items()])
    return str(getattr(value, '__qualname__', ''))  # functions and classes


def _hash_data(dataset: Any) -> str:
    """Return the SHA-256 of a dataset's fingerprint and of the sizes of its files."""
    digest = hashlib.sha256(digest_fingerprint(fingerprint_dataset(dataset)).encode())
    for path, *_ in getattr(getattr(dataset, 'reader', None), 'samples', None) or ():
        if isinstance(path, str):
            digest.update(b'%d ' % (os.path.getsize(path) if os.path.isfile(path) else -1))
    return digest.hexdigest()


def save_class_means(path: str, means: torch.Tensor, metadata: Dict[str, str]) -> None:
    """Write class means with their checksum as safetensors; the file appears complete and on disk, or not at all.

    Raises:
        OSError: If it cannot be written.
    """
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    partial_path = f'{path}.{os.getpid()}.tmp'
    means = means.cpu().contiguous()
    try:
        with open(partial_path, 'wb') as file:
            file.write(serialize({_NAME: means}, {**printable(metadata), _CHECKSUM: _checksum(means)}))
        flush(partial_path)
        put_in_place(partial_path, path)
    except BaseException:  # an interrupt too
        if os.path.exists(partial_path):
            os.remove(partial_path)
        raise


def _checksum(means: torch.Tensor) -> str:
    return hashlib.sha256(repr((means.dtype, tuple(means.shape))).encode() + means.numpy().tobytes()).hexdigest()


def load_class_means(path: str, shape: Tuple[int, int], flag: str = '--nd-class-means') -> torch.Tensor:
    """Read class means.

    Args:
        path: Safetensors file with a tensor 'class_means'; compared with its checksum, where it has one.
        shape: Classes of the student and width of the teacher's pre-logits, (K, D).
        flag: Where the path comes from, for messages.

    Raises:
        UsageError: If the file is missing, damaged, is no such file or has another shape.
    """
    if not os.path.isfile(path):
        raise UsageError(f'{flag} {path}: there is no such file.')
    try:
        with safe_open(path, framework='pt') as file:
            if _NAME not in file.keys():
                raise UsageError(f"{flag} {path} holds no tensor '{_NAME}'; it holds: {', '.join(file.keys())}.")
            means, checksum = file.get_tensor(_NAME), (file.metadata() or {}).get(_CHECKSUM)
    except (SafetensorError, OSError, UnicodeError) as e:  # also for a path that is no UTF-8
        raise UsageError(f'{flag} {path} is not a safetensors file: {e}.') from e
    if checksum is not None and checksum != _checksum(means):
        raise UsageError(f'{flag} {path} is damaged: its content does not have the checksum that was written with it.')
    if tuple(means.shape) != tuple(shape):
        raise UsageError(
            f"{flag} {path} has class means of shape {list(means.shape)}, this run needs {list(shape)}: "
            "the student's classes x the teacher's pre-logits. Leave the flag out to compute them.")
    if not torch.isfinite(means).all():
        raise UsageError(f'{flag} {path} holds class means that are not finite. Leave the flag out to compute them.')
    return means


def cached_class_means(
        path: str,
        shape: Tuple[int, int],
        compute: Callable[[], torch.Tensor],
        metadata: Dict[str, str],
        device: torch.device,
        distributed: bool = False,
) -> torch.Tensor:
    """Return the class means of a cache file, or compute and write them; the first rank alone touches the file.

    A damaged file is computed again, one that cannot be written costs nothing but the next run's time; both warn.

    Args:
        path: The file.
        shape: (K, D).
        compute: Called on all ranks where there is no file.
        metadata: Written with the means.
        device: Where ranks exchange the means.
        distributed: Several ranks.
    """
    primary = not distributed or dist.get_rank() == 0
    means = _read_cache(path, shape) if primary else None
    found = torch.tensor(int(means is not None), device=device)
    if distributed:
        dist.broadcast(found, 0)
    if not found:
        means = compute()
        if primary:
            _write_cache(path, means, metadata)
        return means
    if primary:
        _logger.info(f'Class means of the teacher are taken from {path}.')
    means = means.to(device) if means is not None else torch.empty(shape, device=device)
    if distributed:
        dist.broadcast(means, 0)
    return means


def _read_cache(path: str, shape: Tuple[int, int]) -> Optional[torch.Tensor]:
    if not os.path.lexists(path):
        return None
    try:
        return load_class_means(path, shape, 'The cache')
    except UsageError as e:
        _logger.warning(f'{e} The class means are computed again.')
        return None


def _write_cache(path: str, means: torch.Tensor, metadata: Dict[str, str]) -> None:
    try:
        save_class_means(path, means, metadata)
    except OSError as e:
        _logger.warning(
            f'The class means of the teacher cannot be kept in {path} ({e}): the next run computes them '
            'again.')
        return
    _logger.info(f'Class means of the teacher are kept in {path}.')
