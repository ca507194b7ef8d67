"""Affine maps and their folding, compared with the layers they stand for."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_distill.utils.affine import (
    AffineMap,
    add_identity,
    batch_norm_affine,
    compose,
    fold_into_weight,
    scale_shift,
    to_float64,
)


def create_map(out_channels: int, in_channels: int) -> AffineMap:
    return AffineMap(
        torch.randn(out_channels, in_channels, dtype=torch.float64), torch.randn(out_channels, dtype=torch.float64))


def create_images(channels: int, size: int = 5) -> torch.Tensor:
    return torch.randn(2, channels, size, size, dtype=torch.float64)


def assert_exact(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_map_is_a_1x1_convolution() -> None:
    affine, x = create_map(3, 4), create_images(4)
    assert_exact(affine(x), F.conv2d(x, affine.weight[:, :, None, None], affine.bias))


def test_compose_applies_the_inner_map_first() -> None:
    outer, inner, x = create_map(2, 3), create_map(3, 4), create_images(4)
    assert_exact(compose(outer, inner)(x), outer(inner(x)))


def test_add_identity_is_a_residual_connection() -> None:
    affine, x = create_map(4, 4), create_images(4)
    assert_exact(add_identity(affine)(x), x + affine(x))


def test_scale_shift_acts_on_the_output() -> None:
    affine, x = create_map(3, 4), create_images(4)
    scale, shift = torch.randn(2, 3, dtype=torch.float64)
    assert_exact(scale_shift(affine, scale, shift)(x), affine(x) * scale[:, None, None] + shift[:, None, None])


@pytest.mark.parametrize('affine', [True, False])
def test_batch_norm_is_its_scale_and_shift_at_inference(affine: bool) -> None:
    norm = nn.BatchNorm2d(4, eps=1e-3, affine=affine).double().eval()
    for name, tensor in norm.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(4) + 0.5 if 'var' in name else torch.randn(4))
    x = create_images(4)
    scale, shift = batch_norm_affine(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    assert_exact(x * scale[:, None, None] + shift[:, None, None], norm(x))


def test_map_folds_into_a_linear_layer() -> None:
    affine, linear, x = create_map(4, 4), nn.Linear(4, 3).double(), torch.randn(2, 4, dtype=torch.float64)
    weight, offset = fold_into_weight(linear.weight, affine)
    assert_exact(weight, linear.weight.detach() @ affine.weight)
    assert_exact(offset, linear.weight.detach() @ affine.bias)
    mapped = x @ affine.weight.T + affine.bias
    assert_exact(F.linear(x, weight, linear.bias.detach() + offset), linear(mapped).detach())


@pytest.mark.parametrize('kernel', [1, 3, (2, 5)])
def test_map_folds_into_an_unpadded_convolution(kernel: object) -> None:
    affine, conv, x = create_map(4, 4), nn.Conv2d(4, 3, kernel).double(), create_images(4)
    weight, offset = fold_into_weight(conv.weight, affine)
    assert weight.shape == conv.weight.shape
    assert_exact(F.conv2d(x, weight, conv.bias.detach() + offset), conv(affine(x)).detach())


def test_fold_leaves_the_weight_alone_and_is_float64() -> None:
    layer = nn.Linear(4, 3).half()
    before = layer.weight.detach().clone()
    weight, offset = fold_into_weight(layer.weight, create_map(4, 4))
    assert weight.dtype == offset.dtype == torch.float64
    assert torch.equal(layer.weight, before)


def test_float64_copy_is_detached() -> None:
    x = torch.randn(3, requires_grad=True)
    assert to_float64(x).dtype == torch.float64 and not to_float64(x).requires_grad
