"""Inspection of a timm model: what can be read of it, measured on the input that it really gets."""
from dataclasses import replace
from typing import Optional, Sequence, Tuple, cast

import torch
import torch.nn as nn

from ..errors import UsageError
from .classifier import classifier_heads, classifier_reads_pre_logits, is_headless, last_linear
from .head import HeadInput, find_head_input, head_keeps_statistics
from .inputs import RawFeature, evaluation_mode, logits_of, random_images
from .reader import ModelSpec, read
from .spec import FeatureSpec, Stage
from .stages import (
    classes_of,
    has_head,
    last_stage_feature,
    resolve_feature_layout,
    resolve_stages,
    stages_share_trunk,
)


def inspect(
        model: nn.Module,
        input_size: Sequence[int],
        trains: bool = False,
        whole: bool = False,
        with_head: bool = True,
) -> ModelSpec:
    """Measure what a model gives on the input that it really gets.

    A model that trains runs once: its pre-logits are what its classifier is given, and it has stages where the run that
    gives them ends with its feature. The pre-logits of a frozen one are those of its `forward_head`.

    Args:
        model: timm model, or any other that has a linear classifier. Not changed.
        input_size: What it is fed, (channels, height, width).
        trains: Whether it trains with what is read.
        whole: Do not split it into trunk and head.
        with_head: Find what its head can be run on: no head that keeps statistics of that while it trains.

    Raises:
        UsageError: If nothing can be read of it.
    """
    with evaluation_mode(model):
        images = random_images(model, input_size)
        if has_head(model) and not whole:
            spec = _inspect_parts(model, images, trains, with_head)
        else:
            headless = trains and is_headless(model)
            names = () if headless else _classifier_names(model, images, trains)
            spec = ModelSpec(False, classifiers=names, headless=headless)
            spec = replace(spec, head=None if trains else _find_whole_head(model, spec, images))
        return replace(spec, features=_measure(model, spec, images))


def _inspect_parts(model: nn.Module, images: torch.Tensor, trains: bool, with_head: bool) -> ModelSpec:
    headless = trains and is_headless(model)
    classifiers = _classifier_names(model, images, trains) if trains and not headless else ()
    layout = resolve_feature_layout(model, images.shape[1:])
    raw = model.forward_features(images)
    pre_logits = images if trains else _run_head(model, raw)
    reuses_pre_logits = not trains and classifier_reads_pre_logits(model, raw)
    with_head = with_head and not (trains and head_keeps_statistics(model, raw))
    stages = resolve_stages(model, images.shape[1:])
    shares_trunk = bool(stages) and stages_share_trunk(model, images, stages)
    return ModelSpec(
        True,
        layout=layout,
        stages=() if trains and not shares_trunk else stages,
        shares_trunk=shares_trunk,
        classifiers=classifiers,
        reuses_pre_logits=reuses_pre_logits,
        head=find_head_input(model, raw, layout, pre_logits, reuses_pre_logits) if with_head else None,
        no_map=layout.explain(layout.to_positions(last_stage_feature(raw, model))),
        headless=headless,
    )


def _measure(model: nn.Module, spec: ModelSpec, images: torch.Tensor) -> FeatureSpec:
    """Run the model once and note the shapes of all that it gives."""
    features = read(model, spec, images, spec.outputs)
    logits, pre_logits, feature = features.logits, features.pre_logits, features.feature
    assert logits is not None and pre_logits is not None
    shape = () if feature is None else tuple(feature.shape[1:])
    return FeatureSpec(
        num_classes=classes_of(logits, pre_logits),
        feature=cast(Tuple[int, int, int], shape),
        pre_logits=pre_logits.shape[1],
        stages=spec.stages or (Stage(-1, cast(Tuple[int, int, int], shape)),),
        input_size=cast(Tuple[int, int, int], tuple(images.shape[1:])),
        head='' if spec.head is None else spec.head.output,
        head_averages=spec.head is not None and spec.head.averages,
        non_negative=frozenset(
            name for name, x in (('feature', feature), ('pre_logits', pre_logits))
            if x is not None and not (x < 0).any()),
    )


def _classifier_names(model: nn.Module, images: torch.Tensor, trains: bool) -> Tuple[str, ...]:
    """Return the names of the modules that give the logits: several only where these read features of one width.

    Raises:
        UsageError: If there is none.
    """
    heads = classifier_heads(model)
    if not all(isinstance(head, nn.Module) and not isinstance(head, nn.ModuleList) for head in heads):
        heads = [last_linear(model, images)]
    if len({getattr(head, 'in_features', None) for head in heads}) > 1:
        heads = heads[:1]
    names = tuple(name for name, module in model.named_modules() if any(module is head for head in heads))
    if names:
        return names
    if trains:
        raise UsageError(
            f'The student {type(model).__name__} has no classifier whose input could be read: choose another '
            '--student, or a --kd method that reads logits alone (--list-kd).')
    raise UsageError(
        f'The teacher {type(model).__name__} has no forward_features() and no linear classifier: nothing of it '
        'can be read.')


def _find_whole_head(model: nn.Module, spec: ModelSpec, images: torch.Tensor) -> Optional[HeadInput]:
    """Return the input of the classifier of a model that is not split, where that gives the logits."""
    features = read(model, spec, images, spec.outputs)
    assert features.pre_logits is not None and features.logits is not None
    name = spec.classifiers[0]
    if not torch.equal(logits_of(model.get_submodule(name)(features.pre_logits)), features.logits):
        return None
    return HeadInput('pre_logits', shape=tuple(features.pre_logits.shape[1:]), classifier=name)


def _run_head(model: nn.Module, raw: RawFeature) -> torch.Tensor:
    """Return the pre-logits that a head gives.

    Raises:
        UsageError: For an encoder without a head.
    """
    try:
        return model.forward_head(raw, pre_logits=True)
    except (NotImplementedError, TypeError) as e:  # timm's encoders have the method and refuse, each in its way
        raise UsageError(
            f'The teacher {type(model).__name__} is an encoder without a classifier: it gives '
            'neither logits nor pre-logits. Choose a model that classifies as --teacher.') from e
