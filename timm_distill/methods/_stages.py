"""Which stage of a student is compared with which of a teacher."""
import math
from typing import List, Sequence, Tuple, Union

import torch

from ..errors import UsageError
from ..features.spec import Features, FeatureSpec, PairSpec, Stage

StagePairs = Tuple[Tuple[int, int], ...]
StageChoice = Union[str, int, Sequence[int]]


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


def check_stage_choice(choice: StageChoice, option: str) -> Union[str, Tuple[int, ...]]:
    """Return a user's choice of stages as 'all', 'last', 'middle' or positions.

    Args:
        choice: One of these words, a position, several, or several as text ('0,2').
        option: Name of the option, for messages.

    Raises:
        UsageError: If it is none of these.
    """
    if choice in ('all', 'last', 'middle'):
        return str(choice)
    try:
        items = choice.split(',') if isinstance(choice, str) else [choice] if isinstance(choice, int) else choice
        positions = tuple(int(item) for item in items)
    except (TypeError, ValueError):
        positions = ()
    if not positions or len(set(positions)) < len(positions):
        raise UsageError(
            f"{option}={choice!r} must be 'all', 'last', 'middle' or different positions among the "
            f'matched stages, counted from 0 at the shallowest (--kd-kwargs {option}=1,2).')
    return positions


def select_stages(
        pair: PairSpec,
        choice: Union[str, Tuple[int, ...]],
        option: str,
        spatial: bool = False,
) -> StagePairs:
    """Return the matched stages of a pair that a choice names, shallow to deep.

    Args:
        pair: Student and teacher.
        choice: What `check_stage_choice` returned.
        option: Name of the option, 'METHOD.stages', for messages.
        spatial: Only stages with more than one position, for methods that compare positions.

    Raises:
        UsageError: If there is no such stage.
    """
    pairs = match_stages(pair.student, pair.teacher)
    if spatial:
        pairs = tuple(
            p for p, shapes in zip(pairs, stages_of_pairs(pair.student, pair.teacher, pairs))
            if _common_positions(*shapes) > 1)
    if not pairs:
        raise UsageError(
            f"{option.split('.')[0]} compares positions of feature maps, and no matched stage of this "
            'pair has more than one in both models: use a larger --img-size, or a method that reads '
            'vectors (--kd rkd, pkt or cc).')
    if isinstance(choice, str):
        return pairs if choice == 'all' else (pairs[-1 if choice == 'last' else len(pairs) // 2],)
    if not all(-len(pairs) <= position < len(pairs) for position in choice):
        raise UsageError(
            f'{option}={",".join(map(str, choice))}: this pair has {len(pairs)} matched stages, 0 to '
            f'{len(pairs) - 1} from shallow to deep (--kd-kwargs {option}=all takes every one).')
    return tuple(pairs[i] for i in sorted({position % len(pairs) for position in choice}))


def matched_stages(student: Features, teacher: Features, pairs: StagePairs) -> List[Tuple[torch.Tensor, torch.Tensor]]:
    """Return the feature maps of matched stages: (student's, teacher's) each."""
    return [(student.stages[i], teacher.stages[j]) for i, j in pairs]


def _common_positions(student: Stage, teacher: Stage) -> int:
    return min(student.shape[1], teacher.shape[1]) * min(student.shape[2], teacher.shape[2])
