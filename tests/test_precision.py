"""Float32 or better inside of low-precision training."""
from typing import List, Tuple

import pytest
import torch

from timm_distill.precision import full_float32, in_full_precision, to_full_precision

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


def test_tf32_is_off_inside_and_as_before_afterwards() -> None:
    flags = torch.backends.cuda.matmul
    before = flags.allow_tf32
    try:
        for setting in (True, False):
            flags.allow_tf32 = setting
            with full_float32():
                assert not flags.allow_tf32
            assert flags.allow_tf32 == setting
    finally:
        flags.allow_tf32 = before


def test_full_precision_keeps_float32_and_float64_as_they_are() -> None:
    for dtype in (torch.float32, torch.float64, torch.int64):
        x = torch.ones(2, dtype=dtype)
        assert to_full_precision(x) is x
