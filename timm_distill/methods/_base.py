"""The contract of a method: features of student and teacher in, named unweighted loss terms out.

A method knows no loop, no argparse and no other method. Whatever it trains is a submodule of it and used in `forward`,
so that optimizer, DDP, EMA and checkpoint find it.
"""
from typing import Annotated, Any, Callable, ClassVar, Dict, FrozenSet, Mapping, Optional, Set, Type

import torch
import torch.nn as nn

from ..errors import UsageError
from ..features.spec import TARGETS, Features, PairSpec, Pooling
from ..utils.ranges import Range
from ..utils.registry import LARGEST_NUMBER, Registry
from ._schedules import Steps

METHODS = Registry('method', '--kd', __package__, entry_points='timm_distill.methods')


# Far above 1 distributions are equal up to rounding, which the squared temperature then magnifies; far below they are
# one-hot whatever the logits.
Temperature = Annotated[float, Range(0.01, 1000)]
Weight = Annotated[float, Range(0, LARGEST_NUMBER)]  # 0 leaves a term out
Count = Annotated[int, Range(1, LARGEST_NUMBER, whole=True)]
CountOrNone = Annotated[int, Range(0, LARGEST_NUMBER, whole=True)]
Width = Annotated[int, Range(1, 65536, whole=True)]  # channels of a layer
WidthOrAuto = Annotated[int, Range(0, 65536, whole=True)]  # 0 for those of a model


def check_weights(method: str, **weights: float) -> None:
    """Raise a UsageError where all inner weights of a method's terms are 0."""
    if not any(weights.values()):
        names = ' and '.join(f'{method}.{name}' for name in weights)
        raise UsageError(f'{names} are both 0: {method} has no other term (--kd-kwargs).')


def register_method(name: str) -> Callable[[Type['DistillMethod']], type]:
    """Return a class decorator that registers a method under `name`."""
    def _register(cls: Type['DistillMethod']) -> type:
        cls.name = name
        return METHODS.register(name)(cls)
    return _register


class DistillMethod(nn.Module):
    """Base of all methods. The constructor's keyword arguments are the user's options.

    What an option can be stands in its annotation, `power: Annotated[float, Range(1, 16)] = 2.`, and is checked when a
    method is created by name; the constructor checks only what concerns several options.

    A method that trains something creates it in `build`, when the widths of both models are known. What it keeps of a
    run beside that (a memory bank) is a buffer with `persistent=False`: saved for resume, but neither averaged nor
    copied for the EMA, and not broadcast by DDP. The method itself keeps such a buffer equal on all ranks.

    Attributes:
        name: What it is registered as.
        paper: Authors, venue and link.
        published_weight: Weight of the terms in the published code; the default of `--kd-weight`.
        weight_source: Whose code or text that weight is of, for `--list-kd`.
        student_outputs: What is read of the student: any of 'logits', 'feature' (last stage, adapted), 'pre_logits',
            'stages', 'blocks' (the first two), 'token_logits' (of a distillation token).
        teacher_outputs: What is read of the teacher: any of 'logits', 'feature', 'pre_logits', 'stages', 'blocks',
            'head' (its frozen head as a function), 'tail' (what follows its last stage but one, likewise), and 'tap',
            the counterpart of the adapter's insertion point.
        adapter: Name of the adapter that the method puts on the student's path, if it does.
        shares_adapter: With several teachers one adapter is matched with all of them, and the method is one object that
            runs for each teacher with the adapter's loss against it; nothing is built for a pair then.
        schedules: Published weight schedules by name, for `--kd-schedule`.
        needs_indices: Reads the indices of the batch's samples in the training set.
        reads_labels: Reads what class an image is of: `target`, or the labels of the training set.
        needs_class_means: Reads the teacher's mean pre-logits of every class, given to `set_class_means`.
        needs_classifier: Reads the weight of the teacher's classifier, given to `set_classifier`.
        standardized_targets: Asks for standardised features of the teacher where `--teacher-standardize` says nothing.
        mixed_images: Whether mixup and cutmix make sense.
        reads_softmax: Reads no more of the teacher's logits than their softmax at its `temperature`, or the
            largest, so that a few of them and the mass of the others will do (`--cache-topk`).
    """
    name: ClassVar[str] = ''
    paper: ClassVar[str] = ''
    published_weight: ClassVar[float] = 1.
    weight_source: ClassVar[str] = ''
    student_outputs: ClassVar[FrozenSet[str]] = frozenset({'logits'})
    teacher_outputs: ClassVar[FrozenSet[str]] = frozenset({'logits'})
    adapter: ClassVar[Optional[str]] = None
    shares_adapter: ClassVar[bool] = False
    schedules: ClassVar[Mapping[str, Steps]] = {}
    needs_indices: ClassVar[bool] = False
    reads_labels: bool = False  # an option of the method may change it
    needs_class_means: ClassVar[bool] = False
    needs_classifier: ClassVar[bool] = False
    standardized_targets: ClassVar[bool] = False
    mixed_images: ClassVar[bool] = True
    reads_softmax: ClassVar[bool] = False

    @property
    def adapter_options(self) -> Dict[str, Any]:
        """Options of the adapter."""
        return {}

    def build(self, pair: PairSpec) -> None:
        """Create what the method trains or keeps for a pair of models.

        Raises:
            UsageError: If the method cannot work with the pair; says why and what can.
        """

    def set_classifier(self, weight: Optional[torch.Tensor]) -> None:
        """Take the weight of the teacher's classifier, [K, D]; None where that is not one linear layer.

        Raises:
            UsageError: If the method cannot work without.
        """

    def set_class_means(self, means: torch.Tensor) -> None:
        """Take the teacher's mean pre-logits of every class, [K, D]."""
        raise NotImplementedError

    def check_ready(self) -> None:
        """Raise a UsageError where something that the method needs has not been given; called before an epoch."""

    def weight(self, epoch: int) -> float:
        """Return the factor that the method's own schedule puts on its terms in an epoch, counted from 0."""
        return 1.

    def unscheduled_terms(self) -> FrozenSet[str]:
        """Return the names of the terms that no schedule of its weight acts on."""
        return frozenset()

    def no_weight_decay(self) -> Set[str]:
        """Return the names of its parameters that weight decay must leave alone."""
        return set()

    def transform_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Map the logits of student and teacher, [B, K], before the task loss and every method see them."""
        return logits

    def teacher_pooling(self) -> Optional[Pooling]:
        """Return the pooling with which it begins on the teacher's last map; None where it reads the map itself."""
        return None

    def teacher_stages(self) -> Optional[FrozenSet[int]]:
        """Return the positions of the teacher's stages that it reads, once built; None for all."""
        return None

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Return named unweighted terms.

        Args:
            student: Features of the student, as asked for by `student_outputs`, with gradients.
            teacher: Features of the teacher, as asked for by `teacher_outputs`.
            target: Class indices [B] or soft targets [B, K]; says nothing where there are no labels.

        Returns:
            Scalars by name; every name begins with the method's and ends in '_loss'.
        """
        raise NotImplementedError

    @classmethod
    def needs_equal_classes(cls) -> bool:
        """Whether logits of the student meet those of the teacher; those of its own head fit whatever its classes."""
        return 'logits' in cls.teacher_outputs and 'head' not in cls.teacher_outputs

    @property
    def takes_standardized(self) -> bool:
        """Whether it reads features of the teacher that may be standardised.

        Not those that it brings together with the teacher's own layers or class means, which go with them as they are.
        """
        tied = self.needs_class_means or self.needs_classifier or self.teacher_outputs & {'head', 'tail'}
        return not tied and bool(self.teacher_outputs & {*TARGETS, 'tap'})

    @classmethod
    def reads_teacher_layers(cls) -> bool:
        """Whether it needs layers of the teacher, and not alone what the teacher says of the images."""
        return cls.needs_classifier or bool(cls.teacher_outputs & {'head', 'tail'})

    @classmethod
    def reads_student_classes(cls) -> bool:
        """Whether the student has to have a classifier: its logits are read, or there is a mean for each class."""
        return cls.needs_class_means or bool(cls.student_outputs & {'logits', 'token_logits', 'head'})

    @classmethod
    def describe_needs(cls) -> str:
        """Return one line on what the method reads."""
        needs = [
            f'{model} {", ".join(_describe(x) for x in sorted(outputs))}'
            for model, outputs in (('teacher', cls.teacher_outputs), ('student', cls.student_outputs)) if outputs]
        if cls.adapter:
            needs.append(f"adapter '{cls.adapter}' on the student's path, merged at every save")
        if cls.reads_labels:
            needs.append('labels')
        if cls.needs_class_means:
            needs.append('class means of the teacher, from a pass over the training set')
        if cls.needs_classifier:
            needs.append("the weight of the teacher's classifier, one linear layer")
        if cls.standardized_targets:
            needs.append('standardised targets (--teacher-standardize)')
        if cls.needs_indices:
            needs.append('indices of the training samples')
        if not cls.mixed_images:
            needs.append('no mixup or cutmix')
        if cls.needs_equal_classes():
            needs.append('equal class counts')
        return '; '.join(needs)


def _describe(output: str) -> str:
    names = {
        'tap': 'last-stage feature (pre-logits where the tap is there)', 'feature': 'last-stage feature',
        'tail': 'frozen last stage', 'blocks': 'first blocks'}
    return names.get(output, output.replace('_', '-'))
