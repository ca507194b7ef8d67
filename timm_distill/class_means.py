"""The teacher's mean pre-logits of every class: computed in a pass over the training set, cached, read from a file."""
import hashlib
import json
import logging
import os
from contextlib import nullcontext
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.task import evaluation_sample_limit

from .errors import UsageError
from .progress import progress_bar
from .rng import get_rng_state, set_rng_state
from .storage import respect_umask
from .teacher import Teacher

_logger = logging.getLogger(__name__)

_NAME = 'class_means'  # of the tensor in a file


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
    sums = torch.zeros(num_classes, teacher.pre_logits_channels, dtype=precise, device=device)
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


def class_means_key(teacher: Teacher, dataset: Any, transform: Sequence[Any]) -> str:
    """Return what names the class means of a teacher's weights on a dataset under a transform, as 16 hex digits.

    Args:
        teacher: The teacher.
        dataset: Training dataset.
        transform: All else that images depend on, with stable texts.
    """
    precision = str(next(teacher.parameters()).dtype)
    parts = [teacher.digest, precision, _hash_data(dataset), *(str(part) for part in transform)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _hash_data(dataset: Any) -> str:
    """Return the SHA-256 of names, sizes and labels of a dataset's files; of its description where it has none."""
    reader = getattr(dataset, 'reader', None)
    samples = getattr(reader, 'samples', None)
    if samples is None:
        size = len(dataset) if hasattr(dataset, '__len__') else None
        text = ' '.join(str(getattr(reader, name, '')) for name in ('root', 'name', 'split'))
        return hashlib.sha256(f'{type(reader or dataset).__name__} {text} {size}'.encode()).hexdigest()
    digest = hashlib.sha256()
    for index, sample in enumerate(samples):
        path = sample[0] if isinstance(sample[0], str) and os.path.isfile(sample[0]) else None
        size = os.path.getsize(path) if path else getattr(sample[0], 'size', None)
        digest.update(f'{reader.filename(index)} {sample[1:]} {size}\n'.encode())
    return digest.hexdigest()


def save_class_means(path: str, means: torch.Tensor, metadata: Dict[str, str]) -> None:
    """Write class means as safetensors; the file appears complete or not at all."""
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    partial = f'{path}.{os.getpid()}.tmp'
    save_file({_NAME: means.cpu().contiguous()}, partial, metadata)
    respect_umask(partial)
    os.replace(partial, path)


def load_class_means(path: str, shape: Tuple[int, int], flag: str = '--nd-class-means') -> torch.Tensor:
    """Read class means.

    Args:
        path: Safetensors file with a tensor 'class_means'.
        shape: Classes of the student and width of the teacher's pre-logits, (K, D).
        flag: Where the path comes from, for messages.

    Raises:
        UsageError: If the file is missing, is no such file or has another shape.
    """
    if not os.path.isfile(path):
        raise UsageError(f'{flag} {path}: there is no such file.')
    try:
        with safe_open(path, framework='pt') as file:
            if _NAME not in file.keys():
                raise UsageError(f"{flag} {path} holds no tensor '{_NAME}'; it holds: {', '.join(file.keys())}.")
            means = file.get_tensor(_NAME)
    except SafetensorError as e:
        raise UsageError(f'{flag} {path} is not a safetensors file: {e}.') from e
    if tuple(means.shape) != tuple(shape):
        raise UsageError(f"{flag} {path} has class means of shape {list(means.shape)}, this run needs {list(shape)}: "
                         "the student's classes x the teacher's pre-logits. Leave the flag out to compute them.")
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

    Args:
        path: The file.
        shape: (K, D).
        compute: Called on all ranks where there is no file.
        metadata: Written with the means.
        device: Where ranks exchange the means.
        distributed: Several ranks.
    """
    primary = not distributed or dist.get_rank() == 0
    means = load_class_means(path, shape, 'The cache') if primary and os.path.isfile(path) else None
    found = torch.tensor(int(means is not None), device=device)
    if distributed:
        dist.broadcast(found, 0)
    if not found:
        means = compute()
        if primary:
            save_class_means(path, means, metadata)
            _logger.info(f'Class means of the teacher are kept in {path}.')
        return means
    if primary:
        _logger.info(f'Class means of the teacher are taken from {path}.')
    means = means.to(device) if means is not None else torch.empty(shape, device=device)
    if distributed:
        dist.broadcast(means, 0)
    return means
