"""The CIFAR networks: sizes of the papers' code, timm's whole interface, and NORM's tap in each."""
import json
from pathlib import Path
from typing import Dict, List

import pytest
import timm
import torch
import torch.nn as nn

import timm_distill  # noqa: F401
from timm_distill.student.tap_search import resolve_student_tap

SHARED = Path(__file__).resolve().parents[3] / 'shared' / 'cifar_networks.json'
NAMES = timm.list_models('cifar_*')
# The papers' code spells them otherwise.
THEIR_NAMES = {
    'cifar_resnet50': 'ResNet50', 'cifar_mobilenetv2': 'MobileNetV2', 'cifar_shufflenetv1': 'ShuffleV1',
    'cifar_shufflenetv2': 'ShuffleV2',
}
PARAMETERS = {
    'cifar_resnet8': 83892, 'cifar_resnet20': 278324, 'cifar_resnet32x4': 7433860, 'cifar_resnet50': 23705252,
    'cifar_wrn_40_2': 2255156, 'cifar_wrn_16_1': 180916, 'cifar_vgg8': 3965028, 'cifar_vgg19': 20086692,
    'cifar_mobilenetv2': 812836, 'cifar_shufflenetv1': 949258, 'cifar_shufflenetv2': 1355528,
}


def count_multiply_adds(model: nn.Module, images: torch.Tensor) -> int:
    """Return the multiply-adds of convolutions and linear layers for one image."""
    counts: List[int] = []

    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        counts.append(output[0].numel() * module.weight[0].numel())

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    model(images)
    for handle in handles:
        handle.remove()
    return sum(counts)


@pytest.fixture(scope='module')
def official() -> Dict[str, dict]:
    if not SHARED.exists():
        pytest.skip('the sizes of the papers\' networks are not beside the project')
    return json.loads(SHARED.read_text())['networks']


@pytest.mark.parametrize('name, parameters', PARAMETERS.items())
def test_parameter_count_is_the_papers(name: str, parameters: int) -> None:
    with torch.device('meta'):
        assert sum(p.numel() for p in timm.create_model(name).parameters()) == parameters


@pytest.mark.parametrize('name', NAMES)
def test_sizes_agree_with_the_papers_code_to_the_digit(name: str, official: Dict[str, dict]) -> None:
    sizes = official[THEIR_NAMES.get(name, name.replace('cifar_', ''))]
    model = timm.create_model(name).to('meta').eval()
    images = torch.zeros(1, 3, 32, 32, device='meta')
    assert sum(p.numel() for p in model.parameters()) == sizes['parameters']
    assert count_multiply_adds(model, images) == sizes['multiply_adds']
    stages = model.forward_intermediates(images, intermediates_only=True)
    assert [list(x.shape[1:]) for x in stages] == sizes['stages']
    assert [info['num_chs'] for info in model.feature_info] == [shape[0] for shape in sizes['stages']]
    assert [32 // info['reduction'] for info in model.feature_info] == [shape[1] for shape in sizes['stages']]
    pre_logits = model.forward_head(model.forward_features(images), pre_logits=True)
    assert list(pre_logits.shape[1:]) == sizes['pre_logits']


def test_every_network_of_the_papers_is_registered(official: Dict[str, dict]) -> None:
    ours = {THEIR_NAMES.get(name, name.replace('cifar_', '')) for name in NAMES}
    assert set(official) - ours == {'ResNet18'}  # in no table of the papers


@pytest.mark.parametrize('name', NAMES)
def test_norm_keeps_the_map_of_the_student(name: str) -> None:
    tap = resolve_student_tap(timm.create_model(name), (3, 32, 32))
    assert tap.point == 'features' and len(tap.sites) == 1


@pytest.mark.parametrize('name', NAMES)
def test_network_has_the_interface_of_timm(name: str) -> None:
    model = timm.create_model(name, num_classes=7, in_chans=1, drop_rate=0.1).eval()
    images = torch.randn(2, 1, 32, 32)
    features = model.forward_features(images)
    assert features.shape[1] == model.num_features
    assert model.forward_head(features).shape == (2, 7)
    last, stages = model.forward_intermediates(images)
    torch.testing.assert_close(last, features)
    with_norm = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
    assert with_norm[0].shape == stages[-1].shape
    assert len(model.forward_intermediates(images, indices=[0, 1], stop_early=True, intermediates_only=True)) == 2
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.forward_features(images), features)
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features)
    model.reset_classifier(5)
    assert model(images).shape == (2, 5) and model.get_classifier().out_features == 5
    model.reset_classifier(0, '')
    assert model(images).shape == features.shape


@pytest.mark.parametrize('name', NAMES)
def test_network_is_a_backbone_with_all_its_stages(name: str) -> None:
    model = timm.create_model(name)
    backbone = timm.create_model(name, features_only=True)
    maps = backbone(torch.randn(1, 3, 64, 64))
    assert [x.shape[1] for x in maps] == [info['num_chs'] for info in model.feature_info]
    assert backbone.feature_info.channels() == [x.shape[1] for x in maps]
    if 'vgg' in name:
        assert [x.shape[2] for x in maps] == [64, 32, 16, 8, 4]  # the papers pool once more at 64 px
    else:
        assert [64 // x.shape[2] for x in maps] == backbone.feature_info.reduction()


@pytest.mark.parametrize('name', NAMES)
def test_layers_have_decreasing_learning_rates(name: str) -> None:
    from timm.optim import param_groups_layer_decay
    with torch.device('meta'):
        model = timm.create_model(name)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scales = [group['lr_scale'] for group in groups]
    assert max(scales) == 1. and min(scales) < 0.2
    assert sum(len(group['params']) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize('name', ['cifar_resnet20', 'cifar_wrn_16_1', 'cifar_vgg8', 'cifar_mobilenetv2'])
def test_pruning_keeps_what_the_stages_need(name: str) -> None:
    model = timm.create_model(name).eval()
    images = torch.randn(1, 3, 32, 32)
    expected = model.forward_intermediates(images, indices=[1], intermediates_only=True)
    assert model.prune_intermediate_layers([1]) == [1]
    actual = model.forward_intermediates(images, indices=[1], intermediates_only=True)
    torch.testing.assert_close(actual, expected)
    assert len(model.stages) == 1
