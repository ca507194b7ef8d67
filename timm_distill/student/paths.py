"""Paths of a batch through a student with adapters: they run at its features, its pre-logits or its classifier's input.

Each is one forward of the student that reads as `Reading` does, with the adapters in between.
"""
from contextlib import nullcontext
from typing import AbstractSet, Callable, ContextManager, Iterable, Optional, Tuple, Type, Union, cast

import torch
import torch.nn as nn

from ..adapters import Match
from ..features.inputs import RawFeature
from ..features.reader import ModelSpec, Reading
from ..features.spec import Features
from ..features.stages import layout_for
from ..features.tracing import mapped_input
from .dropout import DelayedDropout
from .tap import StudentTap, TapSite


class AdaptedReading(Reading):
    """One forward of a student with adapters.

    Args:
        model: The student.
        spec: What is known of it without them.
        images: Its input, [B, C, H, W].
        outputs: What to read.
        tap: Insertion point of the adapters.
        adapters: One for each site of the tap.
        target: The teacher's counterpart that they are matched with, [B, Ct, H, W], or that of each of several
            teachers; None for no match.
    """

    def __init__(
            self,
            model: nn.Module,
            spec: ModelSpec,
            images: torch.Tensor,
            outputs: AbstractSet[str],
            tap: StudentTap,
            adapters: Iterable[nn.Module],
            target: Union[torch.Tensor, Tuple[torch.Tensor, ...], None] = None,
    ):
        super().__init__(model, spec, images, outputs)
        self.tap = tap
        self.adapters = adapters
        self.target = target

    def adapt(self, feature: RawFeature) -> RawFeature:
        """Run the adapters on the feature at the tap and note their losses."""
        adapted = [
            adapter(site.layout.to_positions(tensor), self._match(site))
            for adapter, site, tensor in zip(self.adapters, self.tap.sites, self.tap.read(feature))
        ]
        self.features.matched = tuple(a.loss for a in adapted if a.loss is not None)
        outputs = [site.layout.from_positions(a.output) for site, a in zip(self.tap.sites, adapted)]
        return self.tap.write(feature, outputs)

    def _match(self, site: TapSite) -> Optional[Match]:
        """Return what a site's adapter is matched with, on the grid that the student gives these images."""
        if self.target is None:
            return None
        return Match(self.target, layout_for(self.model, site.layout, self.images, site.index).to_map)

    def delayed_dropout(self) -> ContextManager[Callable[[torch.Tensor], torch.Tensor]]:
        """Skip the dropout behind which the tap is, in training; what the context gives applies it."""
        if self.tap.dropout is None or not self.model.training:
            return nullcontext(lambda x: x)
        return DelayedDropout(self.tap.dropout, self.tap.layout.channels)


class AtFeatures(AdaptedReading):
    """Adapters on what `forward_features` returns."""

    def run_trunk(self) -> RawFeature:
        return self.adapt(super().run_trunk())


class AtPreLogits(AdaptedReading):
    """An adapter between `forward_head(pre_logits=True)` and `get_classifier`."""

    def run_head(self, raw: RawFeature) -> None:
        with self.delayed_dropout() as dropout:
            pre_logits = self.model.forward_head(raw, pre_logits=True)
        pre_logits = dropout(cast(torch.Tensor, self.adapt(pre_logits)))
        self.note_pre_logits(pre_logits)
        self.note_logits(self.model.get_classifier()(pre_logits))


class AtClassifierInput(AdaptedReading):
    """An adapter in front of a classifier that only the model's own forward reaches: a hook for this forward alone."""

    def run(self) -> Features:
        with self.delayed_dropout() as dropout, mapped_input(
                self.model.get_submodule(self.tap.inside),
                lambda x: dropout(cast(torch.Tensor, self.adapt(x)))):
            return super().run()


def path_of(tap: StudentTap) -> Type[AdaptedReading]:
    """Return the path for adapters at an insertion point."""
    if tap.inside:
        return AtClassifierInput
    return AtPreLogits if tap.point == 'pre_logits' else AtFeatures
