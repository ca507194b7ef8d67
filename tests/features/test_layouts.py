"""Layouts of features, compared with timm's own NCHW intermediates."""
from typing import Any, Dict, Tuple

import pytest
import timm
import torch
import torch.nn as nn

from timm_distill.features.grids import candidate_layouts
from timm_distill.features.layouts import FeatureLayout
from timm_distill.features.stages import resolve_feature_layout

SWIN = dict(img_size=64, window_size=2, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
MODELS = [
    ('test_resnet', {}, 'NCHW'),
    ('test_convnext', {}, 'NCHW'),
    ('swin_tiny_patch4_window7_224', SWIN, 'NHWC'),
    ('test_mambaout', {}, 'NHWC'),
    ('test_vit', dict(img_size=64), 'NLC'),
    ('test_vit', dict(img_size=64, reg_tokens=3), 'NLC'),
    ('test_vit', dict(img_size=64, class_token=False, global_pool='avg'), 'NLC'),
    ('deit_tiny_distilled_patch16_224', dict(img_size=64, embed_dim=24, depth=1, num_heads=2), 'NLC'),
]
IDS = ['resnet', 'convnext', 'swin', 'mambaout', 'vit', 'vit_registers', 'vit_no_class_token', 'deit_distilled']
LAYOUTS = [
    FeatureLayout('NCHW', 6), FeatureLayout('NHWC', 6), FeatureLayout('NLC', 6, 1, (3, 3)),
    FeatureLayout('NCL', 6, 2, (3, 3)),
    FeatureLayout('NC', 6),
]
SHAPES = {'NCHW': (2, 6, 3, 3), 'NHWC': (2, 3, 3, 6), 'NLC': (2, 10, 6), 'NCL': (2, 6, 11), 'NC': (2, 6)}


def final_map(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    kwargs = dict(indices=1, output_fmt='NCHW', intermediates_only=True, norm=True)
    return model.forward_intermediates(x, **kwargs)[-1]


@pytest.mark.parametrize('name,kwargs,fmt', MODELS, ids=IDS)
def test_map_equals_timms_last_intermediate(name: str, kwargs: Dict[str, Any], fmt: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs).eval()
    layout = resolve_feature_layout(model, (3, 64, 64))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        actual = layout.to_map(layout.to_positions(model.forward_features(x)))
        expected = final_map(model, x)
    assert (layout.fmt, layout.channels) == (fmt, model.num_features)
    assert layout.num_prefix_tokens == (getattr(model, 'num_prefix_tokens', 0) if fmt == 'NLC' else 0)
    torch.testing.assert_close(actual, expected, rtol=0., atol=0.)


@pytest.mark.parametrize('size', [(64, 32), (32, 96)])
def test_grid_of_tokens_follows_the_inputs_aspect(size: Tuple[int, int]) -> None:
    model = timm.create_model('test_vit', img_size=size).eval()
    layout = resolve_feature_layout(model, (3, *size))
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        actual = layout.to_map(layout.to_positions(model.forward_features(x)))
        torch.testing.assert_close(actual, final_map(model, x), rtol=0., atol=0.)


@pytest.mark.parametrize('layout', LAYOUTS, ids=lambda layout: layout.fmt)
def test_positions_are_b_c_h_w_and_come_back(layout: FeatureLayout) -> None:
    x = torch.randn(SHAPES[layout.fmt])
    positions = layout.to_positions(x)
    assert positions.ndim == 4 and positions.shape[:2] == (2, 6)
    assert torch.equal(layout.from_positions(positions), x)


@pytest.mark.parametrize('layout', LAYOUTS, ids=lambda layout: layout.fmt)
def test_map_takes_other_channel_counts_and_drops_prefix_tokens(layout: FeatureLayout) -> None:
    positions = layout.to_positions(torch.randn(SHAPES[layout.fmt]))
    expanded = torch.cat([positions, positions], dim=1)
    grid = (1, 1) if layout.fmt == 'NC' else (3, 3)
    assert layout.to_map(expanded).shape == (2, 12, *grid)


@pytest.mark.parametrize('shape', [(2,), (2, 3, 4, 5, 6)])
def test_features_of_other_dimensions_have_no_layout(shape: Tuple[int, ...]) -> None:
    assert candidate_layouts(nn.Identity(), torch.zeros(shape), (32, 32)) == []
