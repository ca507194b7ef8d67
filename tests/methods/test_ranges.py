"""Every numeric option of every method and adapter: a number without sense is one message that names it."""
import math
from typing import Any, List, Tuple

import pytest

from timm_distill import UsageError, create_adapter, create_distill_task, create_method, list_methods
from timm_distill.adapters import ADAPTERS
from timm_distill.methods import METHODS
from timm_distill.methods._schedules import create_weight_schedule


def numeric_options(registry: Any) -> List[Tuple[str, str]]:
    return [
        (name, option) for name in registry.names() for option, default in registry.get(name).defaults.items()
        if isinstance(default, (int, float)) and not isinstance(default, bool)]


def is_of_adapter(method: str, option: str) -> bool:
    """Whether a method hands an option on to its adapter, which checks it."""
    adapter = METHODS.get(method).cls.adapter
    return adapter is not None and option in ADAPTERS.get(adapter).defaults


OPTIONS = [option for option in numeric_options(METHODS) if not is_of_adapter(*option)]


@pytest.mark.parametrize(('method', 'option'), OPTIONS, ids=lambda x: x)
@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf, -1, 10 ** 9, 10 ** 40])
def test_a_number_without_sense_is_named_with_the_option(method: str, option: str, value: float) -> None:
    is_float = isinstance(METHODS.get(method).defaults[option], float)
    with pytest.raises(UsageError, match=f'{method}[.]{option}=') as error:
        create_method('sdd:kd' if method == 'sdd' else method, **{option: float(value) if is_float else value})
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(('adapter', 'option'), numeric_options(ADAPTERS), ids=lambda x: x)
@pytest.mark.parametrize('value', [math.nan, 0, -1, 1025, 10 ** 9, 10 ** 40])
def test_adapters_name_numbers_without_sense(adapter: str, option: str, value: float) -> None:
    with pytest.raises(UsageError, match=f'{adapter}[.]{option}='):
        create_adapter(adapter, 8, 8, **{option: value})


def test_every_method_has_been_asked() -> None:
    assert {method for method, _ in OPTIONS} >= {'kd', 'crd', 'norm', 'ofa', 'vid'}
    assert set(dict(OPTIONS)) <= set(list_methods())


@pytest.mark.parametrize(('method', 'options'), [
    ('crd', dict(negatives=10 ** 7)), ('crd', dict(embed_dim=10 ** 5)), ('kd', dict(temperature=1e-9)),
    ('kd', dict(temperature=1e5)), ('at', dict(power=1e3)), ('ofa', dict(stage_eps=math.nan)),
    ('ofa', dict(stage_eps=[1., math.inf, 1., 1.])), ('nd', dict(dropout=1)), ('kdsvd', dict(k=10 ** 6)),
    ('norm', dict(segments=10 ** 6)), ('norm', dict(segments=-1)),
])
def test_a_number_beyond_what_the_pair_can_have_is_named(method: str, options: Any) -> None:
    import torch
    (option,) = options
    with pytest.raises(UsageError, match=f'{method}[.]{option}='):
        create_distill_task(
            'test_efficientnet', 'test_resnet', method, kd_kwargs={method: options}, teacher_pretrained=False,
            num_classes=5, sample_labels=torch.arange(10) % 5, input_size=(3, 32, 32), verbose=False)


@pytest.mark.parametrize('spec', [
    '0:-1', '0:1,5:-0.5', '0:nan', '0:1e999', 'cosine:1:-1', 'cosine:-1:0', 'cosine:nan:0', 'warmup:0', 'warmup:-3',
    'stop:-2', 'stop:0', '-1:1', {0: -1.},
])
def test_no_schedule_makes_a_weight_negative_or_endless(spec: Any) -> None:
    with pytest.raises(UsageError):
        create_weight_schedule(spec, num_epochs=10)


@pytest.mark.parametrize('weights', [
    dict(task_loss_weight=math.nan), dict(task_loss_weight=math.inf), dict(task_loss_weight=-1.),
    dict(distill_loss_weight=math.nan), dict(distill_loss_weight=-1.), dict(kd_weight={'kd': math.nan}),
    dict(kd_weight={'kd': -1}), dict(kd_weight={'kd': math.inf}),
])
def test_no_weight_is_negative_or_endless(weights: Any) -> None:
    with pytest.raises(UsageError, match='weight'):
        create_distill_task(
            'test_efficientnet', 'test_resnet', 'kd', teacher_pretrained=False, num_classes=5,
            input_size=(3, 32, 32), verbose=False, **weights)
