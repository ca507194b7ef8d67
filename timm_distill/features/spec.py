"""Features of one forward, and the shapes of a model's features.

Knows nothing of how they are read."""
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, FrozenSet, List, Optional, Sequence, Tuple, Union

import torch


@dataclass
class Features:
    """Features of one forward of a model, for the methods.

    Attributes:
        logits: [B, K].
        feature: Last-stage feature as a map, [B, C, H, W]; a vector as [B, C, 1, 1].
        pre_logits: The classifier's input, [B, D].
        stages: Intermediate features as maps, [B, C, H, W] each, shallow to deep.
        tap: Teacher's counterpart of the student's insertion point, [B, C, H, W] or [B, D, 1, 1].
        matched: Each adapter's loss against the teacher's counterpart (student only), scalars; of an adapter that
            several teachers share one for each, until a method gets those of its teacher.
        token_logits: Logits of the distillation token, [B, K] (students with one only).
        head: The model's own head, from a map [B, C, H, W] to logits, or of a teacher also from a vector [B, D, 1, 1];
            the teacher's is frozen.
        blocks: Features of the first blocks as maps, [B, C, H, W] each (of the first stages where the grid changes).
        prefix: Class and register tokens at the tail's stage, [B, L, C] (teacher only).
        tail: What follows the teacher's last stage but one, from a map [B, C, H, W] to its last feature (teacher only).
        transform_logits: The map that `logits` went through, for other logits that are compared with them.
        indices: Indices of the batch's samples in the training set, [B] (teacher only).
        classes: The student's classes that the teacher knows, [M], where it does not know them all (teacher only). The
            methods get the logits of both for these, and the labels as they are: `losses.among_classes`.
        standardized: The same with standardised features, for the methods that take these (teacher only).
    """
    logits: Optional[torch.Tensor] = None
    feature: Optional[torch.Tensor] = None
    pre_logits: Optional[torch.Tensor] = None
    stages: Tuple[torch.Tensor, ...] = ()
    tap: Optional[torch.Tensor] = None
    matched: Tuple[Any, ...] = ()
    token_logits: Optional[torch.Tensor] = None
    blocks: Tuple[torch.Tensor, ...] = ()
    prefix: Optional[torch.Tensor] = None
    tail: Optional[Callable[[torch.Tensor], torch.Tensor]] = None
    head: Optional[Callable[[torch.Tensor], torch.Tensor]] = None
    transform_logits: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits
    indices: Optional[torch.Tensor] = None
    classes: Optional[torch.Tensor] = None
    standardized: Optional['Features'] = None

    def tensors(self) -> List[torch.Tensor]:
        """Return what the model gave: logits, feature, pre-logits, stages and blocks, as far as they were asked for."""
        return [x for x in (self.logits, self.feature, self.pre_logits, *self.stages, *self.blocks) if x is not None]

    def to(self, dtype: torch.dtype) -> 'Features':
        """Convert what the model gave, in place."""
        self.logits, self.feature, self.pre_logits, self.prefix = (
            None if x is None else x.to(dtype) for x in (self.logits, self.feature, self.pre_logits, self.prefix))
        self.stages, self.blocks = (tuple(x.to(dtype) for x in maps) for maps in (self.stages, self.blocks))
        return self

    def complete_standardized(self) -> None:
        """Give the standardised features what goes with them and has no scale: logits, indices."""
        other = self.standardized
        if other is not None:
            other.logits, other.token_logits = self.logits, self.token_logits
            other.indices, other.classes = self.indices, self.classes


TeacherFeatures = Union[Features, Dict[str, Features]]  # of one teacher, or of each of several by name


def by_teacher(features: TeacherFeatures) -> Dict[str, Features]:
    """Return features by the names of their teachers; those of the only one under ''."""
    return {'': features} if isinstance(features, Features) else features




@dataclass(frozen=True)
class Stage:
    """An intermediate feature of a model.

    Attributes:
        index: Its index for `forward_intermediates`.
        shape: Shape of the map for one image, (C, H, W).
        nonnegative: Whether it was measured to hold no negative number, as behind a ReLU.
    """
    index: int
    shape: Tuple[int, int, int]
    nonnegative: bool = False


@dataclass(frozen=True)
class Pooling:
    """Pooling of the teacher's last map with which a method begins, so that it need not have more of it.

    Attributes:
        grid: (height, width) that it is pooled to; None for the student's, in each dimension where that is smaller.
        mode: 'avg' or 'max', as of `losses.pool_to_grid`.
    """
    grid: Optional[Tuple[int, int]] = None
    mode: str = 'avg'


TARGETS = frozenset({'feature', 'pre_logits', 'stages', 'blocks'})  # what of a teacher can be standardised
STUDENT_OUTPUTS = frozenset({'logits', 'feature', 'pre_logits', 'stages', 'blocks', 'token_logits', 'head'})


def first_blocks(stages: Sequence[Stage]) -> Tuple[Stage, ...]:
    """Return the first two blocks of a model whose grid never changes (ViT), of others the first two stages.

    Args:
        stages: Its stages, shallow to deep; of a model that gives no intermediate feature there are no blocks.
    """
    if not stages or stages[-1].index < 0:
        return ()
    if len({stage.shape for stage in stages}) > 1 or len(stages) == 1:
        return tuple(stages[:2])
    return tuple(Stage(index, stages[0].shape) for index in (0, 1))


@dataclass(frozen=True)
class FeatureSpec:
    """Shapes of a model's features for one image.

    Attributes:
        num_classes: K, 0 without a classifier.
        feature: Shape of the last-stage feature as a map, (C, H, W); a vector as (C, 1, 1).
        pre_logits: Width of the classifier's input.
        stages: Intermediate features, shallow to deep; at least one, the last-stage feature.
        input_size: What this model itself is fed, (channels, height, width).
        head: What the head takes, 'feature' or (teacher only) 'pre_logits'; '' where it cannot be run by itself.
        head_averages: Whether that head's logits of a map are the mean of those of its positions, measured.
        tail: The stage whose map the model's own last layers take (teacher only); None where there is none.
        no_tail: Why not.
        non_negative: Which of 'feature' and 'pre_logits' are never negative, as behind a ReLU (teacher only).
    """
    num_classes: int
    feature: Tuple[int, int, int]
    pre_logits: int
    stages: Tuple[Stage, ...]
    input_size: Tuple[int, int, int]
    head: str = ''
    head_averages: bool = False
    non_negative: FrozenSet[str] = frozenset()
    tail: Optional[Stage] = None
    no_tail: str = ''


    def standardized(self) -> 'FeatureSpec':
        """Return what is known of the features once they are standardised, and so no longer have one sign."""
        stages = tuple(replace(stage, nonnegative=False) for stage in self.stages)
        return replace(self, stages=stages, non_negative=frozenset())


@dataclass(frozen=True)
class PairSpec:
    """Pair of models that a method is built for.

    Attributes:
        student: Features of the student.
        teacher: Features of the teacher.
        num_samples: Images of the training set, None where that is unknown.
        sample_labels: Their labels by index, [num_samples], None where these are unknown.
    """
    student: FeatureSpec
    teacher: FeatureSpec
    num_samples: Optional[int] = None
    sample_labels: Optional[torch.Tensor] = None
