"""Promises of the weight schedules."""
from typing import Any

import pytest

from timm_distill import UsageError
from timm_distill.methods._schedules import WeightSchedule, create_weight_schedule

NAMED = {'warm': ((0, 0.), (3, 1.))}


def test_const_is_one_for_ever() -> None:
    schedule = create_weight_schedule('const')
    assert [schedule(epoch) for epoch in (0, 1, 10 ** 6)] == [1., 1., 1.]


def test_named_schedule_steps_at_its_epochs() -> None:
    schedule = create_weight_schedule('warm', NAMED)
    assert [schedule(epoch) for epoch in range(5)] == [0., 0., 0., 1., 1.]


@pytest.mark.parametrize('spec', [
    '0:0.1,5:0.5,8:1',
    ['0:0.1', '5:0.5', '8:1'],
    [(0, 0.1), (5, 0.5), (8, 1)],
    [[0, 0.1], [5, 0.5], [8, 1]],
    {0: 0.1, 5: 0.5, 8: 1},
    {'0': 0.1, '5': 0.5, '8': 1},
])
def test_every_way_of_writing_a_list_means_the_same(spec: Any) -> None:
    schedule = create_weight_schedule(spec)
    assert [schedule(epoch) for epoch in (0, 4, 5, 7, 8, 9)] == [0.1, 0.1, 0.5, 0.5, 1., 1.]


def test_last_weight_stays_in_force() -> None:
    assert create_weight_schedule('0:0.5,2:0.25')(10 ** 6) == 0.25


def test_repr_can_be_read_back() -> None:
    schedule = create_weight_schedule('0:0.1,5:0.5')
    assert create_weight_schedule(repr(schedule)).steps == schedule.steps


@pytest.mark.parametrize('spec', ['5:0.5', '0:1,5:2,5:3', '0:1,5:2,3:1', [], {}])
def test_epochs_must_increase_from_zero(spec: Any) -> None:
    with pytest.raises(UsageError, match='starts at epoch 0'):
        create_weight_schedule(spec)


@pytest.mark.parametrize('spec', ['', 'cosine', '0=1', '0:a', 'a:1', 3, None, [1, 2], '0:1:2'])
def test_other_values_are_named_with_the_known_names_and_the_form(spec: Any) -> None:
    with pytest.raises(UsageError) as error:
        create_weight_schedule(spec, NAMED, option='norm.schedule')
    for part in (f'norm.schedule={spec!r}', 'const', 'warm', '0:0.1,5:0.5'):
        assert part in str(error.value)


@pytest.mark.parametrize('weight', ['nan', 'inf'])
def test_weights_must_be_finite(weight: str) -> None:
    with pytest.raises(UsageError):
        create_weight_schedule(f'0:{weight}')


def test_schedule_without_steps_is_refused() -> None:
    with pytest.raises(UsageError):
        WeightSchedule(())
