"""Where an adapter folds away: one test head per kind of consumer, then timm's own."""
from typing import Any, Callable, Dict, List, Tuple

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import freeze_batch_norm_2d
from tiny_models import Plain, TwoScales, WithClassifier, WithoutLinear

from timm_distill import UsageError
from timm_distill.features.classifier import classifier_reads_pre_logits
from timm_distill.features.stages import last_stage_feature, resolve_feature_layout
from timm_distill.student.folding import Consumer, fold_affine
from timm_distill.student.tap import StudentTap
from timm_distill.student.tap_search import resolve_student_tap
from timm_distill.utils.affine import AffineMap, batch_norm_affine

SIZE = (3, 32, 32)
CHANNELS, CLASSES = 6, 5


class TinyNet(nn.Module):
    """A student with a 3x3 last-stage map and any head in front of its classifier `fc`."""

    def __init__(self, width: int = CHANNELS, bias: bool = True, **layers: nn.Module):
        super().__init__()
        self.num_classes = CLASSES
        self.num_features = CHANNELS
        self.stem = nn.Conv2d(3, CHANNELS, 10, stride=11)
        self.head = nn.ModuleDict(layers)
        self.fc = nn.Linear(width, CLASSES, bias=bias)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        for layer in self.head.values():
            x = layer(x)
        return x if pre_logits else self.fc(x)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


class TwoHeads(TinyNet):
    """Two classifiers that share the feature; logits are their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.fc_dist = nn.Linear(CHANNELS, CLASSES)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = x.mean((2, 3))
        return x if pre_logits else (self.fc(x) + self.fc_dist(x)) / 2


def pool() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


AFFINE_HEADS: Dict[str, Tuple[Callable[[], TinyNet], Tuple[Consumer, ...]]] = {
    'linear': (lambda: TinyNet(pool=pool()), (Consumer('fc'),)),
    'dropout': (lambda: TinyNet(pool=pool(), drop=nn.Dropout(0.5)), (Consumer('fc'),)),
    'conv_1x1_after_pool': (
        lambda: TinyNet(
            8, pool=nn.AdaptiveAvgPool2d(1), conv=nn.Conv2d(CHANNELS, 8, 1), act=nn.Hardswish(),
            flat=nn.Flatten()),
        (Consumer('head.conv'),)),
    'conv_k_x_k': (
        lambda: TinyNet(8, conv=nn.Conv2d(CHANNELS, 8, 3), act=nn.ReLU(), pool=pool()), (Consumer('head.conv'),)),
    'batch_norm_before_classifier': (
        lambda: TinyNet(pool=pool(), norm=nn.BatchNorm1d(CHANNELS)), (Consumer('fc', pre_norm='head.norm'),)),
    'batch_norm_before_bias_free_conv_and_batch_norm': (
        lambda: TinyNet(
            8, n1=nn.BatchNorm2d(CHANNELS), conv=nn.Conv2d(CHANNELS, 8, 1, bias=False),
            n2=nn.BatchNorm2d(8), act=nn.ReLU(), pool=pool()),
        (Consumer('head.conv', pre_norm='head.n1', post_norm='head.n2'),)),
    'conv_without_bias_and_batch_norm_behind': (
        lambda: TinyNet(
            8, pool=nn.AdaptiveAvgPool2d(1), conv=nn.Conv2d(CHANNELS, 8, 1, bias=False),
            norm=nn.BatchNorm2d(8), act=nn.ReLU(), flat=nn.Flatten()),
        (Consumer('head.conv', post_norm='head.norm'),)),
    'bias_free_conv': (
        lambda: TinyNet(8, conv=nn.Conv2d(CHANNELS, 8, 1, bias=False), act=nn.ReLU(), pool=pool()),
        (Consumer('head.conv', offset=False),)),
    'bias_free_classifier': (lambda: TinyNet(bias=False, pool=pool()), (Consumer('fc', offset=False),)),
    'two_heads': (TwoHeads, (Consumer('fc'), Consumer('fc_dist'))),
}


def create_net(factory: Callable[[], nn.Module]) -> nn.Module:
    """Create a net in float64 none of whose tensors is at its initial value."""
    torch.manual_seed(0)
    net = factory().double().eval()
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if 'var' in name else torch.randn_like(tensor) / 2)
    return net


def random_map(channels: int, offset: bool = True) -> AffineMap:
    bias = torch.randn(channels, dtype=torch.float64)
    return AffineMap(torch.randn(channels, channels, dtype=torch.float64), bias if offset else torch.zeros_like(bias))


def tensors_of(net: nn.Module) -> Dict[str, torch.Tensor]:
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


@torch.no_grad()
def fold_error(net: nn.Module, tap: StudentTap, size: Tuple[int, ...] = SIZE) -> float:
    """Return the logit difference between a random map at each site and the maps folded into a strict copy."""
    x = torch.randn(2, *size, dtype=torch.float64)
    feature = net.forward_features(x)
    if tap.point == 'pre_logits':
        feature = net.forward_head(feature, pre_logits=True)
    head = net.forward_head if tap.point == 'features' else net.get_classifier()
    mapped, folded = [], {}
    for site, tensor in zip(tap.sites, tap.read(feature)):
        affine = random_map(site.layout.channels, site.offset)
        mapped.append(site.layout.from_positions(affine(site.layout.to_positions(tensor))))
        folded.update(fold_affine(net, tensors_of(net), site.consumers, affine))
    expected = first(head(tap.write(feature, mapped)))
    net.load_state_dict({**net.state_dict(), **folded})
    return ((first(net(x)) - expected).abs().max() / expected.std()).item()


def first(logits: Any) -> torch.Tensor:
    return logits[0] if isinstance(logits, (tuple, list)) else logits


@pytest.mark.parametrize('kind', AFFINE_HEADS)
def test_every_kind_of_consumer_takes_the_map_exactly(kind: str) -> None:
    factory, consumers = AFFINE_HEADS[kind]
    net = create_net(factory)
    tap = resolve_student_tap(net, SIZE)
    assert (tap.point, tap.consumers, tap.shape, tap.rejected) == ('features', consumers, (CHANNELS, 3, 3), '')
    assert fold_error(net, tap) < 1e-10


@pytest.mark.parametrize('when', ['before', 'after'])
@pytest.mark.parametrize('kind', [
    'batch_norm_before_bias_free_conv_and_batch_norm', 'conv_without_bias_and_batch_norm_behind'])
def test_frozen_batch_norms_take_the_map_like_others(kind: str, when: str) -> None:
    factory, consumers = AFFINE_HEADS[kind]
    net = create_net(factory)
    if when == 'before':
        net = freeze_batch_norm_2d(net)
    tap = resolve_student_tap(net, SIZE)
    assert (tap.point, tap.consumers) == ('features', consumers)
    assert fold_error(freeze_batch_norm_2d(net), tap) < 1e-10


def test_linear_consumer_becomes_w_m_and_b_plus_w_c() -> None:
    net, affine = create_net(AFFINE_HEADS['linear'][0]), random_map(CHANNELS)
    changed = fold_affine(net, tensors_of(net), [Consumer('fc')], affine)
    assert set(changed) == {'fc.weight', 'fc.bias'}
    weight, bias = net.fc.weight.detach(), net.fc.bias.detach()
    torch.testing.assert_close(changed['fc.weight'], weight @ affine.weight)
    torch.testing.assert_close(changed['fc.bias'], bias + weight @ affine.bias)


def test_k_x_k_consumer_is_multiplied_at_every_offset() -> None:
    net, affine = create_net(AFFINE_HEADS['conv_k_x_k'][0]), random_map(CHANNELS)
    changed = fold_affine(net, tensors_of(net), [Consumer('head.conv')], affine)
    weight = net.get_parameter('head.conv.weight').detach()
    for row in range(3):
        for column in range(3):
            torch.testing.assert_close(
                changed['head.conv.weight'][:, :, row, column], weight[:, :, row, column] @ affine.weight)
    torch.testing.assert_close(
        changed['head.conv.bias'], net.get_parameter('head.conv.bias').detach() + weight.sum((2, 3)) @ affine.bias)


def test_batch_norm_before_the_consumer_becomes_the_identity() -> None:
    net, affine = create_net(AFFINE_HEADS['batch_norm_before_classifier'][0]), random_map(CHANNELS)
    changed = fold_affine(net, tensors_of(net), [Consumer('fc', pre_norm='head.norm')], affine)
    norm = net.get_submodule('head.norm')
    scale, shift = batch_norm_affine(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    weight = net.get_parameter('fc.weight').detach()
    torch.testing.assert_close(changed['fc.weight'], weight @ torch.diag(scale) @ affine.weight)
    torch.testing.assert_close(
        changed['fc.bias'], net.get_parameter('fc.bias').detach() + weight @ (scale * affine.bias + shift))
    new = [changed[f'head.norm.{key}'] for key in ('running_mean', 'running_var', 'weight', 'bias')]
    scale, shift = batch_norm_affine(*new, norm.eps)
    torch.testing.assert_close(scale, torch.ones_like(scale))
    assert (shift == 0).all()


def test_offset_of_a_bias_free_consumer_goes_into_the_mean_behind_it() -> None:
    net, affine = create_net(AFFINE_HEADS['conv_without_bias_and_batch_norm_behind'][0]), random_map(CHANNELS)
    changed = fold_affine(net, tensors_of(net), [Consumer('head.conv', post_norm='head.norm')], affine)
    assert set(changed) == {'head.conv.weight', 'head.norm.running_mean'}
    offset = net.get_parameter('head.conv.weight').detach()[:, :, 0, 0] @ affine.bias
    torch.testing.assert_close(
        changed['head.norm.running_mean'], net.get_buffer('head.norm.running_mean') - offset)


def test_fold_leaves_the_model_alone() -> None:
    net = create_net(AFFINE_HEADS['batch_norm_before_classifier'][0])
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    fold_affine(net, tensors_of(net), [Consumer('fc', pre_norm='head.norm')], random_map(CHANNELS))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


NONLINEAR_HEADS: Dict[str, Callable[[], TinyNet]] = {
    'relu': lambda: TinyNet(act=nn.ReLU(), pool=pool()),
    'max_pool': lambda: TinyNet(pool=nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())),
    'layer_norm': lambda: TinyNet(pool=pool(), norm=nn.LayerNorm(CHANNELS)),
    'padded_conv': lambda: TinyNet(8, conv=nn.Conv2d(CHANNELS, 8, 3, padding=1), act=nn.ReLU(), pool=pool()),
}


@pytest.mark.parametrize('kind', NONLINEAR_HEADS)
def test_head_that_does_not_commute_falls_to_pre_logits(kind: str) -> None:
    net = create_net(NONLINEAR_HEADS[kind])
    tap = resolve_student_tap(net, SIZE)
    assert (tap.point, tap.consumers) == ('pre_logits', (Consumer('fc'),))
    assert 'not at features' in tap.rejected
    assert fold_error(net, tap) < 1e-10


@pytest.mark.parametrize('kind', NONLINEAR_HEADS)
def test_forcing_features_on_such_a_head_is_refused_with_the_reason(kind: str) -> None:
    with pytest.raises(UsageError) as error:
        resolve_student_tap(create_net(NONLINEAR_HEADS[kind]), SIZE, 'features')
    assert 'not at features: ' in str(error.value) and 'TinyNet' in str(error.value)
    assert 'pre_logits' not in str(error.value)


@pytest.mark.parametrize('kind', ['linear', 'conv_k_x_k', 'relu'])
def test_pre_logits_can_be_forced(kind: str) -> None:
    net = create_net({**NONLINEAR_HEADS, **{k: v[0] for k, v in AFFINE_HEADS.items()}}[kind])
    tap = resolve_student_tap(net, SIZE, 'pre_logits')
    assert (tap.point, tap.layout.fmt, tap.rejected) == ('pre_logits', 'NC', '')
    assert fold_error(net, tap) < 1e-10


@pytest.mark.parametrize('kind', ['relu', 'layer_norm'])
@pytest.mark.parametrize('value', [0., 1.])
def test_zero_or_constant_classifier_is_not_accepted_blindly(kind: str, value: float) -> None:
    net = create_net(NONLINEAR_HEADS[kind])
    nn.init.constant_(net.get_parameter('fc.weight'), value)
    nn.init.zeros_(net.get_parameter('fc.bias'))
    assert resolve_student_tap(net, SIZE).point == 'pre_logits'


def test_gate_that_is_zero_at_initialisation_does_not_hide_what_does_not_fold() -> None:
    class GatedHead(TinyNet):
        """A head with a nonlinear branch that is off at initialisation."""

        def __init__(self) -> None:
            super().__init__(pool=pool())
            self.gate = nn.Parameter(torch.zeros(CLASSES, CHANNELS))

        def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
            x = x.mean((2, 3))
            return x if pre_logits else self.fc(x) + nn.functional.linear(x.square(), self.gate)

    with pytest.raises(UsageError, match='not at features: '):
        resolve_student_tap(GatedHead().eval(), SIZE, 'features')


class EarlyPreLogits(TinyNet):
    """A head whose pre-logits are not yet what the classifier reads."""

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x.tanh())


def test_pre_logits_that_the_classifier_does_not_read_are_not_mistaken_for_its_input() -> None:
    tap = resolve_student_tap(EarlyPreLogits().eval(), SIZE)
    assert (tap.point, tap.inside, tap.consumers) == ('pre_logits', 'fc', (Consumer('fc'),))


@pytest.mark.parametrize('factory', [EarlyPreLogits, Plain, WithClassifier])
def test_classifier_that_starts_at_zero_is_tapped_inside_all_the_same(factory: Callable[[], nn.Module]) -> None:
    net = factory().eval()
    nn.init.zeros_(net.get_parameter('fc.weight'))
    nn.init.zeros_(net.get_parameter('fc.bias'))
    assert resolve_student_tap(net, SIZE).inside == 'fc'


def test_classifier_with_a_norm_in_front_of_its_linear_layer_is_tapped_behind_the_norm() -> None:
    class NormClassifier(TinyNet):
        """A classifier that is a norm and a linear layer."""

        def __init__(self) -> None:
            super().__init__(pool=pool())
            self.fc = nn.Sequential(nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, CLASSES))

    tap = resolve_student_tap(NormClassifier().eval(), SIZE)
    assert (tap.point, tap.inside) == ('pre_logits', 'fc.1')


# Several tensors, a map on the side, classifiers inside a forward

def test_every_tensor_of_a_list_that_a_head_reads_is_a_site() -> None:
    net = create_net(TwoScales)
    tap = resolve_student_tap(net, SIZE)
    assert [(site.index, site.shape, site.consumers) for site in tap.sites] == [
        (0, (4, 8, 8), (Consumer('fc.0'),)), (1, (CHANNELS, 3, 3), (Consumer('fc.1'),))]
    assert fold_error(net, tap) < 1e-10


def test_tensor_of_a_list_that_no_linear_layer_reads_is_no_site() -> None:
    class SkipsFine(TwoScales):
        """A head that reads the second branch through its linear layer alone."""

        def forward_head(self, x: Any, pre_logits: bool = False) -> torch.Tensor:
            return self.fc[1](x[1].mean((2, 3))) + x[0].mean((1, 2, 3)).square()[:, None]

    net = create_net(SkipsFine)
    tap = resolve_student_tap(net, SIZE)
    assert [site.index for site in tap.sites] == [1]
    assert fold_error(net, tap) < 1e-10


def test_feature_is_read_and_written_at_the_sites_alone() -> None:
    net = create_net(TwoScales)
    tap = resolve_student_tap(net, SIZE)
    feature = net.forward_features(torch.randn(2, *SIZE, dtype=torch.float64))
    new = [torch.zeros_like(tensor) for tensor in tap.read(feature)]
    written = tap.write((*feature, 'kept'), new)
    assert written[0] is new[0] and written[1] is new[1] and written[2] == 'kept' and isinstance(written, tuple)


def test_crossvits_branches_have_a_site_each() -> None:
    net = timm.create_model(
        'crossvit_tiny_240', num_classes=CLASSES, img_size=48, img_scale=(1., 1.), patch_size=(12, 16),
        embed_dim=(24, 48), depth=((1, 1, 0),), num_heads=(2, 2), mlp_ratio=(1., 1., 1.)).double().eval()
    tap = resolve_student_tap(net, (3, 48, 48))
    assert [(s.index, s.layout.fmt, s.layout.num_prefix_tokens, s.shape[1]) for s in tap.sites] == [
        (0, 'NLC', 1, 24), (1, 'NLC', 1, 48)]
    assert [c.linear for c in tap.consumers] == ['head.0', 'head.1']
    assert fold_error(net, tap, (3, 48, 48)) < 1e-9


@pytest.mark.parametrize('factory', [TwoHeads, lambda: TinyNet(act=nn.ReLU(), pool=pool())])
def test_side_tap_is_the_map_of_any_model_and_has_no_consumer(factory: Callable[[], nn.Module]) -> None:
    tap = resolve_student_tap(create_net(factory), SIZE, 'side')
    assert (tap.point, tap.shape, tap.layout.fmt, tap.consumers) == ('side', (CHANNELS, 3, 3), 'NCHW', ())
    assert 'for the loss alone' in str(tap)


def test_side_tap_is_never_chosen_by_itself() -> None:
    with pytest.raises(UsageError, match='--kd-tap side'):
        resolve_student_tap(WithoutLinear().eval(), SIZE)


def test_side_tap_of_a_list_is_its_last_tensor() -> None:
    tap = resolve_student_tap(create_net(TwoScales), SIZE, 'side')
    assert [(site.index, site.shape) for site in tap.sites] == [(1, (CHANNELS, 3, 3))]


@pytest.mark.parametrize('factory', [Plain, WithClassifier])
@pytest.mark.parametrize('point', ['auto', 'pre_logits'])
def test_classifier_of_a_model_with_a_forward_alone_is_tapped_inside(
        factory: Callable[[], nn.Module], point: str) -> None:
    tap = resolve_student_tap(create_net(factory), SIZE, point)
    assert (tap.point, tap.inside, tap.shape, tap.consumers) == ('pre_logits', 'fc', (CHANNELS,), (Consumer('fc'),))


@pytest.mark.parametrize('point', ['features', 'side'])
def test_map_of_a_model_with_a_forward_alone_is_refused_with_the_reason(point: str) -> None:
    with pytest.raises(UsageError, match=rf'not at {point}: the model has no forward_features'):
        resolve_student_tap(Plain().eval(), SIZE, point)


def test_linear_layer_of_a_sequence_is_tapped_inside() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2)).double()
    assert resolve_student_tap(net, SIZE).inside == '1'


def test_classifier_that_runs_twice_is_refused() -> None:
    class Twice(Plain):
        """A classifier that reads two inputs."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            feature = self.run_stem(x)
            return self.fc(feature.mean((2, 3))) + self.fc(feature.amax((2, 3)))

    with pytest.raises(UsageError, match='fc is not run once'):
        resolve_student_tap(Twice().eval(), SIZE)


# Error texts

def test_student_that_no_tap_fits_is_named_with_every_reason() -> None:
    with pytest.raises(UsageError) as error:
        resolve_student_tap(WithoutLinear().eval(), SIZE)
    for part in ('WithoutLinear', 'not at features: ', 'not at pre_logits: ', '--student', '--kd-tap side', '--kd'):
        assert part in str(error.value)


def test_features_without_a_tensor_are_refused() -> None:
    with pytest.raises(UsageError, match='without tensors'):
        last_stage_feature([], nn.Linear(2, 2))


@pytest.mark.parametrize('name', ['test_vit', 'test_resnet', 'test_convnext', 'test_efficientnet'])
def test_adapter_of_a_model_without_a_classifier_has_nothing_to_fold_into_and_is_beside_it(name: str) -> None:
    model = timm.create_model(name, num_classes=0)
    tap = resolve_student_tap(model, SIZE)
    assert tap.point == 'side' and not tap.consumers and 'not at features' in tap.rejected
    with pytest.raises(UsageError, match='not at pre_logits: the model has no classifier'):
        resolve_student_tap(model, SIZE, 'pre_logits')


@pytest.mark.parametrize('name', ['mobilenetv3_small_050', 'mobilenetv4_conv_small', 'ghostnet_050'])
def test_adapter_of_a_model_without_a_classifier_folds_into_the_layer_behind_the_last_feature(name: str) -> None:
    tap = resolve_student_tap(timm.create_model(name, num_classes=0), SIZE)
    assert tap.point == 'features' and 'conv_head' in str(tap) and tap.error < 1e-9


def test_unknown_tap_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match='--kd-tap takes: auto, features, pre_logits, side'):
        resolve_student_tap(create_net(AFFINE_HEADS['linear'][0]), SIZE, 'logits')


@pytest.mark.parametrize('factory', [
    AFFINE_HEADS['dropout'][0], AFFINE_HEADS['batch_norm_before_classifier'][0], NONLINEAR_HEADS['relu'],
    lambda: timm.create_model('test_efficientnet', num_classes=CLASSES, drop_rate=0.5, drop_path_rate=0.5),
])
def test_building_a_tap_leaves_random_state_modes_and_tensors_untouched(factory: Callable[[], nn.Module]) -> None:
    net = factory().train()
    next(net.children()).eval()
    modes = [module.training for module in net.modules()]
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    hooks = sum(len(module._forward_pre_hooks) for module in net.modules())
    random_state = torch.get_rng_state()
    resolve_student_tap(net, SIZE)
    resolve_feature_layout(net, SIZE)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert sum(len(module._forward_pre_hooks) for module in net.modules()) == hooks


TIMM_STUDENTS: List[Tuple[str, Dict[str, Any], str, List[str]]] = [
    ('test_resnet', {}, 'features', ['fc']),
    ('test_efficientnet', dict(drop_rate=0.3), 'features', ['classifier']),
    ('test_vit', dict(img_size=32), 'features', ['head']),
    ('test_convnext', {}, 'pre_logits', ['head.fc']),
    ('mobilenetv3_small_050', {}, 'features', ['conv_head']),
    ('swin_tiny_patch4_window7_224', dict(
        img_size=32, window_size=1, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)), 'features',
     ['head.fc']),
    (
        'deit_tiny_distilled_patch16_224', dict(img_size=32, embed_dim=24, depth=1, num_heads=2), 'features',
        ['head', 'head_dist']),
]


@pytest.mark.parametrize('name,kwargs,point,consumers', TIMM_STUDENTS, ids=[s[0] for s in TIMM_STUDENTS])
def test_timm_students_fold_at_the_expected_point(
        name: str, kwargs: Dict[str, Any], point: str, consumers: List[str]) -> None:
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=CLASSES, **kwargs).double().eval()
    tap = resolve_student_tap(net, SIZE)
    assert (tap.point, [c.linear for c in tap.consumers]) == (point, consumers)
    assert fold_error(net, tap) < 1e-9


def test_levit_folds_into_a_classifier_that_begins_with_a_batch_norm() -> None:
    net = timm.create_model('levit_128s', num_classes=CLASSES, img_size=64).double().eval()
    tap = resolve_student_tap(net, (3, 64, 64))
    assert tap.point == 'features' and all(c.pre_norm for c in tap.consumers)
    assert fold_error(net, tap, (3, 64, 64)) < 1e-9


def test_tap_says_in_one_line_what_it_is() -> None:
    text = str(resolve_student_tap(create_net(NONLINEAR_HEADS['relu']), SIZE))
    for part in ('pre_logits', '[6]', 'NC', 'folds into fc', 'measured error', 'not at features'):
        assert part in text
    assert '\n' not in text


def test_whether_the_classifier_reads_pre_logits_is_measured() -> None:
    net, two = create_net(AFFINE_HEADS['linear'][0]), create_net(TwoHeads)
    feature = torch.randn(2, CHANNELS, 3, 3, dtype=torch.float64)
    assert classifier_reads_pre_logits(net, feature)
    assert not classifier_reads_pre_logits(two, feature)
