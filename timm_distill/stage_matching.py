"""Which stage of a student is compared with which of a teacher."""
import math
from typing import List, Sequence, Tuple

from .reading import FeatureSpec
from .taps import Stage

StagePairs = Tuple[Tuple[int, int], ...]


def match_stages(student: FeatureSpec, teacher: FeatureSpec) -> StagePairs:
    """Pair the stages of two models, shallow to deep: positions in their lists of stages.

    Stages of equal reduction (input size over grid size, rounded to a power of two) are paired. Where fewer than two
    are, or one of the models keeps one grid throughout (ViT), they are paired by order, the deepest with the deepest.
    """
    reductions = _reductions(student), _reductions(teacher)
    possible = min(len(student.stages), len(teacher.stages))
    by_reduction = _match_reductions(*reductions)
    one_grid = any(len(set(r)) == 1 for r in reductions)
    if len(by_reduction) >= 2 and not one_grid:
        return by_reduction
    return tuple((len(student.stages) - k, len(teacher.stages) - k) for k in range(possible, 0, -1))


def stages_of_pairs(student: FeatureSpec, teacher: FeatureSpec, pairs: StagePairs) -> List[Tuple[Stage, Stage]]:
    """Return the stages of matched positions."""
    return [(student.stages[i], teacher.stages[j]) for i, j in pairs]


def _reductions(spec: FeatureSpec) -> List[int]:
    """Return the binary logarithm of each stage's reduction."""
    return [round(math.log2(spec.input_size[1] / stage.shape[1])) for stage in spec.stages]


def _match_reductions(student: Sequence[int], teacher: Sequence[int]) -> StagePairs:
    """Pair positions of equal reduction; of several with the same, the deepest."""
    deepest = {reduction: position for position, reduction in enumerate(teacher)}
    own = {reduction: position for position, reduction in enumerate(student)}
    return tuple((own[r], deepest[r]) for r in sorted(own) if r in deepest)
