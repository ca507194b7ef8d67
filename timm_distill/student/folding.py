"""Fold of an affine map of a feature into the layers of a model that read it.

Knows names of layers and tensors; what folds where is found and measured in `taps.py`.
"""
from dataclasses import dataclass
from typing import Dict, List, Mapping, Optional, Sequence, Tuple, cast

import torch
import torch.nn as nn

from ..utils.affine import AffineMap, batch_norm_affine, compose, fold_into_weight, to_float64
from ..utils.batch_norm import is_batch_norm


@dataclass(frozen=True)
class Consumer:
    """A linear layer that an affine map of the tapped feature folds into.

    Attributes:
        linear: Name of the layer in the model.
        pre_norm: Name of a batch norm between tap and layer: it folds into the layer too and becomes the identity.
        post_norm: Name of a batch norm behind a layer without bias: its running mean takes the offset.
        offset: Whether the layer can take an offset at all: one without bias and norm takes only linear maps.
    """
    linear: str
    pre_norm: Optional[str] = None
    post_norm: Optional[str] = None
    offset: bool = True

    def __str__(self) -> str:
        before = f'{self.pre_norm} + ' if self.pre_norm else ''
        after = f' (offset in {self.post_norm})' if self.post_norm else '' if self.offset else ' (no offset)'
        return f'{before}{self.linear}{after}'


def fold_affine(
        model: nn.Module,
        tensors: Mapping[str, torch.Tensor],
        consumers: Sequence[Consumer],
        affine: AffineMap,
) -> Dict[str, torch.Tensor]:
    """Fold an affine map in front of the consumers into them.

    Args:
        model: Model that the names belong to; only its structure is read.
        tensors: The model's parameters and buffers by name.
        consumers: Layers that read the mapped feature.
        affine: Map of the feature's channels, float64; its bias must be zero for consumers without offset.

    Returns:
        The changed tensors by each of their names, in float64; every other tensor stays as it is.
    """
    changed: Dict[str, torch.Tensor] = {}
    for consumer in consumers:
        inner = affine
        if consumer.pre_norm:
            inner = compose(_norm_as_map(model, tensors, consumer.pre_norm), affine)
            changed.update(_identity_norm(model, tensors, consumer.pre_norm))
        weight, offset = fold_into_weight(tensors[f'{consumer.linear}.weight'], inner)
        changed[f'{consumer.linear}.weight'] = weight
        if consumer.post_norm:
            mean = f'{consumer.post_norm}.running_mean'
            changed[mean] = to_float64(tensors[mean]) - offset
        elif consumer.offset:
            changed[f'{consumer.linear}.bias'] = to_float64(tensors[f'{consumer.linear}.bias']) + offset
    shared = shared_names(model)
    return {same: value for name, value in changed.items() for same in (name, *shared.get(name, ()))}


def named_tensors(model: nn.Module) -> Dict[str, torch.Tensor]:
    """Return the parameters and buffers of a model by each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def shared_names(model: nn.Module) -> Dict[str, Tuple[str, ...]]:
    """Return the other names of every tensor that has several: of tied weights and of shared modules."""
    groups: Dict[Tuple, List[str]] = {}
    for name, tensor in named_tensors(model).items():
        place = tensor.data_ptr() or id(tensor)  # on the meta device there is no place
        groups.setdefault((place, tensor.shape, tensor.stride()), []).append(name)
    return {name: tuple(n for n in names if n != name) for names in groups.values() if len(names) > 1 for name in names}


def _norm_as_map(model: nn.Module, tensors: Mapping[str, torch.Tensor], name: str) -> AffineMap:
    scale, shift = batch_norm_affine(
        tensors[f'{name}.running_mean'],
        tensors[f'{name}.running_var'],
        tensors.get(f'{name}.weight'),
        tensors.get(f'{name}.bias'),
        _eps(model, name),
    )
    return AffineMap(torch.diag(scale), shift)


def _identity_norm(model: nn.Module, tensors: Mapping[str, torch.Tensor], name: str) -> Dict[str, torch.Tensor]:
    values = {'running_mean': 0., 'running_var': 1. - _eps(model, name), 'weight': 1., 'bias': 0.}
    return {
        f'{name}.{key}': torch.full_like(to_float64(tensors[f'{name}.{key}']), value)
        for key, value in values.items() if f'{name}.{key}' in tensors
    }


def _eps(model: nn.Module, name: str) -> float:
    norm = model.get_submodule(name)
    assert is_batch_norm(norm)
    return cast(float, norm.eps)
