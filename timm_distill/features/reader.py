"""Reader of a timm model: the one forward that gives what is asked for.

What is known of a model are names and layouts, never modules, so that it serves every copy (EMA, merged, compiled).
"""
from dataclasses import dataclass
from functools import partial
from typing import AbstractSet, Any, FrozenSet, Optional, Tuple

import torch
import torch.nn as nn

from ..errors import UsageError
from .head import HeadInput
from .inputs import RawFeature, logits_of
from .layouts import FeatureLayout
from .spec import Features, FeatureSpec, Stage, first_blocks
from .stages import last_stage_feature, layout_for, read_intermediates
from .tail import Tail
from .tracing import inputs_of

LOGITS = frozenset({'logits'})
MAPS = frozenset({'feature', 'stages', 'blocks'})


@dataclass(frozen=True)
class ModelSpec:
    """Specification of what a model gives and how it is read.

    Attributes:
        split: Whether it runs as `forward_features` and `forward_head`; else whole, and its one feature are its
            pre-logits.
        features: Shapes of what it gives; None where nothing but its logits is read.
        layout: Layout of the last-stage feature of a model that is split.
        stages: Intermediate features that can be read, shallow to deep; () where the last-stage feature is the one.
        shares_trunk: Whether the run that gives the stages ends with what `forward_features` returns.
        classifiers: Modules whose input the pre-logits are; () where `forward_head` gives these.
        reuses_pre_logits: Whether `get_classifier` maps the pre-logits to the logits.
        head: What the head can be run on by itself, None where it cannot or need not.
        no_map: Why the last-stage feature is no map, '' where it is one.
        tail: What follows the last stage but one, where that was asked for and found.
        headless: Whether it has no classifier and trains: what it gives are pre-logits and logits alike.
    """
    split: bool
    features: Optional[FeatureSpec] = None
    layout: Optional[FeatureLayout] = None
    stages: Tuple[Stage, ...] = ()
    shares_trunk: bool = False
    classifiers: Tuple[str, ...] = ()
    reuses_pre_logits: bool = False
    head: Optional[HeadInput] = None
    no_map: str = ''
    tail: Optional[Tail] = None
    headless: bool = False

    @property
    def outputs(self) -> FrozenSet[str]:
        """What can be read: no map of a model that does not tell on which grid its tokens lie."""
        maps = MAPS if not self.no_map else MAPS - {'feature'} if self.stages else frozenset[str]()
        return LOGITS | {'pre_logits'} | maps

    def check(self, outputs: AbstractSet[str]) -> None:
        """Raise a UsageError if maps are to be read of a model whose feature is none."""
        if self.no_map and outputs & MAPS:
            raise UsageError(self.no_map)


class Reading:
    """One forward of a model, in its parts: the trunk, the last-stage feature, the head.

    Args:
        model: The model that was inspected, or a copy of it.
        spec: What is known of it.
        images: Its input, [B, C, H, W].
        outputs: What to read: 'logits', 'feature', 'pre_logits', 'stages', 'blocks', 'token_logits', 'head', and
            'tail', the class and register tokens that stand before the tail's stage.

    Attributes:
        features: What was read so far.
    """

    def __init__(self, model: nn.Module, spec: ModelSpec, images: torch.Tensor, outputs: AbstractSet[str] = LOGITS):
        self.model = model
        self.spec = spec
        self.images = images
        self.outputs = outputs
        self.features = Features()

    def run(self) -> Features:
        """Run all parts and return what was asked for.

        Raises:
            UsageError: If a map is asked for and the feature's tokens are not those of the images' grid.
        """
        raw = self.run_trunk()
        self.read_feature(raw)
        self.run_head(raw)
        return self.features

    def run_trunk(self) -> RawFeature:
        """Run all before the head, and read the stages; of a model that is not split these are the images."""
        if not self.spec.split:
            return self.images
        prefix_of = self.spec.tail.prefix_of if self.spec.tail is not None and 'tail' in self.outputs else None
        if prefix_of is not None or self.spec.stages and self.outputs & {'stages', 'blocks'}:
            inside = read_intermediates(
                self.model, self.images, self.spec.stages if 'stages' in self.outputs else (),
                first_blocks(self.spec.stages) if 'blocks' in self.outputs else (), prefix_of)
            features = self.features
            features.stages, features.blocks, features.prefix = inside.stages, inside.blocks, inside.prefix
            if self.spec.shares_trunk:
                return inside.raw
        return self.model.forward_features(self.images)

    def read_feature(self, raw: RawFeature) -> None:
        """Read the last-stage feature as a map; it is the one stage of a model that gives no other."""
        if 'head' in self.outputs and self.spec.head is not None:
            self.features.head = partial(self.spec.head.run, self.model)
        stands_for_stages = 'stages' in self.outputs and not self.spec.stages
        if self.spec.layout is None or not ('feature' in self.outputs or stands_for_stages):
            return
        layout = layout_for(self.model, self.spec.layout, self.images)
        self._note_feature(layout.to_map(layout.to_positions(last_stage_feature(raw, self.model))))

    def run_head(self, raw: RawFeature) -> None:
        """Run the head, or the whole of a model that is not split, and read logits and pre-logits.

        Pre-logits of several classifiers (class and distillation token) are averaged, as timm does.
        """
        if self.spec.headless:
            output = self._run_head(raw)
            self.note_logits(output)
            self.note_pre_logits(as_vectors(output))
        elif 'pre_logits' not in self.outputs and (self.spec.split or not self.outputs & MAPS):
            if self.outputs & {'logits', 'token_logits'}:
                self.note_logits(self._run_head(raw))
        elif self.spec.classifiers:
            with inputs_of([self.model.get_submodule(name) for name in self.spec.classifiers]) as inputs:
                self.note_logits(self._run_head(raw))
            last = [each[-1] for each in inputs]
            self.note_pre_logits(last[0] if len(last) == 1 else torch.stack(last).mean(0))
        else:
            pre_logits = self.model.forward_head(raw, pre_logits=True)
            self.note_pre_logits(pre_logits)
            if self.outputs & LOGITS:
                reuse = self.spec.reuses_pre_logits
                self.note_logits(self.model.get_classifier()(pre_logits) if reuse else self._run_head(raw))

    def _run_head(self, raw: RawFeature) -> Any:
        return self.model.forward_head(raw) if self.spec.split else self.model(raw)

    def note_logits(self, output: Any) -> None:
        """Note what a classifier returned: logits, or those of the class token and of the distillation token."""
        self.features.logits = logits_of(output)
        if 'token_logits' in self.outputs:
            self.features.token_logits = output[-1] if isinstance(output, (tuple, list)) else output

    def note_pre_logits(self, pre_logits: torch.Tensor) -> None:
        """Note the classifier's input as a vector; a model that is not split has no other feature."""
        self.features.pre_logits = pre_logits.mean(1) if pre_logits.ndim == 3 else pre_logits.flatten(1)
        if not self.spec.split:
            self._note_feature(self.features.pre_logits[:, :, None, None])

    def _note_feature(self, feature: torch.Tensor) -> None:
        self.features.feature = feature
        if 'stages' in self.outputs and not self.features.stages:
            self.features.stages = (feature,)


def as_vectors(output: Any) -> torch.Tensor:
    """Return what a model without a classifier gives as [B, D]; maps and tokens are averaged, several heads as well."""
    if isinstance(output, (tuple, list)):
        return torch.stack([as_vectors(part) for part in output]).mean(0)
    if output.ndim == 3:
        return output.mean(1)
    return output.mean((2, 3)) if output.ndim == 4 else output.flatten(1)


def read(model: nn.Module, spec: ModelSpec, images: torch.Tensor, outputs: AbstractSet[str] = LOGITS) -> Features:
    """Run a model once, [B, C, H, W] in, and return the outputs asked for."""
    return Reading(model, spec, images, outputs).run()


class ModelReader(nn.Module):
    """A frozen model and the one forward that reads it: `read` as a module, whose parameters can be sharded."""

    def __init__(self, model: nn.Module, spec: ModelSpec):
        super().__init__()
        self.model = model
        self.spec = spec

    def forward(self, images: torch.Tensor, outputs: AbstractSet[str] = LOGITS) -> Features:
        return read(self.model, self.spec, images, outputs)
