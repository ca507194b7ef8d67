"""Pairing stages of two architectures."""
from typing import Sequence, Tuple

import pytest

from timm_distill.reading import FeatureSpec
from timm_distill.stage_matching import match_stages, stages_of_pairs
from timm_distill.taps import Stage


def spec(grids: Sequence[int], size: int = 64) -> FeatureSpec:
    stages = tuple(Stage(i, (8 * (i + 1), grid, grid)) for i, grid in enumerate(grids))
    return FeatureSpec(5, stages[-1].shape, 8, stages, (3, size, size))


@pytest.mark.parametrize('student, teacher, pairs', [
    ((32, 16, 8, 4, 2), (32, 16, 8, 4, 2), ((0, 0), (1, 1), (2, 2), (3, 3), (4, 4))),
    ((16, 8, 4, 2), (32, 16, 8, 4, 2), ((0, 1), (1, 2), (2, 3), (3, 4))),
    ((32, 8, 2), (16, 8, 4, 2), ((1, 1), (2, 3))),
    ((4, 4, 4, 4), (32, 16, 8, 4, 2), ((0, 1), (1, 2), (2, 3), (3, 4))),
    ((16, 8, 4, 2), (4, 4, 4, 4), ((0, 0), (1, 1), (2, 2), (3, 3))),
    ((4, 4, 4, 4), (4, 4, 4, 4), ((0, 0), (1, 1), (2, 2), (3, 3))),
    ((2,), (16, 8, 4, 2), ((0, 3),)),
    ((1,), (4, 4, 4, 4), ((0, 3),)),
])
def test_stages_of_equal_reduction_are_paired_and_others_by_order_from_the_deepest(
        student: Tuple[int, ...],
        teacher: Tuple[int, ...],
        pairs: Tuple[Tuple[int, int], ...],
) -> None:
    assert match_stages(spec(student), spec(teacher)) == pairs


def test_a_grid_that_is_not_a_power_of_two_smaller_is_rounded() -> None:
    assert match_stages(spec((56, 28, 14, 7), 224), spec((55, 27, 13, 6), 224)) == ((0, 0), (1, 1), (2, 2), (3, 3))


def test_stages_of_pairs_are_the_stages_at_the_positions() -> None:
    student, teacher = spec((16, 8)), spec((32, 16, 8))
    pairs = stages_of_pairs(student, teacher, match_stages(student, teacher))
    assert [(s.shape[1], t.shape[1]) for s, t in pairs] == [(16, 16), (8, 8)]
