"""What follows a model's stage as a function of it, found by structure and measured."""
import copy
from typing import Any, Dict, Sequence, Tuple

import pytest
import timm
import torch
import torch.nn as nn

from timm_distill import Teacher
from timm_distill.features.inputs import random_images
from timm_distill.features.stages import read_intermediates, resolve_feature_layout, resolve_stages
from timm_distill.features.tail import Tail, find_tail

SIZE = (3, 64, 64)
SWIN = dict(window_size=2, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))
MODELS: Dict[str, Tuple[str, Dict[str, Any]]] = {
    'test_resnet': ('test_resnet', {}),
    'test_convnext': ('test_convnext', {}),
    'test_efficientnet': ('test_efficientnet', {}),
    'test_nfnet': ('test_nfnet', {}),
    'test_byobnet': ('test_byobnet', {}),
    'test_mambaout': ('test_mambaout', {}),
    'test_coatnet': ('test_coatnet', dict(img_size=64)),
    'test_vit': ('test_vit', dict(img_size=64)),
    'test_vit, registers': ('test_vit', dict(img_size=64, reg_tokens=4)),
    'test_vit2': ('test_vit2', dict(img_size=64)),
    'test_vit_relpos': ('test_vit_relpos', dict(img_size=64)),
    'swin': ('swin_tiny_patch4_window7_224', dict(img_size=64, **SWIN)),
    'eva': ('eva02_tiny_patch14_224', dict(img_size=56, embed_dim=48, depth=4, num_heads=2)),
    'beit': ('beit_base_patch16_224', dict(img_size=64, embed_dim=48, depth=4, num_heads=2)),
}


def create_model(name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **kwargs).eval().requires_grad_(False)


def tail_of(model: nn.Module, position: int = -2, size: Sequence[int] = SIZE) -> Tuple[Any, str]:
    return find_tail(model, resolve_stages(model, size)[position], resolve_feature_layout(model, size), size)


def run_both(tail: Tail, model: nn.Module, images: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the stage's own map, what the tail gives for it, and the model's last feature."""
    read = read_intermediates(model, images, [tail.stage], prefix_of=tail.prefix_of)
    layout = tail.output_layout
    expected = layout.to_map(layout.to_positions(model.forward_features(images)))
    return read.stages[0], tail.run(model, read.stages[0], read.prefix), expected


@pytest.mark.parametrize('name', MODELS)
def test_the_stages_own_map_gives_the_models_last_feature_for_any_batch(name: str) -> None:
    model = create_model(MODELS[name][0], **MODELS[name][1])
    size = (3, 56, 56) if name == 'eva' else SIZE
    tail, reason = tail_of(model, size=size)
    assert not reason
    for batch_size in (1, 5):
        images = torch.randn(batch_size, *size, generator=torch.Generator().manual_seed(batch_size))
        _, actual, expected = run_both(tail, model, images)
        assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_every_stage_of_a_pyramid_has_a_tail_that_runs_what_follows_alone() -> None:
    model, ran = create_model('test_resnet'), []
    for name in ('layer1', 'layer2', 'layer3', 'layer4'):
        model.get_submodule(name).register_forward_hook(lambda *args, name=name: ran.append(name))
    images = random_images(model, SIZE)
    for position, names in ((-4, ['layer2', 'layer3', 'layer4']), (-3, ['layer3', 'layer4']), (-2, ['layer4'])):
        tail, reason = tail_of(model, position)
        assert not reason
        map_ = read_intermediates(model, images, [tail.stage]).stages[0]
        ran.clear()
        tail.run(model, map_)
        assert ran == names


def test_it_reads_neither_images_nor_other_maps() -> None:
    model = create_model('swin_tiny_patch4_window7_224', img_size=64, **SWIN)
    tail, _ = tail_of(model)
    own, actual, expected = run_both(tail, model, torch.randn(2, *SIZE))
    assert torch.equal(tail.run(model, own.flip(0)), actual.flip(0))
    assert not torch.allclose(tail.run(model, torch.randn_like(own)), expected)


def test_gradients_reach_the_map_and_nothing_of_the_model() -> None:
    model = create_model('test_vit', img_size=64)
    tail, _ = tail_of(model)
    x = torch.randn(2, *tail.stage.shape, requires_grad=True)
    tail.run(model, x, torch.randn(2, 1, tail.stage.shape[0])).square().mean().backward()
    assert x.grad.abs().min(1).values.max() > 0
    assert all(p.grad is None for p in model.parameters())


def test_layers_that_write_to_their_input_leave_the_callers_map() -> None:
    model = create_model('test_resnet')
    tail, _ = tail_of(model)
    x = torch.randn(2, *tail.stage.shape)
    before = x.clone()
    tail.run(model, x)
    assert torch.equal(x, before)


def test_the_model_itself_stays_as_it_is() -> None:
    model = create_model('test_vit', img_size=64)
    images = random_images(model, SIZE)
    modules, expected = dict(model.named_modules()), model(images)
    tail, _ = tail_of(model)
    run_both(tail, model, images)
    assert dict(model.named_modules()) == modules and torch.equal(model(images), expected)
    assert all('forward' not in module.__dict__ for module in model.modules())


def test_one_tail_serves_copies_in_other_precisions() -> None:
    model = create_model('test_vit', img_size=64)
    tail, _ = tail_of(model)
    exact = copy.deepcopy(model).double()
    _, actual, expected = run_both(tail, exact, torch.randn(2, *SIZE, dtype=torch.float64))
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


class Skipping(nn.Module):
    """A model whose last feature reads more than its last stage but one."""
    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(a, 4, 3, 2, 1) for a in (3, 4, 4))
        self.skip = nn.Conv2d(4, 4, 3, 4, 1)
        self.weight = 1.

    def forward_intermediates(self, x: torch.Tensor, indices: Any = None, **kwargs: Any) -> Any:
        maps = [x]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        maps = maps[1:]
        chosen = maps if indices is None else [maps[i] for i in indices]
        return chosen if kwargs.get('intermediates_only') else (self.forward_features(x), chosen)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        first = self.stages[0](x)
        return self.stages[2](self.stages[1](first)) + self.weight * self.skip(first)


def test_a_last_feature_that_reads_more_than_the_stage_has_no_tail() -> None:
    torch.manual_seed(0)
    model = Skipping().eval()
    layout = resolve_feature_layout(model, SIZE)
    stage = resolve_stages(model, SIZE)[-2]
    model.weight = 1e-3  # a small part of the feature is a part of it
    tail, reason = find_tail(model, stage, layout, SIZE)
    assert tail is None and 'depends on more than the stage' in reason
    model.weight = 0.
    assert find_tail(model, stage, layout, SIZE)[0] is not None


@pytest.mark.parametrize('name, words', [
    ('hrnet_w18_small', 'depends on more than the stage'),
    ('mvitv2_small_cls', 'does not give the class tokens'),
])
@pytest.mark.slow
def test_families_without_one_say_why(name: str, words: str) -> None:
    kwargs = dict(img_size=64) if 'mvit' in name else {}
    tail, reason = tail_of(create_model(name, **kwargs))
    assert tail is None and words in reason


def test_a_teacher_finds_it_after_folding_its_batch_norms() -> None:
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    teacher = Teacher(model, SIZE)
    assert teacher.folded.folded and not teacher.resolve_tail()
    features = teacher(torch.randn(2, *SIZE), frozenset({'stages', 'feature', 'tail'}))
    actual = teacher.run_tail(features.stages[-2], features.prefix)
    assert (actual - features.feature).abs().max() <= 1e-6 * features.feature.abs().max()
