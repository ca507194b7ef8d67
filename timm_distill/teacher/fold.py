"""Batch norms of a frozen model folded into the layers before them, as far as that is measured to change nothing."""
import copy
import logging
from dataclasses import dataclass
from typing import Any, Callable, Dict, Sequence, Tuple

import torch
import torch.nn as nn
from timm.utils.model import reparameterize_model

from ..features.classifier import classifier_parameters
from ..features.inputs import CANNOT_RUN, evaluation_mode, private_generator, random_images
from ..features.tracing import output_error
from ..utils.batch_norm import is_batch_norm
from .fold_pairs import FOLD_TOLERANCE, Pair, Read, find_pairs, fold_pair

_logger = logging.getLogger(__name__)
_PROBE_SIZES = (64, 128)  # what folds does not depend on the size, what measuring costs does
_REPARAMETERIZERS = ('fuse', 'reparameterize', 'switch_to_deploy')  # what timm's modules with branches have


@dataclass(frozen=True)
class FoldReport:
    """Report of what was folded.

    Attributes:
        norms: Batch norms of the model as it came.
        folded: How many of them are gone.
        error: Largest difference that this makes to an output, relative to its spread, in float64.
    """
    norms: int
    folded: int
    error: float = 0.

    def __str__(self) -> str:
        return f'{self.folded} of {self.norms} batch norms folded, measured error {self.error:.1e}'


def fold_batch_norms(model: nn.Module, input_size: Sequence[int], read: Read) -> FoldReport:
    """Fold the batch norms of a model into the layers before them, in place.

    Parallel branches that timm knows how to merge (`reparameterize_model`) are merged first. Everything is computed in
    float64 and rounded once.

    Args:
        model: Model for inference alone.
        input_size: Input that it runs on, (channels, height, width).
        read: Returns everything that is read of the model, to be compared.

    Returns:
        What was folded. A model that cannot be measured is left as it is.
    """
    norms, error = _count_norms(model), 0.
    if not norms:
        return FoldReport(0, 0)
    with evaluation_mode(model):
        try:
            error = _fold(model, input_size, read)
        except CANNOT_RUN as e:
            _logger.warning(
                f'The batch norms of {type(model).__name__} are not folded, which costs time alone: '
                f'{type(e).__name__}: {e}')
    return FoldReport(norms, norms - _count_norms(model), error)


def _fold(model: nn.Module, input_size: Sequence[int], read: Read) -> float:
    """Fold what passes; return the largest difference measured."""
    reference = _create_reference(model)
    images = _probe_images(reference, input_size, read)
    settle_batch_norms(reference, images)
    expected = read(reference, images)

    def _error(folded: nn.Module) -> float:
        return output_error(read(folded, images), expected)

    merged = _try_merged_branches(model, reference, _error)
    errors: Dict[Tuple[Pair, ...], float] = {}

    def _exact(some: Sequence[Pair]) -> bool:
        errors[tuple(some)] = _error(_with_pairs(merged, some))
        return errors[tuple(some)] <= FOLD_TOLERANCE

    pairs = _exact_subset(find_pairs(merged, images, read), _exact)
    if not pairs:
        _exact(pairs)  # what merging branches alone makes
    if merged is not reference:
        _merge_branches(model)
    _apply(model, pairs)
    return errors[tuple(pairs)]


def _apply(model: nn.Module, pairs: Sequence[Pair]) -> None:
    """Fold pairs of a model, in place, under every name that a norm has."""
    left = {}
    for pair in pairs:
        norm = model.get_submodule(pair.norm)
        left[norm] = fold_pair(model.get_submodule(pair.layer), norm)
    for name, child in list(model.named_modules(remove_duplicate=False)):
        if child in left:
            parent, _, attribute = name.rpartition('.')
            setattr(model.get_submodule(parent), attribute, left[child])


def _exact_subset(pairs: Sequence[Pair], exact: Callable[[Sequence[Pair]], bool]) -> Sequence[Pair]:
    """Return the pairs without those that change an output, found by halving."""
    if not pairs or exact(pairs):
        return pairs
    if len(pairs) == 1:
        return ()
    half = len(pairs) // 2
    first, second = (_exact_subset(part, exact) for part in (pairs[:half], pairs[half:]))
    both = [*first, *second]
    return both if exact(both) else first


# The float64 copy that is measured

def _create_reference(model: nn.Module) -> nn.Module:
    """Return a float64 copy in which no parameter is trivial, as zeros and ones of a new model would hide errors."""
    reference = copy.deepcopy(model)
    reference = reference.to(_float64_device(reference), torch.float64)
    generator = private_generator()
    norms = [module for module in reference.modules() if is_batch_norm(module)]
    tensors = [*reference.parameters(), *(getattr(norm, name, None) for norm in norms for name in ('weight', 'bias'))]
    for tensor in tensors:
        if tensor is not None and tensor.is_floating_point() and tensor.numel() and tensor.min() == tensor.max():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)
    return reference


def _float64_device(model: nn.Module) -> torch.device:
    device = next(model.parameters()).device
    return torch.device('cpu') if device.type == 'mps' else device


def _probe_images(reference: nn.Module, input_size: Sequence[int], read: Read) -> torch.Tensor:
    """Return random images of the smallest size tried that the model runs on."""
    for size in _PROBE_SIZES:
        if size < min(input_size[1:]):
            images = random_images(reference, (input_size[0], size, size))
            try:
                read(reference, images)
                return images
            except CANNOT_RUN:
                continue
    return random_images(reference, input_size)


def settle_batch_norms(model: nn.Module, images: torch.Tensor) -> None:
    """Give the batch norms random statistics of a batch's scale: activations stay finite and no norm is trivial."""
    generator = private_generator()

    def _settle(norm: Any, args: Tuple[Any, ...]) -> None:
        x = args[0]
        if x.ndim < 2 or x.shape[1] != norm.running_mean.numel():
            return
        square = x.square().mean([d for d in range(x.ndim) if d != 1])
        square = square + 0.01 * square.mean() + 1e-6
        noise = torch.randn(2, *square.shape, generator=generator, dtype=torch.float64).to(square)
        # not the mean itself: features of a few noise images are alike, and what is left of them would be rounding
        norm.running_mean.copy_(0.3 * noise[0] * square.sqrt())
        norm.running_var.copy_(square * (0.5 + noise[1].abs()))

    handles = [m.register_forward_pre_hook(_settle) for m in model.modules() if is_batch_norm(m)]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()


def _with_pairs(model: nn.Module, pairs: Sequence[Pair]) -> nn.Module:
    """Return a copy with pairs folded, which shares all other tensors with `model`."""
    folded = copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
    _apply(folded, pairs)
    return folded


def _count_norms(model: nn.Module) -> int:
    return sum(is_batch_norm(module) for module in model.modules())


# Branches

def _try_merged_branches(model: nn.Module, reference: nn.Module, error: Callable[[nn.Module], float]) -> nn.Module:
    """Return a copy of the reference whose parallel branches are merged; the reference where that does not work.

    Args:
        model: The model itself, whose tensors must have one dtype to be brought back to.
        reference: Its float64 copy.
        error: Measures a copy.
    """
    dtypes = {t.dtype for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()}
    if len(dtypes) > 1 or not any(hasattr(m, name) for m in model.modules() for name in _REPARAMETERIZERS):
        return reference
    try:
        merged = _merge_branches(copy.deepcopy(reference))
        return merged if error(merged) <= FOLD_TOLERANCE else reference
    except CANNOT_RUN as e:
        _logger.debug(f'Branches of {type(model).__name__} are not merged: {e}')
        return reference


def _merge_branches(model: nn.Module) -> nn.Module:
    """Let timm's modules merge their branches, in place; they build new layers in the default dtype and device.

    The classifier is left out: some models would not find it again.
    """
    parameter, default = next(model.parameters()), torch.get_default_dtype()
    device, dtype = _float64_device(model), parameter.dtype
    classifier = {id(p) for p in classifier_parameters(model)}
    heads = {name: child for name, child in model.named_children() if classifier & {id(p) for p in child.parameters()}}
    for name in heads:
        setattr(model, name, nn.Identity())
    with torch.random.fork_rng([device] if device.type == 'cuda' else []), device:
        torch.set_default_dtype(torch.float64)
        try:
            reparameterize_model(model.to(device, torch.float64), inplace=True)
        finally:
            torch.set_default_dtype(default)
    for name, head in heads.items():
        setattr(model, name, head)
    return model.to(parameter.device, dtype)
