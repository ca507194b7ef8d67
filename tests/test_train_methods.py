"""What the training script does with the methods: sample indices, schedules, checks before training."""
import csv
import importlib
from pathlib import Path
from typing import Any, Dict, List

import pytest
import timm
import torch
import torch._functorch.config
from safetensors.torch import save_file

import train_distill
from timm_distill import UsageError

FAST = [
    '--num-classes', '10', '--img-size', '32', '-b', '20', '--opt', 'adamw', '--lr', '2e-3', '--warmup-epochs', '0',
    '--device', 'cpu', '-j', '0', '--student', 'test_efficientnet', '--teacher', 'test_resnet', '--no-teacher-eval',
    '--no-report']


@pytest.fixture(scope='module')
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('teacher') / 'teacher.safetensors'
    save_file(timm.create_model('test_resnet', num_classes=10).state_dict(), str(path))
    return path


def run(data_dir: Path, output: Path, teacher: Path, *flags: Any, experiment: str = 'run') -> Any:
    argv = [
        '--data-dir', data_dir, '--output', output, '--experiment', experiment, '--teacher-checkpoint', teacher,
        *FAST, *flags]
    return train_distill.main([str(arg) for arg in argv])


def rows(result: Any) -> List[Dict[str, str]]:
    with open(Path(result.output_dir) / 'summary.csv') as f:
        return list(csv.DictReader(f))


def load(result: Any) -> Dict[str, Any]:
    return torch.load(Path(result.output_dir) / 'last.pth.tar', weights_only=False)


CRD = ['--kd', 'crd', '--kd-kwargs', 'crd.negatives=32', 'crd.embed_dim=8', '--model-ema']


def test_resumed_crd_run_ends_with_the_weights_and_banks_of_one_never_stopped(
        few_digits_dir: Path, tmp_path: Path, teacher_file: Path) -> None:
    flags = [few_digits_dir, tmp_path, teacher_file, *CRD, '--sched', 'none', '--epochs']
    whole = run(*flags, 2, experiment='whole')
    stopped = run(*flags, 1, experiment='stopped')
    resumed = run(*flags, 2, '--resume', Path(stopped.output_dir) / 'last.pth.tar', experiment='resumed')
    first, second = load(whole), load(resumed)
    memory = first['task_state']['memory']
    assert memory['crd.student_bank'].shape == (100, 8)
    assert (memory['crd.student_bank'].norm(dim=1) - 1).abs().max() < 1e-5  # every image was seen
    for key in ('state_dict', 'state_dict_ema'):
        assert all(torch.equal(second[key][name], tensor) for name, tensor in first[key].items())
    assert all(torch.equal(second['task_state']['memory'][name], tensor) for name, tensor in memory.items())
    assert rows(resumed)[-1]['train_crd_loss'] == rows(whole)[-1]['train_crd_loss']
    assert list(first['state_dict']) == list(timm.create_model('test_efficientnet', num_classes=10).state_dict())


@pytest.mark.parametrize('flags', [['--mixup', '0.2'], ['--cutmix', '1.0'], ['--cutmix-minmax', '0.2', '0.8']])
def test_method_that_needs_unmixed_images_names_the_flag_and_the_alternatives(
        flags: List[str], few_digits_dir: Path, tmp_path: Path, teacher_file: Path) -> None:
    with pytest.raises(UsageError) as error:
        run(few_digits_dir, tmp_path, teacher_file, *CRD, *flags)
    message = str(error.value)
    assert flags[0] in message and '--kd crd' in message and 'kd, ' in message and not list(tmp_path.iterdir())


def test_method_of_samples_passes_a_dry_run_without_data(capsys: pytest.CaptureFixture) -> None:
    train_distill.main([*FAST, '--kd', 'norm+crd', '--dry-run', '--no-teacher-pretrained'])
    assert 'works' in capsys.readouterr().out


def test_gradient_norms_are_columns_of_the_summary_in_every_epoch_and_change_nothing(
        few_digits_dir: Path, tmp_path: Path, teacher_file: Path) -> None:
    flags = [few_digits_dir, tmp_path, teacher_file, '--kd', 'norm+kd', '--epochs', 2]
    plain = run(*flags, experiment='plain')
    measured = run(*flags, '--log-grad-norm', 100, experiment='measured')
    columns = [f'train_grad_norm_{name}' for name in ('task', 'norm', 'kd')]
    for row, expected in zip(rows(measured), rows(plain)):
        assert all(float(row[name]) > 0 for name in columns)
        assert {name: value for name, value in row.items() if name not in columns} == expected
    first, second = load(plain), load(measured)
    assert all(torch.equal(second['state_dict'][name], tensor) for name, tensor in first['state_dict'].items())


def test_schedule_of_the_command_line_or_a_config_reaches_the_task(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Dict[str, Any] = {}
    preview = importlib.import_module('timm_distill.run.dry_run')  # not the function of that name

    def check(*args: Any, **kwargs: Any) -> Any:
        seen.update(vars(kwargs['kd']))
        raise UsageError('enough')

    monkeypatch.setattr(preview, 'check_pair', check)
    flags = [*FAST, '--kd', 'norm+kd', '--dry-run', '--epochs', '30', '--cooldown-epochs', '5']
    with pytest.raises(UsageError, match='enough'):
        train_distill.main([*flags, '--kd-schedule', 'norm=imagenet', 'kd=cosine:1:0'])
    expected = {'norm': 'imagenet', 'kd': 'cosine:1:0'}
    assert seen['kd_schedule'] == expected and seen['num_epochs'] == 35
    (tmp_path / 'config.yaml').write_text('kd_schedule:\n  norm: imagenet\n  kd: cosine:1:0\n')
    with pytest.raises(UsageError, match='enough'):
        train_distill.main([*flags, '--config', str(tmp_path / 'config.yaml')])
    assert seen['kd_schedule'] == expected


def test_schedule_weighs_the_terms_of_each_epoch(few_digits_dir: Path, tmp_path: Path, teacher_file: Path) -> None:
    result = run(few_digits_dir, tmp_path, teacher_file, '--kd', 'kd', '--kd-schedule', 'kd=cosine:1:0', '--epochs', 2)
    for row, weight in zip(rows(result), (1, 0)):
        expected = float(row['train_task_loss']) + weight * float(row['train_kd_loss'])
        assert float(row['train_loss']) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('schedule, message', [
    ('dist=const', "'dist' is not in --kd kd"),
    ('kd=imagenet', '--kd-schedule kd'),
    ('kd=warmup:0', 'warmup:0'),
])
def test_wrong_schedule_is_one_message_before_anything_is_written(
        schedule: str, message: str, few_digits_dir: Path, tmp_path: Path, teacher_file: Path) -> None:
    with pytest.raises(UsageError, match=message):
        run(few_digits_dir, tmp_path, teacher_file, '--kd', 'kd', '--kd-schedule', schedule)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_gradient_norms_of_a_compiled_run_are_those_of_an_eager_one(
        few_digits_dir: Path, tmp_path: Path, teacher_file: Path) -> None:
    flags = [
        few_digits_dir, tmp_path, teacher_file, '--student', 'test_vit', '--model-kwargs', 'depth=1', '-b', 20, '--kd',
        'norm+kd', '--epochs', 1, '--sched', 'none', '--log-grad-norm', 2]
    with torch._functorch.config.patch(donated_buffer=True):
        compiled = run(*flags, '--torchcompile', 'aot_eager', experiment='compiled')
    (expected,), (actual,) = rows(run(*flags, experiment='eager')), rows(compiled)
    for name in ('train_grad_norm_task', 'train_grad_norm_norm', 'train_grad_norm_kd'):
        assert float(actual[name]) == pytest.approx(float(expected[name]), rel=1e-3)


NEWER = [
    '--kd', 'norm+sdd:nkd+srd+vkd+wkd_l', '--kd-weight', 'sdd=0.5', '--kd-schedule', 'sdd:nkd=warmup:2',
    'wkd_l=0:1,1:0.5', '--kd-kwargs', 'sdd.scales=1,2,4', 'sdd.nkd.gamma=0.5', 'norm.segments=2', '--model-kwargs',
    'output_stride=8', '--teacher-kwargs', 'output_stride=8', '--model-ema', '--mixup', '0.2', '--smoothing', '0.1',
    '--amp', '--amp-dtype', 'bfloat16', '--log-grad-norm', '100', '--no-report']


@pytest.mark.slow
def test_resumed_run_of_a_method_that_takes_another_ends_with_the_weights_of_one_never_stopped(
        few_digits_dir: Path, tmp_path: Path, teacher_file: Path) -> None:
    flags = [few_digits_dir, tmp_path, teacher_file, *NEWER, '--sched', 'none', '--epochs']
    whole = run(*flags, 2, experiment='whole')
    stopped = run(*flags, 1, experiment='stopped')
    resumed = run(*flags, 2, '--resume', Path(stopped.output_dir) / 'last.pth.tar', experiment='resumed')
    first, second = load(whole), load(resumed)
    assert first['task_state']['kd'] == ['norm', 'sdd:nkd', 'srd', 'vkd', 'wkd_l']
    columns = {'train_sdd:nkd_target_loss', 'train_sdd:nkd_others_loss', 'train_grad_norm_sdd:nkd_target'}
    assert columns <= set(rows(whole)[-1])
    for key in ('state_dict', 'state_dict_ema'):
        assert all(torch.equal(second[key][name], tensor) for name, tensor in first[key].items())
    for name, tensor in first['task_state']['methods'].items():
        assert torch.equal(second['task_state']['methods'][name], tensor), name
    assert list(first['state_dict']) == list(timm.create_model('test_efficientnet', num_classes=10).state_dict())
