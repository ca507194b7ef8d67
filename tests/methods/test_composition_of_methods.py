"""What --kd and its companions mean."""
from typing import Dict, Iterator, List

import pytest

from timm_distill.errors import UsageError
from timm_distill.methods import METHODS, Preset, create_method, list_methods, register_method, register_preset
from timm_distill.methods._composition import Recipe, create_composition, expand_kd, parse_kd


@pytest.fixture(autouse=True)
def _own_presets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    list_methods()  # found before the presets are replaced
    monkeypatch.setattr(METHODS, '_presets', {})
    register_preset(Preset('kd++', 'Both.', 'None.', {'kd': 1., 'norm': 2.}, {'kd': {'temperature': 1.}}, ('kdpp',)))
    yield


@pytest.mark.parametrize('kd, names', [
    ('kd++', ['kd++']),
    ('kdpp', ['kdpp']),
    ('norm+kd++', ['norm', 'kd++']),
    ('kd+++norm', ['kd++', 'norm']),
    (' kd++ + norm ', ['kd++', 'norm']),
    ('kd+norm', ['kd', 'norm']),
    ('kdx+norm', ['kdx', 'norm']),
])
def test_a_name_is_matched_before_plus_splits(kd: str, names: List[str]) -> None:
    assert parse_kd(kd) == names


@pytest.mark.parametrize('kd', ['', 'kd+', '+kd', 'kd++norm', 'kd+none', 'kd+kd'])
def test_malformed_names_are_an_error(kd: str) -> None:
    with pytest.raises(UsageError, match='--kd'):
        parse_kd(kd)


@pytest.mark.parametrize('name', ['kd++', 'kdpp'])
def test_a_preset_expands_to_its_methods_weights_and_options(name: str) -> None:
    assert expand_kd(name) == ({'kd': 1., 'norm': 2.}, {'kd': {'temperature': 1.}, 'norm': {}})


def test_flags_override_a_preset() -> None:
    composition = create_composition(Recipe('kd++', {'norm': 3.}, {'kd.temperature': 2.}))
    assert composition.weights == {'kd': 1., 'norm': 3.}
    assert composition.methods['kd'].temperature == 2.


def test_a_method_that_a_preset_brings_is_not_named_twice() -> None:
    with pytest.raises(UsageError, match="'kd' twice"):
        expand_kd('kd+++kd')


@pytest.mark.parametrize('schedule, weights', [
    ({}, [1., 1., 1.]),
    ({'norm': 'imagenet'}, [0.1, 0.1, 0.1, 0.1, 0.1, 0.5]),
    ({'norm': 'warmup:2'}, [0.5, 1., 1.]),
    ({'norm': 'cosine:1:0'}, [1., 0.5, 0., 0.]),
    ({'norm': 'warmup:2*stop:2'}, [0.5, 1., 0.]),
    ({'norm': {0: 0.25, 2: 1.}}, [0.25, 0.25, 1.]),
])
def test_a_schedule_gives_the_factor_of_every_epoch(schedule: Dict[str, str], weights: List[float]) -> None:
    composition = create_composition(Recipe('norm', kd_schedule=schedule, num_epochs=3))
    assert [composition.schedules['norm'](epoch) for epoch in range(len(weights))] == pytest.approx(weights)


@pytest.mark.parametrize(
    'schedule', ['linear', 'warmup', 'warmup:x', 'warmup:0', 'cosine:1', 'stop', '5:0.5', 'warmup:2*x'])
def test_a_malformed_schedule_names_the_flag_and_the_forms(schedule: str) -> None:
    with pytest.raises(UsageError, match='warmup|weight schedule'):
        create_composition(Recipe('norm', kd_schedule={'norm': schedule}, num_epochs=3))


def test_a_cosine_without_the_length_of_the_run_says_so() -> None:
    with pytest.raises(UsageError, match='num_epochs'):
        create_composition(Recipe('norm', kd_schedule={'norm': 'cosine:1:0'}))


@pytest.mark.parametrize('companion', [
    dict(kd_weight={'kd': 1.}), dict(kd_kwargs={'kd.hard': True}), dict(kd_schedule={'kd': 'const'})])
def test_a_companion_flag_of_a_method_that_is_not_used_is_an_error(companion: Dict) -> None:
    with pytest.raises(UsageError, match='norm'):
        create_composition(Recipe('norm', **companion))


@pytest.mark.parametrize('misspelt, known', [('kpdp', 'kdpp'), ('kd-+', 'kd++'), ('nrom', 'norm'), ('kdd++', 'kd++')])
def test_a_misspelt_name_is_answered_with_the_closest_of_methods_and_presets(misspelt: str, known: str) -> None:
    with pytest.raises(UsageError) as error:
        expand_kd(misspelt)
    assert f"did you mean '{known}'?" in str(error.value)


def test_an_unknown_name_lists_methods_and_presets() -> None:
    with pytest.raises(UsageError, match='--kd takes: .*norm.*, and the presets kd[+][+], kdpp'):
        expand_kd('unknown')


def test_a_preset_is_no_single_method_and_says_what_it_stands_for() -> None:
    with pytest.raises(UsageError, match=r'kd \(weight 1\), norm \(weight 2\)'):
        create_method('kd++')


def test_methods_and_presets_share_their_names() -> None:
    with pytest.raises(ValueError, match='already'):
        register_preset(Preset('kdpp', 'Again.', 'None.', {'kd': 1.}))
    with pytest.raises(ValueError, match='already'):
        register_preset(Preset('norm', 'A method.', 'None.', {'kd': 1.}))
    with pytest.raises(ValueError, match='already'):
        register_method('kdpp')(type('Method', (METHODS.get('kd').cls,), {'__doc__': 'A preset.'}))


def test_a_preset_with_a_taken_alias_leaves_no_name_behind() -> None:
    with pytest.raises(ValueError, match='already'):
        register_preset(Preset('new', 'One.', 'None.', {'kd': 1.}, aliases=('kd',)))
    assert 'new' not in METHODS.presets()
