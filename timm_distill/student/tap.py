"""Insertion points of an adapter in a student."""
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import torch

from ..features.inputs import RawFeature
from ..features.layouts import FeatureLayout
from .folding import Consumer

TAP_POINTS = ('features', 'pre_logits', 'side')


@dataclass(frozen=True)
class TapSite:
    """One tensor that an adapter sits on.

    Attributes:
        index: Position in what `forward_features` returns, None where that is one tensor.
        layout: Layout of the tensor.
        shape: Its shape for one image.
        consumers: Layers that the adapter folds into; none for a side tap.
        error: Largest logit difference measured, relative to the logits' spread.
    """
    index: Optional[int]
    layout: FeatureLayout
    shape: Tuple[int, ...]
    consumers: Tuple[Consumer, ...] = ()
    error: float = 0.

    @property
    def offset(self) -> bool:
        """Whether the adapter may have an offset."""
        return all(consumer.offset for consumer in self.consumers)

    def __str__(self) -> str:
        consumers = ', '.join(str(c) for c in self.consumers)
        where = '' if self.index is None else f'[{self.index}] '
        folds = f', folds into {consumers}, measured error {self.error:.1e}' if consumers else ', for the loss alone'
        return f'{where}{list(self.shape)} {self.layout.fmt}{folds}'


@dataclass(frozen=True)
class StudentTap:
    """A measured insertion point.

    Attributes:
        point: 'features' (output of `forward_features`), 'pre_logits' (input of the classifier) or 'side' (read the
            former for the loss alone).
        sites: The tensors at this point that get an adapter each: one, but for heads that read several features.
        rejected: Why the points tried before do not fit.
        inside: Name of the classifier where only the model's own forward reaches its input, '' otherwise.
        dropout: Which dropout call gives the feature at this point, counted in what runs up to it; the adapter goes
            before it. None where none does.
    """
    point: str
    sites: Tuple[TapSite, ...]
    rejected: str = ''
    inside: str = ''
    dropout: Optional[int] = None

    @property
    def layout(self) -> FeatureLayout:
        return self.sites[0].layout

    @property
    def shape(self) -> Tuple[int, ...]:
        return self.sites[0].shape

    @property
    def consumers(self) -> Tuple[Consumer, ...]:
        return tuple(consumer for site in self.sites for consumer in site.consumers)

    @property
    def error(self) -> float:
        return max(site.error for site in self.sites)

    def read(self, feature: RawFeature) -> List[torch.Tensor]:
        """Return the tensors of the sites."""
        return [feature if site.index is None else feature[site.index] for site in self.sites]  # type: ignore[misc]

    def write(self, feature: RawFeature, tensors: Sequence[torch.Tensor]) -> RawFeature:
        """Return the feature with the sites' tensors replaced."""
        if isinstance(feature, torch.Tensor):
            return tensors[0]
        parts = list(feature)
        for site, tensor in zip(self.sites, tensors):
            parts[site.index] = tensor  # type: ignore[index]
        return type(feature)(parts)

    def __str__(self) -> str:
        rejected = f' ({self.rejected})' if self.rejected else ''
        return f'{self.point} {"; ".join(str(site) for site in self.sites)}{rejected}'
