"""A teacher known by what its cache says of it: shapes, preprocessing and digest, without a model."""
from dataclasses import asdict
from typing import AbstractSet, Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn

from ..errors import UsageError
from ..features.spec import Features, FeatureSpec, Stage
from .class_map import ClassMap
from .label_set import LabelSet
from .preprocessing import Preprocessing
from .standardize import Standardizer
from .teacher import Teacher


class StoredTeacher(nn.Module):
    """Facts of a teacher that a task asks for beside its outputs.

    Args:
        facts: Of `describe_teacher`.

    Attributes:
        feature_spec: Shapes of its features.
        num_classes: As of `Teacher`, like all that follow.
        preprocessing: What was done to its images.
        input_size: What it was fed.
        digest: SHA-256 of its weights.
    """
    is_sharded = False
    classifier_weight: Optional[torch.Tensor] = None
    trained_size: Optional[Tuple[int, int]] = None
    labels: Optional[LabelSet] = None

    def __init__(self, facts: Dict[str, Any]):
        super().__init__()
        values = facts['preprocessing']
        self.preprocessing = Preprocessing(
            mean=tuple(values['mean']), std=tuple(values['std']), input_size=_triple(values['input_size']),
            interpolation=values['interpolation'])
        spec = facts['spec']
        self.feature_spec = FeatureSpec(
            num_classes=spec['num_classes'], feature=_triple(spec['feature']), pre_logits=spec['pre_logits'],
            stages=tuple(Stage(s['index'], _triple(s['shape']), s['nonnegative']) for s in spec['stages']),
            input_size=_triple(spec['input_size']), head=spec['head'], head_averages=spec['head_averages'],
            non_negative=frozenset(spec['non_negative']))
        self.input_size = self.preprocessing.input_size
        self.num_classes = self.feature_spec.num_classes
        self.digest = str(facts['digest'])
        self.standardizer = Standardizer()
        self._classes: Optional[Dict[str, Any]] = facts.get('classes')
        self._tap_channels = {str(point): int(width) for point, width in facts['tap_channels'].items()}

    @property
    def class_map(self) -> Optional[ClassMap]:
        """The map that its logits went through."""
        if self._classes is None:
            return None
        return ClassMap(self._classes['sources'], self._classes['num_teacher_classes'], self._classes['names'])

    @property
    def class_sources(self) -> Optional[List[List[int]]]:
        return None if self.class_map is None else self.class_map.plain_sources()

    def tap_channels(self, point: str) -> int:
        """Return the channels of the counterpart of a student's tap point."""
        return self._tap_channels[point]

    def forward(self, images: torch.Tensor, outputs: AbstractSet[str] = frozenset()) -> Features:
        raise UsageError('The teacher is there as its cache alone (--teacher-cache): give --teacher to run it.')

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""


def describe_teacher(teacher: Teacher) -> Dict[str, Any]:
    """Return what `StoredTeacher` needs to know, as plain values for JSON."""
    spec, class_map = teacher.feature_spec, teacher.class_map
    return {
        'classes': None if class_map is None else {
            'sources': [list(classes) for classes in class_map.sources], 'names': list(map(str, class_map.names)),
            'num_teacher_classes': class_map.num_teacher_classes},
        'digest': teacher.digest,
        'preprocessing': teacher.preprocessing.values(),
        'tap_channels': {point: teacher.tap_channels(point) for point in ('features', 'pre_logits', 'side')},
        'spec': {**asdict(spec), 'non_negative': sorted(spec.non_negative)},
    }


def _triple(values: Any) -> Tuple[int, int, int]:
    first, second, third = (int(value) for value in values)
    return first, second, third
