"""ViTKD against the official code's numbers, its masks, and pairs of any kind."""
from typing import Any, Dict, Tuple

import pytest
import timm
import torch
import torch.nn as nn
from golden_data import GoldenCase, assert_golden, case_id, golden_cases
from tiny_models import Plain

from timm_distill import DistillTask, UsageError, create_distill_task, create_method
from timm_distill.features.spec import Features, FeatureSpec, PairSpec, Stage
from timm_distill.methods.vitkd import draw_mask

SIZE, CLASSES = (3, 64, 64), 5
CASES = golden_cases('vitkd')


def to_map(tokens: torch.Tensor) -> torch.Tensor:
    """Return tokens, [B, L, C], as a map of a square grid."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def create_golden_method(case: GoldenCase) -> nn.Module:
    """Create the method for a case's shapes, with its stored weights."""
    def _spec(tokens: torch.Tensor) -> FeatureSpec:
        shape = tuple(to_map(tokens).shape[1:])
        return FeatureSpec(5, shape, shape[0], tuple(Stage(i, shape) for i in (2, 5, 8, 11)), (3, 32, 32))

    hparams = case.hparams
    method = create_method(
        'vitkd', alpha=hparams['alpha_vitkd'], beta=hparams['beta_vitkd'], ratio=hparams['lambda_vitkd']).double()
    method.build(PairSpec(_spec(case['high_s']), _spec(case['high_t'])))
    method.double().load_state_dict({own_name(n): own_shape(n, case[n]) for n in case.tensors if is_weight(n)})
    return method.train()


def is_weight(name: str) -> bool:
    return name == 'mask_token' or name.startswith(('align.', 'align2.', 'generation.'))


def own_name(name: str) -> str:
    return name.replace('align2.', 'align_blocks.').replace('align.', 'align_feature.')


def own_shape(name: str, value: torch.Tensor) -> torch.Tensor:
    if name == 'mask_token':
        return value.view(1, -1, 1, 1)
    return value[:, :, None, None] if name.startswith('align') and name.endswith('weight') else value


def fix_noise(monkeypatch: pytest.MonkeyPatch, noise: torch.Tensor) -> None:
    monkeypatch.setattr(torch, 'rand', lambda *shape, **kwargs: noise)


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_losses_and_gradients_equal_the_official_codes(case: GoldenCase, monkeypatch: pytest.MonkeyPatch) -> None:
    method = create_golden_method(case)
    low, high = (case[name].clone().requires_grad_() for name in ('low_s', 'high_s'))
    fix_noise(monkeypatch, case['noise'])
    student = Features(feature=to_map(high), blocks=tuple(to_map(low[:, i]) for i in (0, 1)))
    teacher = Features(feature=to_map(case['high_t']), blocks=tuple(to_map(case['low_t'][:, i]) for i in (0, 1)))
    terms = method(student, teacher, torch.zeros(1))
    assert_golden(terms['vitkd_mimic_loss'], case['loss_mimic'])
    assert_golden(terms['vitkd_gen_loss'], case['loss_gen'])
    assert_golden(sum(terms.values()), case['loss'])
    expected = case.under('grad.')
    inputs = {'low_s': low, 'high_s': high, **dict(method.named_parameters())}
    assert {own_name(name) for name in expected} == set(inputs)
    gradients = torch.autograd.grad(sum(terms.values()), [inputs[own_name(name)] for name in expected])
    for (name, value), gradient in zip(expected.items(), gradients):
        assert_golden(gradient, own_shape(name, value))


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_masks_and_generated_tokens_equal_the_official_codes(case: GoldenCase) -> None:
    method = create_golden_method(case)
    generated, mask = method.fill_in(to_map(case['high_s']), case['noise'])
    assert_golden(generated.flatten(2).transpose(1, 2), case['generated'])
    assert torch.equal(mask.flatten(1).long(), case['mask'].long())
    assert case['ids_keep'].shape[1] == (~mask).sum() // len(mask)


TRANSFORMERS: Dict[str, Dict[str, Any]] = {
    'class token': dict(img_size=64),
    'registers': dict(img_size=64, reg_tokens=3),
    'no class token': dict(img_size=64, class_token=False, global_pool='avg'),
}


def create_model(name: str, seed: int = 1, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=CLASSES, **kwargs)


def create_task(
        student: nn.Module, teacher: nn.Module, size: Tuple[int, int, int] = SIZE, **kwargs: Any) -> DistillTask:
    return create_distill_task(student, teacher, kd='vitkd', input_size=size, verbose=False, **kwargs).train()


def create_batch(size: int = 2, shape: Tuple[int, int, int] = SIZE) -> Tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, *shape, generator=generator), torch.arange(size) % CLASSES


@pytest.mark.parametrize('kwargs', TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_blocks_are_the_first_two_without_prefix_tokens(kwargs: Dict[str, Any]) -> None:
    student, teacher = create_model('test_vit', embed_dim=32, img_size=64), create_model('test_vit', **kwargs).eval()
    task, (images, target) = create_task(student, teacher), create_batch()
    features = task.teacher(images, frozenset({'blocks', 'stages', 'feature'}))
    expected = teacher.forward_intermediates(images, indices=[0, 1], output_fmt='NCHW', intermediates_only=True)
    assert len(features.blocks) == 2
    for block, map_ in zip(features.blocks, expected):
        torch.testing.assert_close(block, map_)
    result = task(images, target)
    sum(result[name] for name in ('vitkd_mimic_loss', 'vitkd_gen_loss')).backward()
    blocks = task.module.student.blocks
    assert all(next(block.parameters()).grad.abs().max() > 0 for block in (blocks[0], blocks[-1]))


def test_one_forward_gives_blocks_and_stages() -> None:
    model = create_model('test_vit', img_size=64)
    task, calls = create_task(create_model('test_vit', embed_dim=32, img_size=64), model), []
    for name in ('student', 'teacher'):
        trunk = (task.module.student if name == 'student' else task.teacher.model).blocks[0]
        trunk.register_forward_hook(lambda *args, name=name: calls.append(name))
    task(*create_batch())
    assert sorted(calls) == ['student', 'teacher']


def test_masks_come_from_the_runs_generator() -> None:
    task, batch = create_task(*(create_model('test_vit', img_size=64) for _ in range(2))), create_batch()
    terms = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        terms.append(task(*batch)['vitkd_gen_loss'].item())
    assert terms[0] == terms[1] != terms[2]


def test_masked_tokens_alone_are_compared_and_give_the_student_no_gradient() -> None:
    method = create_golden_method(CASES[0])
    with torch.no_grad():
        for conv in (method.generation[0], method.generation[2]):
            conv.weight[:, :, :, [0, 2]] = conv.weight[:, :, [0, 2]] = 0  # no token reads another
    student = to_map(CASES[0]['high_s']).clone().requires_grad_()
    method.generate(student, to_map(CASES[0]['high_t'])).backward()
    assert not student.grad.any()


@pytest.mark.parametrize('ratio, masked', [(0.5, 5), (0.3, 3), (1., 9), (0.05, 1)])
def test_as_many_tokens_are_masked_as_the_ratio_says_rounded_up(ratio: float, masked: int) -> None:
    mask = draw_mask(torch.rand(4, 9), ratio)
    assert (mask.sum(1) == masked).all()


def test_grids_that_are_not_square_or_differ_are_pooled_to_the_smaller() -> None:
    task = create_task(
        create_model('test_efficientnet'), create_model('test_vit', img_size=(64, 128)), (3, 64, 128))
    result = task(*create_batch(shape=(3, 64, 128)))
    result['loss'].backward()
    assert torch.isfinite(result['vitkd_gen_loss']) and task.module.methods['vitkd'].mask_token.grad.any()


def test_a_single_position_leaves_the_generation_out() -> None:
    task = create_task(create_model('test_efficientnet'), create_model('test_resnet'), (3, 32, 32))
    assert 'vitkd_gen_loss' not in task(*create_batch(shape=(3, 32, 32)))
    with pytest.raises(UsageError, match='single one.*input_size'):
        create_task(
            create_model('test_efficientnet'), create_model('test_resnet'), (3, 32, 32), kd_kwargs={'vitkd.alpha': 0})


def test_a_model_without_intermediate_features_is_named_with_the_option() -> None:
    with pytest.raises(UsageError, match=r'this teacher gives no intermediate features.*vitkd.alpha=0'):
        create_task(create_model('test_efficientnet'), Plain())


def test_a_weight_of_zero_leaves_its_term_out() -> None:
    models = create_model('test_efficientnet'), create_model('test_resnet')
    for option, term in (('alpha', 'gen'), ('beta', 'mimic')):
        task = create_task(*models, kd_kwargs={f'vitkd.{option}': 0})
        assert {name for name in task(*create_batch()) if name.startswith('vitkd')} == {f'vitkd_{term}_loss'}


def test_weights_that_are_both_zero_are_named() -> None:
    with pytest.raises(UsageError, match='vitkd.alpha and vitkd.beta'):
        create_method('vitkd', alpha=0, beta=0)
