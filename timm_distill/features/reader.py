"""Reader of a student's features in the one forward that trains it.

A reader holds names and layouts, never modules, so that it serves every copy of its model (EMA, merged, compiled).
"""
from functools import partial
from typing import AbstractSet, Any, List, Optional, Sequence, Tuple, cast

import torch
import torch.nn as nn

from ..errors import UsageError
from .classifier import last_linear
from .head import HeadInput, find_head_input, head_keeps_statistics
from .inputs import RawFeature, evaluation_mode, random_images
from .layouts import FeatureLayout
from .spec import STUDENT_OUTPUTS, Features, FeatureSpec, Stage
from .stages import (
    classes_of,
    drops_positions,
    forward_with_stages,
    has_head,
    last_stage_feature,
    layout_for,
    resolve_feature_layout,
    resolve_stages,
    stages_share_trunk,
)


class FeatureReader:
    """Runs a student in parts and reads what the methods ask for.

    Args:
        model: timm model. Not changed, apart from a hook on its classifier that is idle outside of `run_head`.
        input_size: Input as (channels, height, width); not needed for logits alone.
        outputs: Which of `STUDENT_OUTPUTS` to read.
        whole: Do not split the model into trunk and head; then only logits and pre-logits can be read.

    Raises:
        UsageError: If the model does not give one of the outputs.
    """

    def __init__(
            self,
            model: nn.Module,
            input_size: Sequence[int] = (),
            outputs: AbstractSet[str] = frozenset({'logits'}),
            whole: bool = False,
    ):
        self.outputs = frozenset(outputs)
        self.split = has_head(model) and not whole
        self.layout: Optional[FeatureLayout] = None
        self.stages: Tuple[Stage, ...] = ()
        self.classifiers: Tuple[str, ...] = ()
        self.head_input: Optional[HeadInput] = None
        self.spec: Optional[FeatureSpec] = None
        if 'token_logits' in outputs:
            _enable_token_head(model)
        if self.outputs - {'logits', 'token_logits'}:
            with evaluation_mode(model):
                self._read_structure(model, random_images(model, input_size), input_size)

    @property
    def reads_logits_alone(self) -> bool:
        """Whether a call of the whole model gives all that is read."""
        return self.outputs == {'logits'}

    def _read_structure(self, model: nn.Module, images: torch.Tensor, input_size: Sequence[int]) -> None:
        self.classifiers = _classifier_names(model, images)
        for name in self.classifiers:
            model.get_submodule(name).register_forward_pre_hook(_capture_input)
        if self.split:
            self.layout = resolve_feature_layout(model, input_size)
            self._check_positions(model, images)
            stages = resolve_stages(model, input_size)
            if stages and stages_share_trunk(model, images, stages):
                self.stages = stages
            if 'head' in self.outputs:
                self.head_input = self._find_head(model, images, self.layout)
        self.spec = self._measure(model, images)

    def _find_head(self, model: nn.Module, images: torch.Tensor, layout: FeatureLayout) -> Optional[HeadInput]:
        """Return the head's input, None for a head that takes no map or that keeps statistics of what it is run on."""
        raw = model.forward_features(images)
        if head_keeps_statistics(model, raw):
            return None
        return find_head_input(model, raw, layout, pre_logits=images, reads_pre_logits=False)

    def _check_positions(self, model: nn.Module, images: torch.Tensor) -> None:
        if self.outputs & {'feature', 'stages'} and drops_positions(model, images):
            raise UsageError(
                f'The student {type(model).__name__} drops positions in training, so that no feature map '
                'of it can be compared with the teacher\'s. Leave patch_drop_rate at 0 in --model-kwargs, or choose '
                '--kd methods that read no feature maps (--list-kd).')

    def _measure(self, model: nn.Module, images: torch.Tensor) -> FeatureSpec:
        """Run the model once and note the shapes of all features."""
        wanted, self.outputs = self.outputs, STUDENT_OUTPUTS - {'token_logits'}
        features, raw = self.run_trunk(model, images)
        self.read_feature(features, raw, model, images)
        self.run_head(model, raw, features)
        self.outputs = wanted
        assert features.logits is not None and features.feature is not None and features.pre_logits is not None
        shape = cast(Tuple[int, int, int], tuple(features.feature.shape[1:]))
        return FeatureSpec(
            num_classes=classes_of(features.logits, features.pre_logits),
            feature=shape,
            pre_logits=features.pre_logits.shape[1],
            stages=self.stages or (Stage(-1, shape),),
            input_size=cast(Tuple[int, int, int], tuple(images.shape[1:])),
            head='' if self.head_input is None else self.head_input.output,
            head_averages=self.head_input is not None and self.head_input.averages,
        )

    def run_trunk(self, model: nn.Module, images: torch.Tensor) -> Tuple[Features, RawFeature]:
        """Run all before the head; return features with the stages asked for, and what `forward_features` returns.

        A model that is not split is left to `run_head`: its images are returned.
        """
        features = Features()
        if not self.split:
            return features, images
        if 'stages' in self.outputs and self.stages:
            raw, features.stages = forward_with_stages(model, images, self.stages)
            return features, raw
        return features, model.forward_features(images)

    def read_feature(self, features: Features, raw: RawFeature, model: nn.Module, images: torch.Tensor) -> None:
        """Note the last-stage feature of these images as a map; it is the one stage of a model that gives no other.

        Raises:
            UsageError: If the feature's tokens are not those of the images' grid.
        """
        if self.layout is None or not self.outputs & {'feature', 'stages'}:
            return
        layout = layout_for(model, self.layout, images)
        features.feature = layout.to_map(layout.to_positions(last_stage_feature(raw, model)))
        features.stages = features.stages or (features.feature,)
        if self.head_input is not None:
            features.head = partial(self.head_input.run, model)

    def run_head(self, model: nn.Module, raw: RawFeature, features: Features) -> None:
        """Run the head, or the model that is not split, and note logits and pre-logits.

        Pre-logits of several classifiers (class and distillation token) are averaged, as timm does.
        """
        if not self.classifiers:
            self.note_logits(features, self._head(model, raw))
            return
        classifiers = [model.get_submodule(name) for name in self.classifiers]
        captured: List[List[torch.Tensor]] = [[] for _ in classifiers]
        try:
            for classifier, inputs in zip(classifiers, captured):
                classifier.__dict__['_captured_inputs'] = inputs
            self.note_logits(features, self._head(model, raw))
        finally:
            for classifier in classifiers:
                del classifier.__dict__['_captured_inputs']  # nothing of a batch stays behind: the module is copied
        inputs = [each[-1] for each in captured]
        self.note_pre_logits(features, inputs[0] if len(inputs) == 1 else torch.stack(inputs).mean(0))

    def _head(self, model: nn.Module, raw: RawFeature) -> Any:
        return model.forward_head(raw) if self.split else model(raw)

    def note_logits(self, features: Features, output: Any) -> None:
        """Note what a classifier returned: logits, or those of the class token and of the distillation token."""
        tokens = output if isinstance(output, (tuple, list)) else (output,)
        features.logits = tokens[0]
        if 'token_logits' in self.outputs:
            features.token_logits = tokens[-1]

    def note_pre_logits(self, features: Features, pre_logits: torch.Tensor) -> None:
        """Note the classifier's input as a vector; a model that is not split has no other feature."""
        features.pre_logits = pre_logits.mean(1) if pre_logits.ndim == 3 else pre_logits.flatten(1)
        if self.layout is None:
            features.feature = features.pre_logits[:, :, None, None]
            features.stages = (features.feature,)


def _capture_input(module: nn.Module, args: Tuple[torch.Tensor, ...]) -> None:
    captured = module.__dict__.get('_captured_inputs')
    if captured is not None:
        captured.append(args[0])


def _classifier_names(model: nn.Module, images: torch.Tensor) -> Tuple[str, ...]:
    """Return the names of the modules that give the logits: several only where these read features of one width.

    Raises:
        UsageError: If there is none.
    """
    classifier = model.get_classifier() if hasattr(model, 'get_classifier') else None
    heads = list(classifier) if isinstance(classifier, (tuple, list)) else [classifier]
    if not all(isinstance(head, nn.Module) and not isinstance(head, nn.ModuleList) for head in heads):
        heads = [last_linear(model, images)]
    if len({getattr(head, 'in_features', None) for head in heads}) > 1:
        heads = heads[:1]
    names = tuple(name for name, module in model.named_modules() if any(module is head for head in heads))
    if names:
        return names
    raise UsageError(
        f'The student {type(model).__name__} has no classifier whose input could be read: choose another '
        '--student, or a --kd method that reads logits alone (--list-kd).')


def _enable_token_head(model: nn.Module) -> None:
    if not hasattr(model, 'set_distilled_training'):
        raise UsageError(
            f'The student {type(model).__name__} has no distillation token. Token distillation takes a student such as '
            'deit_tiny_distilled_patch16_224; for others use --kd kd (--kd-kwargs kd.hard=True for hard labels).')
    model.set_distilled_training(True)
