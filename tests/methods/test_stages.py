"""Pairing stages of two architectures."""
from typing import Any, Sequence, Tuple

import pytest
import torch

from timm_distill import UsageError, create_method
from timm_distill.features.spec import Features, FeatureSpec, PairSpec, Stage
from timm_distill.methods._stages import (
    match_stages,
    matched_stages,
    parse_stages,
    select_stages,
    stages_of_pairs,
)


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


@pytest.mark.parametrize('choice, expected', [
    ('all', 'all'), ('last', 'last'), ('middle', 'middle'), (2, (2,)), (-1, (-1,)), ((0, 2), (0, 2)), ([1], (1,)),
    ('0,2', (0, 2)), ('-1', (-1,)),
])
def test_stages_are_chosen_by_word_or_position(choice: Any, expected: Any) -> None:
    assert parse_stages(choice) == expected


@pytest.mark.parametrize('choice', ['first', '', (), (1, 1), None, 'all,last', 1.5, [1.5], True, [True]])
def test_other_choices_of_stages_are_refused_by_name(choice: Any) -> None:
    with pytest.raises(UsageError, match="at.stages=.*'all', 'last', 'middle'"):
        create_method('at', stages=choice)


@pytest.mark.parametrize('choice, expected', [
    ('all', ((0, 0), (1, 1), (2, 2), (3, 3), (4, 4))), ('last', ((4, 4),)), ('middle', ((2, 2),)),
    ((3, 0), ((0, 0), (3, 3))), ((-1, 4), ((4, 4),)),
])
def test_choice_selects_among_the_matched_stages_from_shallow_to_deep(choice: Any, expected: Any) -> None:
    pair = PairSpec(spec((16, 8, 4, 2, 1)), spec((16, 8, 4, 2, 1)))
    assert select_stages(pair, choice, 'at.stages') == expected


def test_methods_that_compare_positions_get_stages_that_have_some() -> None:
    pair = PairSpec(spec((16, 8, 4, 2, 1)), spec((16, 8, 4, 2, 1)))
    assert select_stages(pair, 'last', 'at.stages', spatial=True) == ((3, 3),)
    flat = PairSpec(spec((16, 8)), spec((1,)))
    with pytest.raises(UsageError, match='at compares positions.*--img-size'):
        select_stages(flat, 'all', 'at.stages', spatial=True)


def test_a_position_beyond_the_matched_stages_names_how_many_there_are() -> None:
    with pytest.raises(UsageError, match='at.stages=0,5: this pair has 2 matched stages, 0 to 1'):
        select_stages(PairSpec(spec((16, 8)), spec((16, 8))), (0, 5), 'at.stages')


def test_matched_stages_are_the_maps_of_both_models() -> None:
    student = Features(stages=(torch.zeros(1), torch.ones(1)))
    teacher = Features(stages=(torch.zeros(2), torch.ones(2)))
    (first, second), = matched_stages(student, teacher, ((1, 0),))
    assert first is student.stages[1] and second is teacher.stages[0]
