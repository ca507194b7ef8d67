"""Stages of a student and of a teacher that are compared, and the base of the methods that compare them."""
import math
import operator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Dict, FrozenSet, List, Optional, Sequence, Tuple, Union

import torch

from ..errors import UsageError
from ..features.spec import Features, FeatureSpec, PairSpec, Stage
from ._base import DistillMethod

StagePairs = Tuple[Tuple[int, int], ...]
_WORDS = ('all', 'last', 'middle')


@dataclass(frozen=True)
class StageWords:
    """Choices of matched stages: a word, a position, several, or several as text ('0,2').

    Attributes:
        several: Allow more than one stage.
    """
    several: bool = True

    def __contains__(self, choice: Any) -> bool:
        try:
            stages = parse_stages(choice)
        except (TypeError, ValueError):
            return False
        return self.several or stages != 'all' and (isinstance(stages, str) or len(stages) == 1)

    def __str__(self) -> str:
        if not self.several:
            return "one stage: 'last', 'middle' or a position, 0 the shallowest"
        return "'all', 'last', 'middle' or different positions, 0 the shallowest"


StageChoice = Annotated[Union[str, int, Sequence[int]], StageWords()]
SingleStage = Annotated[Union[str, int, Sequence[int]], StageWords(several=False)]


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


def parse_stages(choice: StageChoice) -> Union[str, Tuple[int, ...]]:
    """Return a choice of stages as 'all', 'last', 'middle' or positions.

    Raises:
        TypeError, ValueError: If it is none of these.
    """
    if choice in _WORDS:
        return str(choice)
    items = choice.split(',') if isinstance(choice, str) else [choice] if isinstance(choice, int) else choice
    positions = tuple(int(item) if isinstance(item, str) else operator.index(item) for item in items)
    if not positions or len(set(positions)) < len(positions) or bool in map(type, items):
        raise ValueError(f'{choice!r} is not {StageWords()}.')
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
        choice: What `parse_stages` returned.
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


class StageMethod(DistillMethod):
    """Base of the methods that compare matched stages: they build what they train for these, and compare their maps.

    Args:
        stages: Which matched stages.

    Attributes:
        spatial: Compares positions, so that stages of one position are left out.
        neighbours: What is compared of neighbouring stages, of which it needs two; '' for a method that takes one.
    """
    student_outputs = frozenset({'stages'})
    teacher_outputs = frozenset({'stages'})
    spatial: ClassVar[bool] = False
    neighbours: ClassVar[str] = ''

    def __init__(self, stages: StageChoice):
        super().__init__()
        self.stages = parse_stages(stages)
        self.pairs: StagePairs = ()

    def build(self, pair: PairSpec) -> None:
        self.pairs = select_stages(pair, self.stages, f'{self.name}.stages', self.spatial)
        if self.neighbours and len(self.pairs) < 2:
            raise UsageError(
                f'{self.name} compares {self.neighbours} neighbouring stages and needs two; {self.name}.stages='
                f'{self.stages} of this pair gives one. Use --kd at, sp or fitnet, which take a single stage.')
        self.build_stages(stages_of_pairs(pair.student, pair.teacher, self.pairs))

    def build_stages(self, stages: List[Tuple[Stage, Stage]]) -> None:
        """Create what the method trains for pairs of stages, shallow to deep."""

    def teacher_stages(self) -> Optional[FrozenSet[int]]:
        return frozenset(j for _, j in self.pairs)

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        students, teachers = zip(*matched_stages(student, teacher, self.pairs))
        return self.compare(students, teachers)

    def compare(self, students: Sequence[torch.Tensor], teachers: Sequence[torch.Tensor]) -> Dict[str, torch.Tensor]:
        """Return the terms of the matched maps, [B, Cs, Hs, Ws] and [B, Ct, Ht, Wt] each, shallow to deep."""
        raise NotImplementedError
