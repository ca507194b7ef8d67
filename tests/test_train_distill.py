"""The training script as a user runs it: from flags to files that timm loads."""
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import train_distill
import validate
from timm_distill import UsageError

REPO_DIR = Path(__file__).resolve().parent.parent
STUDENT = 'test_efficientnet'
TEACHER = 'test_resnet'
FAST = [
    '--num-classes', '10', '--img-size', '32', '-b', '30', '--opt', 'adamw', '--lr', '2e-3', '--warmup-epochs', '0',
    '--smoothing', '0.1', '--device', 'cpu', '-j', '0', '--no-report']  # figures take most of a short run's time


def run(data_dir, output, *flags, experiment='run'):
    argv = ['--data-dir', str(data_dir), '--output', str(output), '--experiment', experiment, *FAST, *map(str, flags)]
    return train_distill.main(argv)


def rows(folder):
    with open(Path(folder) / 'summary.csv') as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope='module')
def teacher_file(digits_dir, tmp_path_factory):
    result = run(digits_dir, tmp_path_factory.mktemp('teacher'), '--model', TEACHER, '--epochs', 3)
    return result.checkpoint


def distil_flags(teacher_file):
    return [
        '--student', STUDENT, '--teacher', TEACHER, '--teacher-checkpoint', teacher_file, '--kd', 'norm+kd',
        '--kd-kwargs', 'norm.segments=2', 'kd.temperature=2', '--model-ema', '--model-ema-decay', '0.8',
        '--mixup', '0.2']


@pytest.fixture(scope='module')
def distilled(digits_dir, teacher_file, tmp_path_factory):
    """Result of four epochs with everything on."""
    return run(digits_dir, tmp_path_factory.mktemp('distilled'), *distil_flags(teacher_file), '--epochs', 4)


def test_run_writes_what_timm_writes(distilled):
    names = set(os.listdir(distilled.output_dir))
    assert {'args.yaml', 'summary.csv', 'last.pth.tar', 'model_best.pth.tar', 'checkpoint-3.pth.tar'} <= names
    assert not [name for name in names if 'tmp' in name]
    assert [row['epoch'] for row in rows(distilled.output_dir)] == ['0', '1', '2', '3']


def test_every_term_is_in_the_summary_by_name(distilled):
    columns = set(rows(distilled.output_dir)[0])
    assert {'train_loss', 'train_task_loss', 'train_norm_loss', 'train_kd_loss', 'eval_top1', 'lr'} <= columns


LOAD_WITH_TIMM_ALONE = """
import json, sys, torch, timm
from timm.data import create_dataset, create_loader, resolve_data_config
name, path, data_dir, hub = sys.argv[1:]
model = timm.create_model(name, num_classes=10, checkpoint_path=path).eval()
stock = sum(p.numel() for p in timm.create_model(name, num_classes=10).parameters())
config = resolve_data_config(dict(img_size=32), model=model)
dataset = create_dataset('', root=data_dir, split='validation')
loader = create_loader(dataset, config['input_size'], 30, interpolation=config['interpolation'], mean=config['mean'],
                       std=config['std'], crop_pct=config['crop_pct'], device=torch.device('cpu'), num_workers=0)
with torch.inference_mode():
    correct = sum((model(x).argmax(1) == y).sum().item() for x, y in loader)
released = timm.create_model(f'local-dir:{hub}', pretrained=True).eval()
config = resolve_data_config(model=released)
assert config['input_size'] == (3, 32, 32) and released.num_classes == 10, config
assert not [m for m in sys.modules if m.startswith('timm_distill')]
count = sum(p.numel() for p in model.parameters())
print(json.dumps(dict(top1=100 * correct / len(dataset), count=count, stock=stock)))
"""


def test_checkpoint_and_hub_folder_load_with_timm_alone_with_the_top1_of_the_summary(distilled, digits_dir, tmp_path):
    out = subprocess.run(
        [
            sys.executable, '-c', LOAD_WITH_TIMM_ALONE, STUDENT, distilled.checkpoint, str(digits_dir),
            os.path.join(distilled.output_dir, 'hub'),
        ],
        cwd=tmp_path, capture_output=True, text=True, check=True)
    loaded = json.loads(out.stdout.splitlines()[-1])
    row = rows(distilled.output_dir)[distilled.best_epoch]
    assert loaded['top1'] == pytest.approx(float(row['eval_top1']), abs=1e-9)
    assert loaded['count'] == loaded['stock'] == distilled.param_count


@pytest.mark.parametrize(('key', 'flags'), [('state_dict_ema', ['--use-ema']), ('state_dict', [])])
def test_validate_gives_the_numbers_of_the_training_log(distilled, digits_dir, tmp_path, key, flags):
    results = tmp_path / 'results.csv'
    code = validate.main([
        '--data-dir', str(digits_dir), '--model', STUDENT, '--checkpoint', f'{distilled.output_dir}/last.pth.tar',
        '--img-size', '32', '-b', '30', '-j', '0', '--device', 'cpu', '--results-file', str(results), *flags])
    assert code == 0
    with open(results) as f:
        top1 = float(next(csv.DictReader(f))['top1'])
    if key == 'state_dict_ema':  # the summary holds the EMA's numbers, as timm's does
        assert top1 == pytest.approx(float(rows(distilled.output_dir)[-1]['eval_top1']), abs=1e-3)
    assert 0 <= top1 <= 100


def test_teacher_is_in_no_entry_of_the_checkpoint(distilled, teacher_file):
    checkpoint = torch.load(f'{distilled.output_dir}/last.pth.tar', weights_only=False)
    stock = timm.create_model(STUDENT, num_classes=10)
    assert list(checkpoint['state_dict']) == list(checkpoint['state_dict_ema']) == list(stock.state_dict())
    teacher_shapes = [v.shape for v in torch.load(teacher_file, weights_only=False)['state_dict'].values()]
    assert max(v.numel() for v in checkpoint['task_state']['adapter'].values()) < sum(s.numel() for s in teacher_shapes)
    assert not [
        key for part in ('adapter', 'methods', 'student') for key in checkpoint['task_state'][part]
        if 'teacher' in key]
    num_trained = sum(1 for _ in stock.parameters()) + sum(
        1 for key in checkpoint['task_state']['adapter'] if key.endswith(('weight', 'bias')))
    assert sum(len(group['params']) for group in checkpoint['optimizer']['param_groups']) == num_trained


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_resumed_run_gives_the_summary_rows_of_one_never_stopped(few_digits_dir, teacher_file, tmp_path, workers):
    flags = [*distil_flags(teacher_file), '-j', workers, '--drop-path', '0.1']
    folder = Path(run(few_digits_dir, tmp_path, *flags, '--epochs', 3, experiment='whole').output_dir)
    whole, theirs = rows(folder), torch.load(folder / 'last.pth.tar', weights_only=False)
    resume = folder / 'checkpoint-1.pth.tar'  # what a kill behind epoch 1 leaves
    run(few_digits_dir, tmp_path, *flags, '--epochs', 3, '--resume', resume, experiment='resumed')
    assert rows(tmp_path / 'resumed') == whole[2:]
    run(few_digits_dir, tmp_path, *flags, '--epochs', 3, '--resume', resume, experiment='whole')
    assert rows(folder) == whole
    ours = torch.load(folder / 'last.pth.tar', weights_only=False)
    for part in ('state_dict', 'state_dict_ema'):
        for name, value in theirs[part].items():
            assert torch.equal(ours[part][name], value), name


def test_kd_none_needs_no_teacher(few_digits_dir, tmp_path):
    result = run(few_digits_dir, tmp_path, '--model', TEACHER, '--epochs', 1)
    assert list(rows(result.output_dir)[0]) == ['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr']


def test_run_under_bfloat16_autocast_saves_a_verified_student(few_digits_dir, teacher_file, tmp_path):
    result = run(
        few_digits_dir, tmp_path, *distil_flags(teacher_file), '--epochs', 1, '--amp', '--amp-dtype', 'bfloat16',
        '--grad-accum-steps', 3, '--clip-grad', 1, '--channels-last')
    state = torch.load(result.checkpoint, weights_only=False)['state_dict']
    timm.create_model(STUDENT, num_classes=10).load_state_dict(state)


def test_teacher_accuracy_is_reported_before_training(few_digits_dir, teacher_file, tmp_path, caplog):
    caplog.set_level('INFO')
    run(few_digits_dir, tmp_path, *distil_flags(teacher_file), '--epochs', 1)
    messages = [record.getMessage() for record in caplog.records]
    teacher = next(i for i, m in enumerate(messages) if m.startswith(f'Teacher {TEACHER} top-1'))
    assert teacher < next(i for i, m in enumerate(messages) if m.startswith('Train:'))


def test_broken_teacher_gets_a_warning(digits_dir, tmp_path, caplog):
    run(
        digits_dir, tmp_path, '--student', STUDENT, '--teacher', TEACHER, '--no-teacher-pretrained', '--kd', 'norm',
        '--epochs', 1)
    assert 'random weights' in caplog.text and 'near chance' in caplog.text


def test_list_kd_prints_defaults_needs_and_paper(capsys):
    assert train_distill.main(['--list-kd']) is None
    out = capsys.readouterr().out
    for words in ('norm.segments=8', 'kd.temperature=4.0', 'ICLR 2023', "adapter 'norm'", 'equal class counts'):
        assert words in out


def make_folders(root, classes, images=3, splits=('train', 'validation')):
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(images):
                Image.new('RGB', (8, 8), (i * 20, 0, 0)).save(root / split / name / f'{i}.png')
    return root


def corrupt_image(tmp_path, digits_dir, teacher_file):
    root = tmp_path / 'corrupt'
    shutil.copytree(digits_dir, root)
    path = sorted((root / 'train' / '3').iterdir())[0]
    path.write_bytes(path.read_bytes()[:40])
    return ['--data-dir', root, '--epochs', 1, '--model', TEACHER], path.name


def other_architecture(tmp_path, digits_dir, teacher_file):
    return ['--teacher', 'test_vit', '--teacher-checkpoint', teacher_file, '--kd', 'norm'], 'test_vit'


def truncated_checkpoint(tmp_path, digits_dir, teacher_file):
    path = tmp_path / 'short.pth.tar'
    path.write_bytes(Path(teacher_file).read_bytes()[:5000])
    return ['--model', TEACHER, '--resume', path], 'short.pth.tar'


def teacher_of_other_classes(tmp_path, digits_dir, teacher_file):
    path = tmp_path / 'seven.safetensors'
    save_file(timm.create_model(TEACHER, num_classes=7).state_dict(), path)
    return ['--teacher', TEACHER, '--teacher-checkpoint', path, '--kd', 'kd'], '7 classes'


BAD_INPUT = {
    'unknown student': (['--student', 'resnet5000'], 'resnet5000'),
    'unknown teacher': (['--teacher', 'resnet5000', '--kd', 'norm'], 'resnet5000'),
    'unknown method': (['--teacher', TEACHER, '--kd', 'nrom'], "did you mean 'norm'"),
    'unknown option': (['--teacher', TEACHER, '--kd', 'norm', '--kd-kwargs', 'norm.segment=8'], 'norm.segments'),
    'option of the wrong type': (['--teacher', TEACHER, '--kd', 'norm', '--kd-kwargs', 'norm.segments=x'], 'integer'),
    'method without teacher': (['--kd', 'norm'], '--teacher'),
    'pretrained teacher that timm has no weights for': (['--teacher', 'resnet10t_', '--kd', 'norm'], 'resnet10t_'),
    'missing teacher checkpoint': (['--teacher', TEACHER, '--teacher-checkpoint', 'no.pth', '--kd', 'norm'], 'no.pth'),
    'missing data dir': (['--data-dir', '/nonexistent/data'], '/nonexistent/data'),
    'other class count': (['--num-classes', '7'], '--num-classes 10'),
    'unknown device': (['--device', 'cuda:77'], '--device'),
    'teacher of another architecture': other_architecture,
    'teacher of other classes': teacher_of_other_classes,
    'corrupt image': corrupt_image,
    'corrupt checkpoint': truncated_checkpoint,
    'empty folders': lambda tmp_path, *_: (
        ['--data-dir', make_folders(tmp_path / 'empty', ['a', 'b'], images=0)], 'empty'),
    'one class': lambda tmp_path, *_: (
        ['--data-dir', make_folders(tmp_path / 'one', ['a']), '--num-classes', '1'], 'one'),
}


@pytest.mark.parametrize('case', BAD_INPUT)
def test_bad_input_is_one_clear_message_with_nothing_half_written(case, digits_dir, teacher_file, tmp_path):
    made = BAD_INPUT[case]
    flags, words = made(tmp_path, digits_dir, teacher_file) if callable(made) else made
    output = tmp_path / 'out'
    with pytest.raises(UsageError) as error:
        run(digits_dir, output, '--student', STUDENT, '--epochs', 1, *flags)
    message = str(error.value)
    assert words in message
    assert '\n' not in message
    assert not output.exists() or not os.listdir(output)


@pytest.mark.slow
def test_bad_input_exits_with_code_2_and_no_traceback(tmp_path):
    out = subprocess.run(
        [sys.executable, str(REPO_DIR / 'train_distill.py'), '--data-dir', str(tmp_path / 'none'), '--device', 'cpu'],
        cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 2
    assert 'Traceback' not in out.stderr
    assert out.stderr.splitlines()[-1].startswith('train_distill.py: error:')
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('flags', [
    ['--aug-splits', '2', '--split-bn'],
    ['--aug-splits', '3', '--jsd-loss', '--aa', 'augmix-m5-w2', '--reprob', '0.2', '--resplit'],
    ['--train-img-sizes', '24', '32', '--train-batch-sizes', '40', '30', '--variable-batch-loss-scale', 'sqrt'],
])
def test_distillation_goes_with_views_and_sizes_and_leaves_a_plain_checkpoint(
        few_digits_dir, teacher_file, tmp_path, flags):
    result = run(few_digits_dir, tmp_path, *distil_flags(teacher_file)[:-2], '--epochs', 1, *flags)
    model = timm.create_model(STUDENT, num_classes=10)
    model.load_state_dict(torch.load(result.checkpoint, weights_only=False)['state_dict'])
    assert rows(result.output_dir)[0]['train_norm_loss']


def test_split_batch_norms_survive_a_resume(few_digits_dir, tmp_path):
    flags = ['--model', TEACHER, '--aug-splits', '2', '--split-bn', '--sched', 'none']
    whole = run(few_digits_dir, tmp_path, *flags, '--epochs', 2, experiment='whole')
    run(few_digits_dir, tmp_path, *flags, '--epochs', 1, experiment='half')
    run(
        few_digits_dir, tmp_path, *flags, '--epochs', 2, '--resume', tmp_path / 'half' / 'last.pth.tar',
        experiment='resumed')
    assert rows(tmp_path / 'resumed')[-1] == rows(whole.output_dir)[-1]


NAFLEX = [
    '--model', 'naflexvit_base_patch16_gap', '--model-kwargs', 'embed_dim=32', 'depth=1', 'num_heads=2',
    'patch_size=8', '--naflex-loader', '--naflex-max-seq-len', '16', '--naflex-train-seq-lens', '9', '16']


def test_patch_sequences_train_without_distillation(few_digits_dir, tmp_path):
    result = run(few_digits_dir, tmp_path, *NAFLEX, '--mixup', '0.2', '--epochs', 1, '--model-ema')
    assert 0 <= float(rows(result.output_dir)[0]['eval_top1']) <= 100


def test_stop_epoch_keeps_the_schedule_and_save_epochs_keeps_milestones(few_digits_dir, tmp_path):
    flags = ['--model', TEACHER, '--epochs', 3]
    whole = run(few_digits_dir, tmp_path, *flags, experiment='whole')
    result = run(few_digits_dir, tmp_path, *flags, '--stop-epoch', 2, '--save-epochs', 1, experiment='stop')
    folder = Path(result.output_dir)
    assert torch.load(folder / 'milestone-1.pth.tar', weights_only=False)['epoch'] == 0
    run(few_digits_dir, tmp_path, *flags, '--resume', folder / 'last.pth.tar', experiment='rest')
    assert rows(tmp_path / 'rest')[-1] == rows(whole.output_dir)[-1]


def test_milestones_and_the_stop_epoch_are_validated_whatever_the_interval(few_digits_dir, tmp_path):
    result = run(
        few_digits_dir, tmp_path, '--model', TEACHER, '--epochs', 9, '--val-interval', 5, '--save-epochs', 1,
        '--stop-epoch', 3)
    assert [row['epoch'] for row in rows(result.output_dir)] == ['0', '2']


def test_timms_distillation_flags_train_as_ours_do(few_digits_dir, teacher_file, tmp_path):
    common = ['--student', STUDENT, '--teacher-checkpoint', teacher_file, '--epochs', 1, '--task-loss-weight', '0.3']
    timm_run = run(
        few_digits_dir, tmp_path, *common, '--kd-model-name', TEACHER, '--kd-temperature', '2', experiment='a')
    our_run = run(
        few_digits_dir, tmp_path, *common, '--teacher', TEACHER, '--kd', 'kd', '--kd-kwargs', 'kd.temperature=2.',
        '--distill-loss-weight', '0.7', experiment='b')
    assert rows(timm_run.output_dir) == rows(our_run.output_dir)
    assert (tmp_path / 'a' / 'args.yaml').read_text() == (tmp_path / 'b' / 'args.yaml').read_text().replace(
        'experiment: b', 'experiment: a')


def test_save_images_writes_the_batch_of_every_log_line(digits_dir, tmp_path):
    result = run(digits_dir, tmp_path, '--model', TEACHER, '--epochs', 1, '--save-images', '--log-interval', 4)
    assert {'train-batch-0.jpg', 'train-batch-4.jpg', 'train-batch-9.jpg'} <= set(os.listdir(result.output_dir))


@pytest.fixture(scope='module')
def start(digits_dir, tmp_path_factory):
    """Result of a student alone."""
    return run(digits_dir, tmp_path_factory.mktemp('start'), '--model', STUDENT, '--epochs', 3)


@pytest.mark.slow
@pytest.mark.parametrize('source', ['initial-checkpoint', 'pretrained-path'])
def test_pretrained_student_keeps_its_accuracy_until_it_learns(digits_dir, teacher_file, start, tmp_path, source):
    """Next to no learning rate and running statistics that stay: an epoch of norm gives the accuracy of one without."""
    flags = ['--model', STUDENT, f'--{source}', start.checkpoint, '--epochs', 1, '--lr', '1e-9']
    flags += ['--bn-momentum', '1e-12', '--sched', 'none']
    flags += ['--pretrained'] if source == 'pretrained-path' else []
    norm = ['--teacher', TEACHER, '--teacher-checkpoint', teacher_file, '--kd', 'norm', '--no-teacher-eval']
    norm += ['--kd-kwargs', 'norm.segments=2']
    alone = run(digits_dir, tmp_path, *flags, experiment='alone').history[-1]['validation']
    auto = run(digits_dir, tmp_path, *flags, *norm, experiment='auto').history[-1]['validation']
    official = run(digits_dir, tmp_path, *flags, *norm, 'norm.init=official', experiment='official').history[-1]
    assert auto['top1'] == alone['top1'] and auto['loss'] == pytest.approx(alone['loss'], rel=1e-5)
    if source == 'initial-checkpoint':  # the other one begins with a new head, as in timm
        assert auto['top1'] == start.best_metric
    assert abs(official['validation']['loss'] - alone['loss']) > 0.1  # what a random transform does
