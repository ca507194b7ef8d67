"""The N-to-one transform against the official code's numbers, its initialisation and its algebra."""
import math
from typing import Any

import pytest
import torch
import torch.nn as nn
from golden_data import (
    GoldenCase,
    GoldenStudent,
    adapter_state,
    assert_golden,
    case_id,
    create_golden_adapter,
    golden_cases,
    golden_forms,
    golden_match,
)

from timm_distill import UsageError, create_adapter
from timm_distill.adapters import Match
from timm_distill.adapters.norm.transform import NToOneTransform

CASES = golden_cases('norm_ft', having='x')
OPTIONS = [(bn, residual) for bn in (True, False) for residual in (True, False)]


def create_random(
        batch_norm: bool = True, residual: bool = True, channels: int = 6, **options: Any) -> NToOneTransform:
    """Return an adapter none of whose tensors is at its initial value."""
    adapter = create_adapter(
        'norm', channels, 5, segments=3, batch_norm=batch_norm, residual=residual, **options).double()
    for name, tensor in adapter.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if 'var' in name else torch.randn_like(tensor))
    return adapter


@pytest.mark.parametrize('matching', [True, False], ids=['matching', 'alone'])
@pytest.mark.parametrize('case,form', golden_forms(CASES))
def test_training_outputs_and_running_statistics_equal_the_official_codes(
        case: GoldenCase, form: str, matching: bool) -> None:
    adapter = create_golden_adapter(case, form).train()
    assert adapter.segments == case.hparams['co_sponge']
    result = adapter(case['x'], golden_match(case) if matching else None)
    assert_golden(result.output, case['out'])
    assert_golden(GoldenStudent(case).forward_head(result.output), case['logits'])
    state = adapter.state_dict()
    for name, expected in adapter_state(case, 'after.').items():
        assert_golden(state[name], expected)


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_reference_gives_the_official_codes_expanded_feature(case: GoldenCase) -> None:
    adapter = create_golden_adapter(case)
    for mode, prefix in ((False, 'eval.'), (True, '')):
        output, expanded = adapter.train(mode).expand_contract(case['x'])
        assert_golden(expanded, case[f'{prefix}fea'])
        assert_golden(output, case[f'{prefix}out'])


@pytest.mark.parametrize('case,form', golden_forms(CASES))
def test_eval_outputs_equal_the_official_codes(case: GoldenCase, form: str) -> None:
    output = create_golden_adapter(case, form).eval()(case['x']).output
    assert_golden(output, case['eval.out'])
    assert_golden(output.mean((2, 3)), case['eval.pooled'])


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_folded_map_on_the_pooled_input_gives_the_official_logits(case: GoldenCase) -> None:
    weight, bias = create_golden_adapter(case).affine()
    fc_weight, fc_bias = case['fc.weight'], case['fc.bias']
    pooled = case['x'].mean((2, 3))
    assert_golden(pooled @ (fc_weight @ weight).T + fc_bias + fc_weight @ bias, case['eval.logits'])


@pytest.mark.parametrize('batch_norm,residual', OPTIONS)
@pytest.mark.parametrize('shape', [(2, 6, 3, 4), (2, 6, 9, 1), (2, 6, 1, 1)], ids=['map', 'tokens', 'vector'])
def test_affine_is_the_eval_forward(batch_norm: bool, residual: bool, shape: tuple) -> None:
    adapter = create_random(batch_norm, residual).eval()
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(adapter.affine()(x), adapter(x).output, rtol=1e-12, atol=1e-12)


def test_affine_is_float64_detached_and_leaves_the_adapter_alone() -> None:
    adapter = create_random().float().train()
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    weight, bias = adapter.affine()
    assert weight.dtype == bias.dtype == torch.float64
    assert not weight.requires_grad and not bias.requires_grad
    assert adapter.training
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter.state_dict().items())


def test_convolutions_start_kaiming_normal_over_the_fan_out() -> None:
    torch.manual_seed(0)
    adapter = create_adapter('norm', 64, 48, segments=4)
    for conv in (adapter.expand, adapter.contract):
        expected = math.sqrt(2. / conv.weight.shape[0])  # a 1x1 convolution's fan-out is its output width
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.05)
        assert abs(conv.weight.mean().item()) < 0.1 * expected
        assert conv.bias is None


def test_batch_norms_start_as_the_identity_in_the_official_start() -> None:
    adapter = create_adapter('norm', 6, 5, segments=3, init='official')
    for norm in (adapter.expand_bn, adapter.contract_bn):
        assert (norm.eps, norm.momentum) == (1e-5, 0.1)
        assert (norm.weight == 1).all() and (norm.bias == 0).all()


def test_plain_transform_has_biases_at_zero_and_no_batch_norm() -> None:
    adapter = create_adapter('norm', 6, 5, segments=3, batch_norm=False)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in adapter.modules())
    assert (adapter.expand.bias == 0).all() and (adapter.contract.bias == 0).all()


def test_there_is_no_activation_so_the_plain_transform_is_linear() -> None:
    adapter = create_random(batch_norm=False)
    a, b = torch.randn(2, 2, 6, 3, 3, dtype=torch.float64)
    zero = adapter(torch.zeros_like(a)).output
    torch.testing.assert_close(adapter(a + b).output, adapter(a).output + adapter(b).output - zero)


# Start as the identity

IDENTITIES = {
    'residual': {},
    'linear': dict(offset=False),
    'plain': dict(batch_norm=False),
    'plain, linear': dict(batch_norm=False, offset=False),
    'plain, straight': dict(batch_norm=False, residual=False),
}
each_identity = pytest.mark.parametrize('options', IDENTITIES.values(), ids=list(IDENTITIES))


def create_identity(**options: Any) -> NToOneTransform:
    torch.manual_seed(0)
    return create_adapter('norm', 6, 5, segments=3, init='identity', **options).double()


@pytest.mark.parametrize('form', ['direct', 'moments'])
@each_identity
def test_identity_init_leaves_the_feature_as_it_is_in_training_and_merged(options: dict, form: str) -> None:
    adapter, x = create_identity(form=form, **options), torch.randn(4, 6, 3, 3, dtype=torch.float64) * 3 + 1
    tolerance = 1e-5 if options.get('residual') is False else 1e-12  # a contraction of float32 is its inverse
    for mode in (True, False):
        torch.testing.assert_close(adapter.train(mode)(x).output, x, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(adapter.affine()(x), x, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('form', ['direct', 'moments'])
@each_identity
def test_from_the_identity_the_match_trains_the_expansion_and_the_path_comes_alive(options: dict, form: str) -> None:
    adapter, x = create_identity(form=form, **options).train(), torch.randn(8, 6, 3, 3, dtype=torch.float64)
    match = Match(torch.randn(8, 5, 3, 3, dtype=torch.float64), lambda positions: positions)
    direction = torch.randn_like(x)
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        result = adapter(x, match)
        losses.append(result.loss.item())
        optimizer.zero_grad()
        (result.loss + (result.output * direction).mean()).backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    moved = {name for name, p in adapter.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before)


def test_identity_init_only_differs_in_what_it_sets_to_zero() -> None:
    torch.manual_seed(0)
    official, identity = create_adapter('norm', 6, 5, segments=3, init='official').double(), create_identity()
    differing = {name for name, t in official.state_dict().items() if not torch.equal(t, identity.state_dict()[name])}
    assert differing == {'contract_bn.weight'}


@pytest.mark.parametrize('init,identity', [('auto', True), ('identity', True), ('official', False)])
def test_transform_starts_as_the_identity_unless_it_is_told_to_start_at_random(init: str, identity: bool) -> None:
    adapter = create_adapter('norm', 6, 5, segments=3, init=init)
    assert (adapter.contract_bn.weight == (0. if identity else 1.)).all()
    adapter.start_pretrained()
    assert (adapter.contract_bn.weight == (0. if identity else 1.)).all()


@pytest.mark.parametrize('options,reason', [
    (dict(residual=False), 'batch norms'),
    (dict(residual=False, batch_norm=False, segments=1), '5 channels cannot carry 6'),
])
def test_identity_that_is_impossible_is_refused_or_with_auto_said(
        options: dict, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    options = {'segments': 3, **options}
    with pytest.raises(UsageError, match=f'norm.init=identity is impossible.*{reason}.*norm.residual=True'):
        create_adapter('norm', 6, 5, init='identity', **options)
    adapter = create_adapter('norm', 6, 5, init='auto', **options)
    before = adapter.contract.weight.clone()
    adapter.start_pretrained()
    assert torch.equal(adapter.contract.weight, before)
    assert reason in caplog.text and 'norm.residual=True' in caplog.text


@pytest.mark.parametrize('init', ['auto', 'identity'])
def test_side_transform_has_no_path_to_keep(init: str) -> None:
    adapter = create_adapter('norm', 6, 5, segments=1, side=True, init=init, residual=False)
    adapter.start_pretrained()


# Without offset

SHAPES = {'map': (4, 6, 3, 4), 'tokens': (4, 6, 9, 1), 'vector': (4, 6, 1, 1)}
each_option = pytest.mark.parametrize('batch_norm,residual', OPTIONS)
each_shape = pytest.mark.parametrize('shape', SHAPES.values(), ids=list(SHAPES))


@each_option
@each_shape
def test_transform_without_offset_is_linear_at_inference(batch_norm: bool, residual: bool, shape: tuple) -> None:
    adapter = create_random(batch_norm, residual, offset=False).eval()
    a, b = torch.randn(2, *shape, dtype=torch.float64)
    assert adapter(torch.zeros_like(a)).output.abs().max() < 1e-12
    expected = 2 * adapter(a).output - 3 * adapter(b).output
    torch.testing.assert_close(adapter(2 * a - 3 * b).output, expected, rtol=1e-10, atol=1e-11)


@each_option
@each_shape
def test_affine_without_offset_has_bias_zero_and_is_the_eval_forward(
        batch_norm: bool, residual: bool, shape: tuple) -> None:
    adapter = create_random(batch_norm, residual, offset=False).eval()
    x = torch.randn(shape, dtype=torch.float64)
    assert (adapter.affine().bias == 0).all()
    torch.testing.assert_close(adapter.affine()(x), adapter(x).output, rtol=1e-11, atol=1e-11)


@each_option
@each_shape
def test_expanded_feature_keeps_its_offset_where_the_output_has_none(
        batch_norm: bool, residual: bool, shape: tuple) -> None:
    adapter, plain = create_random(batch_norm, residual, offset=False), create_random(batch_norm, residual)
    plain.load_state_dict(adapter.state_dict(), strict=False)
    x = torch.randn(shape, dtype=torch.float64)
    for mode in (True, False):
        torch.testing.assert_close(adapter.train(mode).expand_contract(x)[1], plain.train(mode).expand_contract(x)[1])


@pytest.mark.parametrize('residual', [True, False])
@each_shape
def test_training_output_without_offset_is_scaled_by_the_batchs_deviation_alone(residual: bool, shape: tuple) -> None:
    adapter, x = create_random(True, residual, offset=False).train(), torch.randn(shape, dtype=torch.float64)
    expand, contract = adapter.expand.weight.flatten(1), adapter.contract.weight.flatten(1)
    linear = torch.einsum('oc,bchw->bohw', expand, x)
    scaled = _scale_by_batch(linear, adapter.expand_bn)
    output = _scale_by_batch(torch.einsum('oc,bchw->bohw', contract, scaled), adapter.contract_bn)
    torch.testing.assert_close(adapter(x).output, x + output if residual else output, rtol=1e-10, atol=1e-10)


def _scale_by_batch(x: torch.Tensor, norm: nn.BatchNorm2d) -> torch.Tensor:
    deviation = (x.var((0, 2, 3), correction=0) + norm.eps).sqrt()
    return x * (norm.weight / deviation)[:, None, None]


@each_shape
def test_running_statistics_without_offset_are_those_of_plain_batch_norms_and_move_once(shape: tuple) -> None:
    adapter, x = create_random(offset=False).train(), torch.randn(shape, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    adapter(x)
    linear = adapter.expand(x)
    offset = adapter.expand_bn.bias - _batch_scale(linear, adapter.expand_bn) * linear.mean((0, 2, 3))
    contracted = adapter.contract(_scale_by_batch(linear, adapter.expand_bn) + offset[:, None, None])
    contracted = contracted - (adapter.contract.weight.flatten(1) @ offset)[:, None, None]
    for name, input in (('expand_bn', linear), ('contract_bn', contracted)):
        norm = adapter.get_submodule(name)
        plain = nn.BatchNorm2d(input.shape[1]).double().train()
        plain.running_mean.copy_(before[f'{name}.running_mean'])
        plain.running_var.copy_(before[f'{name}.running_var'])
        plain(input)
        torch.testing.assert_close(norm.running_mean, plain.running_mean)
        torch.testing.assert_close(norm.running_var, plain.running_var)
        assert norm.num_batches_tracked == before[f'{name}.num_batches_tracked'] + 1


def _batch_scale(x: torch.Tensor, norm: nn.BatchNorm2d) -> torch.Tensor:
    return norm.weight / (x.var((0, 2, 3), correction=0) + norm.eps).sqrt()


def test_eval_without_offset_leaves_running_statistics_alone() -> None:
    adapter = create_random(offset=False).eval()
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    adapter(torch.randn(4, 6, 3, 3, dtype=torch.float64))
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter.state_dict().items())


def test_transform_without_offset_has_no_bias_behind_the_contraction() -> None:
    names = set(dict(create_random(offset=False).named_parameters()))
    assert names == {'expand.weight', 'expand_bn.weight', 'expand_bn.bias', 'contract.weight', 'contract_bn.weight'}
    names = set(dict(create_random(batch_norm=False, offset=False).named_parameters()))
    assert names == {'expand.weight', 'expand.bias', 'contract.weight'}
    assert create_random(offset=False).contract_bn.bias is None


@pytest.mark.parametrize('batch_norm', [True, False])
def test_every_parameter_without_offset_gets_its_gradient(batch_norm: bool) -> None:
    adapter, x = create_random(batch_norm, offset=False), torch.randn(4, 6, 3, 3, dtype=torch.float64)
    for mode in (True, False):
        assert torch.autograd.gradcheck(
            lambda x: adapter.train(mode)(x).output, x[:2, :, :2, :2].clone().requires_grad_())  # noqa: B023
    output, expanded = adapter.train().expand_contract(x)
    (output.square().sum() + expanded.square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())


# On the side

@pytest.mark.parametrize('form', ['direct', 'moments'])
def test_side_transform_expands_and_leaves_its_input_as_it_is(form: str) -> None:
    side, x = create_random(side=True, form=form), torch.randn(2, 6, 3, 3, dtype=torch.float64)
    teacher = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    result = side(x, Match(teacher, lambda positions: positions))
    assert result.output is x and result.loss > 0
    output, expanded = side.expand_contract(x)
    assert output is x and expanded.shape == (2, 15, 3, 3)
    assert set(dict(side.named_parameters())) == {'expand.weight', 'expand_bn.weight', 'expand_bn.bias'}


def test_side_transform_has_nothing_to_merge() -> None:
    with pytest.raises(ValueError, match='nothing to merge'):
        create_random(side=True).affine()


def test_number_of_segments_must_be_positive() -> None:
    with pytest.raises(UsageError, match='norm.segments=0'):
        create_adapter('norm', 6, 5, segments=0)


@pytest.mark.parametrize('options', [{}, {'residual': False}, {'offset': False}])
def test_gradient_for_tokens_does_not_depend_on_the_memory_format_of_the_cotangent(options: dict) -> None:
    """Tokens are strided views; torch's batch norm alone gets their gradients wrong on the CPU."""
    torch.manual_seed(0)
    adapter = create_adapter('norm', 8, 5, segments=2, form='direct', **options).double().train()
    tokens, cotangent = torch.randn(2, 4, 17, 8, dtype=torch.float64)
    gradients = []
    for as_positions in (
            lambda x: x.transpose(1, 2).unsqueeze(-1),  # what a token layout gives
            lambda x: x.transpose(1, 2)[:, :, :16].unflatten(2, (4, 4)).contiguous()):
        x = tokens[:, :16].clone().requires_grad_()
        output = adapter(as_positions(x)).output
        gradients.append(torch.autograd.grad(output, x, as_positions(cotangent[:, :16]))[0])
    torch.testing.assert_close(*gradients)
