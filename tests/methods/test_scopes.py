"""METHOD@TEACHER in --kd and its companions."""
from typing import Any, Dict, List

import pytest

from timm_distill.errors import UsageError
from timm_distill.methods import DistillMethod, Recipe, register_method
from timm_distill.methods._base import METHODS
from timm_distill.methods._composition import create_composition, methods_of, parse_kd
from timm_distill.methods._scopes import scope_term, unscope_term

BOTH = ('dino', 'sup')


@pytest.mark.parametrize('kd,methods,weights', [
    ('kd', ['kd@dino', 'kd@sup'], {'kd@dino': 1., 'kd@sup': 1.}),
    ('norm', ['norm'], {'norm@dino': 1., 'norm@sup': 1.}),
    ('norm@dino+kd@sup', ['norm@dino', 'kd@sup'], {'norm@dino': 1., 'kd@sup': 1.}),
    (' norm @ dino + sdd:kd@sup ', ['norm@dino', 'sdd:kd@sup'], {'norm@dino': 1., 'sdd:kd@sup': 1.}),
    ('kd++@sup', ['kd@sup', 'nd@sup'], {'kd@sup': 2.5, 'nd@sup': 1.}),
    ('kd++@sup+dkd++@dino', ['kd@sup', 'nd@sup', 'dkd@dino', 'nd@dino'], {
        'kd@sup': 2.5, 'nd@sup': 1., 'dkd@dino': 1., 'nd@dino': 1.}),
])
def test_a_method_is_one_with_each_teacher_unless_it_names_one(
        kd: str, methods: List[str], weights: Dict[str, float]) -> None:
    composition = create_composition(Recipe(kd), BOTH)
    assert list(composition.methods) == methods
    assert composition.weights == weights and composition.schedules.keys() == weights.keys()


@pytest.mark.parametrize('kd', ['norm+kd', 'norm@dino+kd@dino'])
def test_one_teacher_with_a_name_is_as_one_without(kd: str) -> None:
    composition = create_composition(Recipe(kd, {'kd@dino': 2.}, {'norm@dino.segments': 3}), ['dino'])
    assert composition.weights == {'norm': 1., 'kd': 2.}
    assert composition.methods['norm'].adapter_options['segments'] == 3


def test_flags_of_one_teacher_count_before_those_of_all() -> None:
    composition = create_composition(Recipe(
        'norm+kd+sdd:kd@sup',
        kd_weight={'kd@dino': 0.5, 'kd': 2., 'norm@sup': 3., 'sdd': 4.},
        kd_kwargs={
            'kd@sup.temperature': 3., 'kd': {'temperature': 2.}, 'norm.segments': 6, 'sdd@sup.kd.temperature': 5.},
        kd_schedule={'kd': 'warmup:2', 'norm@dino': 'stop:1'}), BOTH)
    assert composition.weights == {
        'norm@dino': 1., 'norm@sup': 3., 'kd@dino': 0.5, 'kd@sup': 2., 'sdd:kd@sup': 4.}
    methods: Any = composition.methods
    assert (methods['kd@dino'].temperature, methods['kd@sup'].temperature) == (2., 3.)
    assert methods['sdd:kd@sup'].inner.temperature == 5.
    schedules = composition.schedules
    assert [schedules[unit](0) for unit in ('kd@dino', 'kd@sup', 'norm@dino', 'norm@sup')] == [0.5, 0.5, 1., 1.]
    assert [schedules[unit](1) for unit in ('norm@dino', 'norm@sup')] == [0., 1.]


def test_a_preset_with_one_teacher_keeps_its_options_and_schedules() -> None:
    composition = create_composition(Recipe('kdpp@sup'), BOTH)
    assert composition.methods['kd@sup'].temperature == 1.
    assert [composition.schedules['kd@sup'](epoch) for epoch in (0, 5)] == [0., 1.]
    assert create_composition(Recipe('usi@sup+norm@dino'), BOTH).task_loss_weight == 0.


@pytest.mark.parametrize('recipe,teachers,words', [
    (Recipe('kd@tino'), BOTH, ["--kd kd@tino: there is no teacher 'tino'", 'dino, sup']),
    (Recipe('kd@dino'), (), ['the teacher has no name', '--teacher dino=NAME']),
    (Recipe('kd@'), BOTH, ["--kd 'kd@'"]),
    (Recipe('@sup'), BOTH, ["--kd '@sup'"]),
    (Recipe('kd@sup+kd'), BOTH, ["'kd@sup' twice", 'each of dino, sup']),
    (Recipe('kd@sup+kd@sup'), BOTH, ['different names']),
    (Recipe('kd', {'kd@x': 1.}), BOTH, ["--kd-weight kd@x: there is no teacher 'x'"]),
    (Recipe('kd@sup', {'kd@dino': 1.}), BOTH, ["the method 'kd@dino' is not in --kd kd@sup"]),
    (Recipe('kd', {}, {'kd@x.temperature': 1.}), BOTH, ["--kd-kwargs kd@x.temperature: there is no teacher 'x'"]),
    (Recipe('norm', {}, {'norm@sup.segments': 2}), BOTH, ['norm is one for all teachers']),
    (Recipe('kd', kd_schedule={'kd@x': 'warmup:2'}), BOTH, ['--kd-schedule kd@x']),
    (Recipe('kd@sup', {}, {'kd@sup.temperature': -1}), BOTH, ['kd@sup.temperature=-1']),
    (Recipe('kd', teacher_drop=2.), BOTH, ['--teacher-drop 2.0']),
])
def test_a_name_that_means_nothing_is_one_error_that_says_what_there_is(
        recipe: Recipe, teachers: Any, words: List[str]) -> None:
    with pytest.raises(UsageError) as error:
        create_composition(recipe, teachers)
    for word in words:
        assert word in str(error.value)


def test_an_adapter_that_cannot_be_shared_asks_for_its_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    create_composition(Recipe('kd'))  # found before the table is copied
    monkeypatch.setattr(METHODS, '_entries', dict(METHODS._entries))

    @register_method('alone')
    class Alone(DistillMethod):
        """A method whose adapter has one teacher."""
        paper = 'None.'
        adapter = 'norm'

    with pytest.raises(UsageError, match='alone@dino'):
        create_composition(Recipe('alone'), BOTH)
    assert list(create_composition(Recipe('alone@sup'), BOTH).methods) == ['alone@sup']


def test_what_methods_read_is_known_without_the_teachers() -> None:
    assert parse_kd('norm@dino+kd++@sup') == ['norm@dino', 'kd++@sup']
    assert list(methods_of('norm@dino+kd++@sup+sdd:kd@dino')) == ['norm', 'kd', 'nd', 'sdd:kd']


@pytest.mark.parametrize('term,teacher,name', [
    ('kd_loss', 'sup', 'kd@sup_loss'), ('nd_norm_loss', 'a', 'nd_norm@a_loss'), ('nd_loss', 'norm_a', 'nd@norm_a_loss'),
    ('kd_loss', '', 'kd_loss')])
def test_a_terms_name_says_its_teacher(term: str, teacher: str, name: str) -> None:
    assert scope_term(term, teacher) == name and unscope_term(name) == (term, teacher)
