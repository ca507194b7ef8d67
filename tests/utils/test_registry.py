"""Promises of the registries of methods and adapters."""
import dataclasses
from typing import Annotated, Any, Dict, List

import pytest

from timm_distill import UsageError, create_adapter, create_method, list_adapters, list_methods
from timm_distill.adapters import ADAPTERS
from timm_distill.methods import METHODS, describe_methods
from timm_distill.utils.ranges import OneOf, Range
from timm_distill.utils.registry import Registry


class Stub:
    """A stub.

    More about it.
    """

    def __init__(self, *args: Any, size: int = 3, rate: float = 0.5, flag: bool = False, mode: str = 'a'):
        self.args = args
        self.options = dict(size=size, rate=rate, flag=flag, mode=mode)


class Declared:
    """A stub whose options say what they can be."""

    def __init__(
            self,
            size: Annotated[int, Range(1, 8, whole=True)] = 3,
            mode: Annotated[str, OneOf('a', 'b')] = 'a',
            power: Annotated[int, OneOf(1, 2)] = 1,
            rate: 'Annotated[float, Range(0, 1)]' = 0.5,
            spare: int = 0,
    ):
        self.options = dict(size=size, mode=mode, power=power, rate=rate, spare=spare)


class OfATypeChecker:
    """A stub with an annotation that does not exist when it runs."""

    def __init__(self, size: 'NoSuchType' = 3):  # type: ignore[name-defined]  # noqa: F821
        self.size = size


def create_registry(**classes: type) -> Registry:
    """Return an isolated registry whose discovery imports a package that registers nothing in it."""
    registry = Registry('method', '--kd', 'timm_distill.adapters')
    for name, cls in classes.items():
        registry.register(name)(cls)
    return registry


def test_entry_holds_name_class_first_docstring_line_and_defaults() -> None:
    entry = create_registry(stub=Stub).get('stub')
    assert (entry.name, entry.cls, entry.description) == ('stub', Stub, 'A stub.')
    assert entry.defaults == dict(size=3, rate=0.5, flag=False, mode='a')


def test_entry_is_frozen() -> None:
    entry = create_registry(stub=Stub).get('stub')
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry.name = 'other'


def test_names_are_sorted() -> None:
    assert create_registry(b=Stub, a=Stub).names() == ['a', 'b']


def test_duplicate_name_is_an_error_and_keeps_the_first() -> None:
    registry = create_registry(stub=Stub)
    with pytest.raises(ValueError, match="'stub' is registered already"):
        registry.register('stub')(type('Other', (), {'__doc__': 'Another.'}))
    assert registry.get('stub').cls is Stub


def test_class_without_docstring_cannot_be_registered() -> None:
    with pytest.raises(ValueError, match='docstring'):
        create_registry().register('stub')(type('Bare', (), {}))


def test_unknown_name_lists_the_known_ones_and_the_closest() -> None:
    with pytest.raises(UsageError) as error:
        create_registry(norm=Stub, kd=Stub).get('nrom')
    for part in ("'nrom'", "did you mean 'norm'?", '--kd takes: kd, norm'):
        assert part in str(error.value)


def test_unknown_option_lists_the_known_ones_and_the_closest() -> None:
    with pytest.raises(UsageError) as error:
        create_registry(stub=Stub).create('stub', sise=4)
    for part in ("'stub.sise'", "did you mean 'size'?", 'stub.size, stub.rate, stub.flag, stub.mode'):
        assert part in str(error.value)


@pytest.mark.parametrize('options', [
    dict(size=2.5), dict(size='2'), dict(size=True), dict(rate='fast'), dict(rate=True), dict(flag=1), dict(flag='no'),
])
def test_option_of_a_wrong_type_is_named_with_its_value(options: Dict[str, Any]) -> None:
    (option, value), = options.items()
    with pytest.raises(UsageError) as error:
        create_registry(stub=Stub).create('stub', **options)
    assert f'stub.{option}={value!r}' in str(error.value)


def test_whole_number_is_a_number() -> None:
    assert create_registry(stub=Stub).create('stub', rate=2).options['rate'] == 2


@pytest.mark.parametrize(('options', 'allowed'), [
    (dict(size=0), 'an integer between 1 and 8'), (dict(size=2.), 'an integer between 1 and 8'),
    (dict(size=True), 'an integer between 1 and 8'), (dict(mode='c'), 'one of a, b'), (dict(mode=None), 'one of a, b'),
    (dict(power=True), 'one of 1, 2'), (dict(rate=1.5), 'between 0 and 1'),
    (dict(rate=float('nan')), 'between 0 and 1'), (dict(rate='0.5'), 'between 0 and 1'),
    (dict(spare=10 ** 9), 'between -100000000 and 100000000'),
])
def test_value_that_is_not_declared_is_one_message_with_what_is_and_the_flag(
        options: Dict[str, Any],
        allowed: str,
) -> None:
    (option, value), = options.items()
    registry = create_registry(stub=Declared)
    with pytest.raises(UsageError) as error:
        registry.create('stub', **options)
    default = registry.get('stub').defaults[option]
    assert str(error.value).startswith(f'stub.{option}={value!r} must be ')
    assert str(error.value).endswith(f'{allowed} (--kd-kwargs stub.{option}={default}).')


def test_declared_values_pass() -> None:
    options = dict(size=8, mode='b', power=2, rate=1, spare=-3)
    assert create_registry(stub=Declared).create('stub', **options).options == options


def test_annotation_that_only_a_type_checker_knows_leaves_the_type_to_be_checked() -> None:
    registry = create_registry(stub=OfATypeChecker)
    assert registry.create('stub', size=4).size == 4
    with pytest.raises(UsageError, match='stub.size'):
        registry.create('stub', size='4')


def _all_options() -> List[Any]:
    entries = [registry.get(name) for registry in (METHODS, ADAPTERS) for name in registry.names()]
    return [option for entry in entries for option in entry.options.values()]


@pytest.mark.parametrize('option', _all_options(), ids=lambda option: option.name)
def test_every_option_says_what_it_can_be_and_its_default_is_that(option: Any) -> None:
    assert option.name == 'norm.schedule' or option.allowed is not None and option.default in option.allowed


@pytest.mark.parametrize('name', list_methods())
def test_what_a_method_hands_on_to_its_adapter_can_be_the_same_in_both(name: str) -> None:
    options, adapter = METHODS.get(name).options, METHODS.get(name).cls.adapter
    known = ADAPTERS.get(adapter).options if adapter else {}
    for option in set(options) & set(known):
        assert str(options[option]) == str(known[option])


def test_positional_arguments_reach_the_class() -> None:
    stub = create_registry(stub=Stub).create('stub', 8, 9, size=1)
    assert stub.args == (8, 9) and stub.options['size'] == 1


def test_methods_and_adapters_are_discovered_by_name() -> None:
    assert {'norm', 'kd'} <= set(list_methods())
    assert 'norm' in list_adapters()


@pytest.mark.parametrize('create', [lambda: create_method('nrom'), lambda: create_adapter('nrom', 4, 4)])
def test_unknown_method_or_adapter_is_a_usage_error(create: Any) -> None:
    with pytest.raises(UsageError, match="did you mean 'norm'"):
        create()


@pytest.mark.parametrize('name', list_methods())
def test_list_of_methods_shows_defaults_allowed_values_needs_and_paper(name: str) -> None:
    text, entry = describe_methods(), METHODS.get(name)
    assert f'{name}: {entry.description}' in text
    assert entry.cls.paper and entry.cls.paper in text
    assert entry.cls.describe_needs() in text
    assert all(f'{name}.{key}={value}' in text for key, value in entry.defaults.items())
    assert all(f'={option.default} ({option.allowed})' in text for option in entry.options.values() if option.allowed)


@pytest.mark.parametrize('name', list_methods())
def test_list_of_methods_shows_the_default_weight_and_whose_it_is(name: str) -> None:
    cls = METHODS.get(name).cls
    assert cls.weight_source
    assert f'(--kd-weight {name}={cls.published_weight:g}), from: {cls.weight_source}' in describe_methods()


@pytest.mark.parametrize('name', list_methods())
def test_adapter_of_a_method_is_registered(name: str) -> None:
    adapter = METHODS.get(name).cls.adapter
    assert adapter is None or ADAPTERS.get(adapter)
