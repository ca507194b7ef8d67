"""Promises of folding batch norms: nothing that is read of the model changes, and only what folds is touched."""
import copy
import logging
from typing import Any, Callable, Dict, List, Sequence, Set

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, Conv2dSame, FrozenBatchNormAct2d, ScaledStdConv2d, StdConv2d

from timm_distill.features.inputs import evaluation_mode
from timm_distill.features.tracing import output_error
from timm_distill.teacher import fold as folding
from timm_distill.teacher import fold_pairs
from timm_distill.teacher.fold import fold_batch_norms, settle_batch_norms
from timm_distill.teacher.fold_pairs import Pair, find_pairs
from timm_distill.utils.batch_norm import is_batch_norm

SIZE = (3, 16, 16)


class Chain(nn.Module):
    """Modules one after the other."""

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.body = nn.Sequential(*modules)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class Wired(nn.Module):
    """A first pair that folds, then `conv` and `norm`, which each test wires in its own way."""

    def __init__(self, wire: Callable[['Wired', torch.Tensor], torch.Tensor]):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.wire = wire

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wire(self, self.first(x))


class Tokens(nn.Module):
    """A linear layer on tokens whose batch norm sees them as one long batch, as LeViT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x.flatten(2).transpose(1, 2))
        return self.norm(x.flatten(0, 1)).reshape_as(x)


def read_output(model: nn.Module, images: torch.Tensor) -> Sequence[torch.Tensor]:
    return [model(images)]


def settled(model: nn.Module) -> nn.Module:
    """Return a model in eval mode whose batch norms do something."""
    with evaluation_mode(model):
        settle_batch_norms(model, torch.randn(4, *SIZE))
    return model.eval()


@torch.no_grad()
def fold(model: nn.Module, **kwargs: Any) -> Any:
    """Fold a model and check that its float32 output stays; return the report."""
    images = torch.randn(2, *SIZE)
    expected = settled(model)(images)
    report = fold_batch_norms(model, SIZE, kwargs.get('read', read_output))
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    return report


def norms_of(model: nn.Module) -> List[str]:
    return [name for name, module in model.named_modules() if is_batch_norm(module)]


FOLDS: Dict[str, Callable[[], nn.Module]] = {
    'convolution': lambda: Chain(nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=2), nn.BatchNorm2d(4)),
    'without bias': lambda: Chain(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)),
    'groups': lambda: Chain(nn.Conv2d(3, 6, 3, groups=3, bias=False), nn.BatchNorm2d(6)),
    'padding at run time': lambda: Chain(Conv2dSame(3, 4, 3, stride=2), nn.BatchNorm2d(4)),
    'norm without weight': lambda: Chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)),
    'synchronised norm': lambda: Chain(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4)),
    'norm with activation': lambda: Chain(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, act_layer='silu')),
    'norm with drop and activation': lambda: Chain(
        nn.Conv2d(3, 4, 3), BatchNormAct2d(4, drop_layer=nn.Dropout, act_layer='relu')),
    'frozen norm': lambda: Chain(nn.Conv2d(3, 4, 3), FrozenBatchNormAct2d(4)),
    'one dimension': lambda: Chain(nn.Flatten(2), nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)),
    'three dimensions': lambda: Chain(nn.Unflatten(2, (2, 8)), nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4)),
    'vectors': lambda: Chain(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4), nn.BatchNorm1d(4)),
    'tokens': Tokens,
}


@pytest.mark.parametrize('kind', FOLDS)
def test_batch_norm_behind_a_linear_layer_is_folded(kind: str) -> None:
    model = FOLDS[kind]()
    report = fold(model)
    assert (report.norms, report.folded) == (1, 1) and report.error < 1e-12
    assert norms_of(model) == []
    layer = next(m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)))
    assert layer.bias is not None and not layer.weight.requires_grad


def test_what_a_norm_does_after_its_affine_map_stays() -> None:
    model = FOLDS['norm with drop and activation']()
    fold(model)
    assert [type(m) for m in model.body[1]] == [nn.Dropout, nn.ReLU]


def conv_is_added(model: Wired, x: torch.Tensor) -> torch.Tensor:
    x = model.conv(x)
    return model.norm(x) + x


def conv_runs_twice(model: Wired, x: torch.Tensor) -> torch.Tensor:
    return model.norm(model.conv(model.conv(x)))


def norm_runs_twice(model: Wired, x: torch.Tensor) -> torch.Tensor:
    return model.norm(model.norm(model.conv(x)).relu())


def norm_reads_an_activation(model: Wired, x: torch.Tensor) -> torch.Tensor:
    return model.norm(model.conv(x).relu())


def conv_is_scaled_in_place(model: Wired, x: torch.Tensor) -> torch.Tensor:
    return model.norm(model.conv(x).mul_(2.))


def norm_reads_a_sum(model: Wired, x: torch.Tensor) -> torch.Tensor:
    return model.norm(model.conv(x) + x)


def norm_reads_other_channels(model: Wired, x: torch.Tensor) -> torch.Tensor:
    return model.norm(model.conv(x).transpose(1, 2)[:, :4].contiguous())


def norm_reads_a_view_of_other_channels(model: Wired, x: torch.Tensor) -> torch.Tensor:
    return model.norm(model.conv(x[:, :, :4, :4]).transpose(1, 2))


def weight_is_read_too(model: Wired, x: torch.Tensor) -> torch.Tensor:
    return model.norm(model.conv(x)) * model.conv.weight.mean()


@pytest.mark.parametrize('wire', [
    conv_is_added, conv_runs_twice, norm_runs_twice, norm_reads_an_activation, conv_is_scaled_in_place,
    norm_reads_a_sum, norm_reads_other_channels, norm_reads_a_view_of_other_channels, weight_is_read_too,
])
def test_batch_norm_that_does_not_fold_stays_and_the_others_go(wire: Callable[..., torch.Tensor]) -> None:
    model = Wired(wire)
    report = fold(model)
    assert (report.norms, report.folded) == (2, 1)
    assert norms_of(model) == ['norm']


@pytest.mark.parametrize('conv', [StdConv2d, ScaledStdConv2d])
def test_layer_that_standardises_its_weight_is_left_alone(conv: Callable[..., nn.Module]) -> None:
    model = Chain(conv(3, 4, 3), nn.BatchNorm2d(4))
    assert fold(model).folded == 0 and norms_of(model) == ['body.1']


@pytest.mark.parametrize('parametrize', [
    nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_layer_with_a_parametrised_weight_is_left_alone(parametrize: Callable[[nn.Module], nn.Module]) -> None:
    model = Chain(parametrize(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))
    assert fold(model).folded == 0


def test_pair_whose_inside_is_read_is_dropped_and_the_others_are_kept() -> None:
    model = Chain(*(m for i in range(4) for m in (nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))))

    def _read(model: nn.Module, images: torch.Tensor) -> Sequence[torch.Tensor]:
        inside = model.body[:5](images)  # the third convolution without its norm
        return [inside, model(images)]

    report = fold(model, read=_read)
    assert (report.norms, report.folded) == (4, 3) and norms_of(model) == ['body.5']


def test_norm_with_two_names_goes_under_both() -> None:
    model = Wired(lambda model, x: model.alias(model.conv(x)))
    model.alias = model.norm
    assert fold(model).folded == 2 and norms_of(model) == []


def test_layers_that_share_a_weight_keep_it_apart() -> None:
    model = Chain(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1))
    model.body[3].weight = model.body[0].weight
    assert fold(model).folded == 1


def test_wrong_fold_is_noticed_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fold_pairs.fold_pair

    def _without_offset(layer: nn.Module, norm: nn.Module) -> nn.Module:
        after = right(layer, norm)
        layer.bias.mul_(1 + 1e-6)
        return after

    monkeypatch.setattr(fold_pairs, 'fold_pair', _without_offset)
    assert fold(FOLDS['convolution']()).folded == 0


def test_model_that_cannot_be_measured_is_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    model = Chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = copy.deepcopy(model.state_dict())

    def _read(model: nn.Module, images: torch.Tensor) -> Sequence[torch.Tensor]:
        raise RuntimeError('no kernel for float64')

    with caplog.at_level(logging.WARNING):
        assert fold_batch_norms(model, SIZE, _read).folded == 0
    assert 'no kernel for float64' in caplog.text
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_model_without_batch_norms_is_not_run() -> None:
    report = fold_batch_norms(nn.Conv2d(3, 4, 3), SIZE, lambda model, images: pytest.fail('was run'))
    assert (report.norms, report.folded) == (0, 0)


def test_folding_leaves_no_hooks_and_no_random_state_behind() -> None:
    model = settled(timm.create_model('test_byobnet'))
    random_state = torch.get_rng_state()
    fold_batch_norms(model, (3, 32, 32), read_output)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.get_default_dtype() == torch.float32


def test_pairs_come_in_the_order_in_which_they_run() -> None:
    model = Wired(lambda model, x: model.norm(model.conv(x))).double().eval()
    pairs = find_pairs(model, torch.randn(2, *SIZE).double(), read_output)
    assert pairs == [Pair('first.0', 'first.1'), Pair('conv', 'norm')]


@pytest.mark.parametrize('wrong', [set(), {0}, {6}, {2, 3}, {0, 3, 6}, set(range(7))])
def test_only_pairs_that_change_an_output_are_dropped(wrong: Set[int]) -> None:
    pairs = [Pair(str(i), '') for i in range(7)]
    kept = folding._exact_subset(pairs, lambda some: not wrong & {int(pair.layer) for pair in some})
    assert {int(pair.layer) for pair in kept} == set(range(7)) - wrong


@pytest.mark.parametrize('name', ['repvgg_a0', 'mobileone_s0', 'levit_128s', 'repvit_m0_9', 'fastvit_t8'])
@torch.no_grad()
def test_branches_that_timm_can_merge_are_merged(name: str) -> None:
    size = (3, 224, 224) if name.startswith('levit') else (3, 64, 64)
    model, images = timm.create_model(name, num_classes=5).eval(), torch.randn(2, *size)
    settle_batch_norms(model, images)
    layers, plain, exact = len(list(model.modules())), model(images), copy.deepcopy(model).double()(images.double())
    report = fold_batch_norms(model, size, read_output)
    assert report.folded > 0 and len(list(model.modules())) < layers
    assert not [norm for norm in norms_of(model) if not norm.startswith('head')]  # the classifier's own stay
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    # a random model may amplify rounding: what counts is that folding does not add to it
    folded_error, plain_error = (output_error([x.double()], [exact]) for x in (model(images), plain))
    assert folded_error < max(10 * plain_error, 1e-5) < 0.1


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_folded_weights_are_rounded_once(dtype: torch.dtype) -> None:
    model = settled(Chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).to(dtype)
    exact = copy.deepcopy(model).double()
    for each in (model, exact):
        fold_batch_norms(each, SIZE, read_output)
    assert torch.equal(model.body[0].weight, exact.body[0].weight.to(dtype))
    assert torch.equal(model.body[0].bias, exact.body[0].bias.to(dtype))


def test_memory_format_of_the_weights_stays() -> None:
    model = Chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    fold(model)
    assert model.body[0].weight.is_contiguous(memory_format=torch.channels_last)
