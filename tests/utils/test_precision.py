"""Float32 or better inside of low-precision training."""
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
import torch

from timm_distill import create_adapter
from timm_distill.adapters import Match
from timm_distill.run.device import enable_fast_math
from timm_distill.utils.precision import full_float32, in_full_precision, to_full_precision

LOW = [torch.float16, torch.bfloat16]


@in_full_precision
def product(x: torch.Tensor, others: List[torch.Tensor], factor: float = 1.) -> Tuple[torch.Tensor, float]:
    return x @ others[0].mT, factor


@pytest.mark.parametrize('dtype', [*LOW, torch.float32, torch.float64])
def test_decorated_function_sees_float32_or_better_in_tensors_and_sequences(dtype: torch.dtype) -> None:
    x = torch.randn(3, 4).to(dtype)
    expected = torch.float32 if dtype in LOW else dtype
    assert product(x, [x])[0].dtype == expected
    assert product(x=x, others=(x,), factor=2.)[1] == 2.


@pytest.mark.parametrize('dtype', LOW)
def test_decorated_function_computes_its_products_outside_autocast(dtype: torch.dtype) -> None:
    x = torch.randn(3, 4)
    with torch.autocast('cpu', dtype=dtype):
        assert (x @ x.mT).dtype == dtype
        actual = product(x, [x])[0]
        assert torch.is_autocast_enabled('cpu')
    torch.testing.assert_close(actual, (x.double() @ x.double().mT).float(), rtol=1e-5, atol=1e-6)


def test_decorated_function_keeps_its_name_and_asks_for_a_tensor() -> None:
    assert product.__name__ == 'product'
    with pytest.raises(ValueError, match='no tensor'):
        product(1, [])  # type: ignore[arg-type]


# Settings of the process

NEW = hasattr(torch.backends.cuda.matmul, 'fp32_precision')
needs_new = pytest.mark.skipif(not NEW, reason='torch >= 2.9')
READINGS: Dict[str, Callable[[], Any]] = {
    'matmul precision': torch.get_float32_matmul_precision,
    'cuda matmul flag': lambda: torch.backends.cuda.matmul.allow_tf32,
    'cudnn flag': lambda: torch.backends.cudnn.allow_tf32,
}
PROPERTIES: Dict[str, Callable[[], Any]] = {
    'all': lambda: torch.backends,
    'cudnn': lambda: torch.backends.cudnn,
    'cuda matmul': lambda: torch.backends.cuda.matmul,
    'cudnn conv': lambda: torch.backends.cudnn.conv,
    'mkldnn matmul': lambda: torch.backends.mkldnn.matmul,
    'mkldnn conv': lambda: torch.backends.mkldnn.conv,
}
USED = list(PROPERTIES)[2:]
SETTINGS: Dict[str, Callable[[], None]] = {
    'nothing': lambda: None,
    'cuda matmul flag': lambda: setattr(torch.backends.cuda.matmul, 'allow_tf32', True),
    'cudnn flag off': lambda: setattr(torch.backends.cudnn, 'allow_tf32', False),
    'high': lambda: torch.set_float32_matmul_precision('high'),
    'medium': lambda: torch.set_float32_matmul_precision('medium'),
}
if NEW:
    SETTINGS.update({f'{name} property': lambda name=name: set_property(name, 'tf32') for name in PROPERTIES})


def set_property(name: str, value: str) -> None:
    PROPERTIES[name]().fp32_precision = value


def read_settings() -> Dict[str, Any]:
    """Return all that can be read of the precision of products; torch refuses some where old and new were mixed."""
    values: Dict[str, Any] = {}
    for name, reading in READINGS.items():
        try:
            values[name] = reading()
        except RuntimeError:
            values[name] = 'mixed'
    if NEW:
        values.update({f'{name} property': PROPERTIES[name]().fp32_precision for name in PROPERTIES})
    return values


@pytest.fixture
def settings() -> Iterator[Dict[str, Any]]:
    """Return what can be read, and put everything back that a test sets."""
    before = read_settings()
    try:
        yield before
    finally:
        torch.set_float32_matmul_precision(before['matmul precision'])
        torch.backends.cudnn.allow_tf32 = before['cudnn flag']
        for name in PROPERTIES if NEW else ():
            set_property(name, 'none')
            if PROPERTIES[name]().fp32_precision != before[f'{name} property']:
                set_property(name, before[f'{name} property'])
        assert read_settings() == before


@pytest.mark.parametrize('setting', SETTINGS)
def test_products_are_of_float32_inside_and_as_before_behind(setting: str, settings: Dict[str, Any]) -> None:
    SETTINGS[setting]()
    before = read_settings()
    with full_float32():
        assert_full_float32()
        with full_float32():
            assert_full_float32()
        assert_full_float32()
    assert read_settings() == before
    with pytest.raises(ZeroDivisionError), full_float32():
        raise ZeroDivisionError
    assert read_settings() == before


def assert_full_float32() -> None:
    if NEW:
        assert {PROPERTIES[name]().fp32_precision for name in USED} == {'ieee'}
    else:
        assert [reading() for reading in READINGS.values()] == ['highest', False, False]


@needs_new
@pytest.mark.parametrize('name', USED)
def test_setting_that_follows_the_one_of_all_backends_goes_on_to_do_so(name: str, settings: Dict[str, Any]) -> None:
    for used in USED:
        set_property(used, 'none')
    set_property('all', 'tf32')
    with full_float32():
        pass
    assert PROPERTIES[name]().fp32_precision == 'tf32'
    set_property('all', 'ieee')
    assert PROPERTIES[name]().fp32_precision == 'ieee'


@pytest.mark.parametrize('setting', SETTINGS)
@pytest.mark.parametrize('form', ['direct', 'moments'])
def test_a_step_of_the_transform_keeps_whatever_was_set(form: str, setting: str, settings: Dict[str, Any]) -> None:
    SETTINGS[setting]()
    before = read_settings()
    adapter = create_adapter('norm', 3, 2, segments=2, form=form)
    result = adapter(torch.randn(4, 3, 3, 3), Match(torch.randn(4, 2, 3, 3), lambda positions: positions))
    assert read_settings() == before
    (result.loss + result.output.sum()).backward()
    assert read_settings() == before


@pytest.mark.parametrize('setting', SETTINGS)
def test_fast_math_can_be_enabled_after_any_setting(
        setting: str, settings: Dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', torch.backends.cudnn.benchmark)  # put back behind the test
    SETTINGS[setting]()
    enable_fast_math()
    assert torch.backends.cuda.matmul.allow_tf32
    if NEW:
        assert torch.backends.cuda.matmul.fp32_precision == 'tf32'


@pytest.mark.slow
def test_compiled_function_keeps_whatever_was_set(settings: Dict[str, Any]) -> None:
    torch.compiler.reset()
    SETTINGS['cuda matmul property' if NEW else 'high']()
    before, inside = read_settings(), []

    @torch.compiler.disable
    def note() -> None:
        inside.append(read_settings())

    @in_full_precision
    def function(x: torch.Tensor) -> torch.Tensor:
        note()
        return x @ x.mT

    x = torch.randn(3, 4)
    torch.testing.assert_close(torch.compile(lambda x: function(2 * x), backend='aot_eager')(x), 4 * x @ x.mT)
    assert read_settings() == before
    if NEW:
        assert inside[-1]['cuda matmul property'] == 'ieee'


def test_full_precision_keeps_float32_and_float64_as_they_are() -> None:
    for dtype in (torch.float32, torch.float64, torch.int64):
        x = torch.ones(2, dtype=dtype)
        assert to_full_precision(x) is x
