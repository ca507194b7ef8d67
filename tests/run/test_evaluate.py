"""Promises of the validation script."""
import csv
import importlib.util
import json
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver

from timm_distill.args import create_validate_parser, parse_args
from timm_distill.data import create_eval_dataset, create_eval_loader
from timm_distill.engine.evaluate import ComputeSpec, evaluate
from timm_distill.run import validate_script

_spec = importlib.util.spec_from_file_location('validate', Path(__file__).parent.parent.parent / 'validate.py')
assert _spec is not None and _spec.loader is not None
validate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(validate)


@pytest.fixture(autouse=True)
def _no_log_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    # they would outlive the captured streams that they write to
    monkeypatch.setattr(validate_script, 'setup_default_logging', lambda: None)


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Tuple[Path, ClassificationTask]:
    """Folder with images of 6 classes and a timm training checkpoint whose EMA differs from its weights."""
    folder = tmp_path_factory.mktemp('run')
    rng = np.random.default_rng(0)
    for label in range(6):
        class_dir = folder / 'data' / 'validation' / f'class{label}'
        class_dir.mkdir(parents=True)
        for i in range(5):
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(class_dir / f'{i}.png')
    torch.manual_seed(0)
    task = ClassificationTask(timm.create_model('test_resnet', num_classes=6), verbose=False)
    task.setup_ema()
    for p in task.get_trainable_module(ema=True).parameters():
        p.data.add_(torch.randn_like(p), alpha=0.1)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    CheckpointSaver(task.trainable_module, optimizer, task=task, checkpoint_dir=str(folder)).save_checkpoint(0)
    return folder, task


def flags(folder: Path, *more: str) -> List[str]:
    return [
        '--data-dir', str(folder / 'data'), '--model', 'test_resnet', '--checkpoint', str(folder / 'last.pth.tar'),
        '--img-size', '32', '-b', '8', '-j', '0', '--device', 'cpu', *more]


def results_of(output: str) -> Dict[str, Any]:
    return json.loads(output.split('--result\n')[1])


@pytest.mark.parametrize('use_ema', [False, True])
@pytest.mark.parametrize('more', [[], ['--no-prefetcher', '--channels-last', '-j', '1']])
def test_numbers_equal_those_of_the_training_loop(run, capsys, use_ema, more):
    folder, task = run
    argv = flags(folder, *more)
    assert validate.main(argv + (['--use-ema'] if use_ema else [])) == 0
    results = results_of(capsys.readouterr().out)

    args = parse_args(create_validate_parser(), flags(folder))
    model = task.get_trainable_module(ema=True).module if use_ema else task.get_trainable_module()
    data_config = timm.data.resolve_data_config(vars(args), model=model, use_test_size=True)
    dataset = create_eval_dataset(args, data_config, 6)
    loader = create_eval_loader(args, data_config, dataset, torch.device('cpu'))
    metrics = evaluate(model, loader, ComputeSpec(torch.device('cpu')))
    assert results['top1'] == round(metrics['top1'], 4)
    assert results['top5'] == round(metrics['top5'], 4)
    assert results['img_size'] == 32


@pytest.mark.parametrize('format', ['csv', 'json'])
def test_results_file_has_timms_columns(run, tmp_path, format):
    folder, _ = run
    path = tmp_path / 'results'
    assert validate.main(flags(folder, '--results-file', str(path), '--results-format', format)) == 0
    text = path.read_text()
    row = json.loads(text) if format == 'json' else next(csv.DictReader(text.splitlines()))
    assert list(row) == [
        'model', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'img_size', 'crop_pct', 'interpolation']


def test_half_precision_and_autocast_run(run, capsys):
    folder, _ = run
    assert validate.main(flags(folder, '--amp', '--amp-dtype', 'bfloat16')) == 0
    assert validate.main(flags(folder, '--model-dtype', 'bfloat16')) == 0


@pytest.mark.parametrize('more, message', [
    (['--model', 'test_resnett'], "Unknown model 'test_resnett' (did you mean test_resnet"),
    (['--model', 'test_vit'], '--model test_vit'),
    (['--checkpoint', 'missing.pth'], 'missing.pth'),
    (['--checkpoint', __file__], 'Cannot read'),
    (['--data-dir', 'no-such-folder'], 'no-such-folder'),
    (['--num-classes', '5'], '--num-classes'),
    (['--device', 'nonsense'], '--device'),
    (['--results-file', 'no/such/folder/results.csv'], '--results-file'),
    (['--model-kwargs', 'nonsense=1'], 'nonsense'),
])
def test_bad_input_gives_one_line_and_exit_code_2(run, capsys, more, message):
    folder, _ = run
    assert validate.main(flags(folder, *more)) == 2
    captured = capsys.readouterr()
    error = [line for line in captured.err.splitlines() if 'error: ' in line]
    assert len(error) == 1 and message in error[0]
    assert 'Traceback' not in captured.err and '--result' not in captured.out


@pytest.mark.parametrize('workers', ['0', '1'])
def test_corrupt_image_is_named(run, capsys, tmp_path, workers):
    folder, _ = run
    for label in range(6):
        class_dir = tmp_path / 'validation' / f'class{label}'
        class_dir.mkdir(parents=True)
        (class_dir / 'broken.png').write_bytes(b'no image')
    assert validate.main(flags(folder, '--data-dir', str(tmp_path), '-j', workers)) == 2
    assert 'broken.png' in capsys.readouterr().err


def test_folder_of_checkpoints_gives_a_row_each_the_best_first(run, capsys, tmp_path):
    folder, task = run
    other = timm.create_model('test_resnet', num_classes=6)
    torch.save(other.state_dict(), tmp_path / 'a.pth')
    torch.save({'state_dict': task.get_trainable_module().state_dict()}, tmp_path / 'b.pth.tar')
    torch.save({'something': 'else'}, tmp_path / 'c.pth')
    argv = flags(folder, '--checkpoint', str(tmp_path), '--results-file', str(tmp_path / 'out.csv'))
    assert validate.main(argv) == 0
    results = results_of(capsys.readouterr().out)
    assert {Path(row['checkpoint']).name for row in results} == {'a.pth', 'b.pth.tar'}
    assert results[0]['top1'] >= results[1]['top1']
    with open(tmp_path / 'out.csv') as f:
        assert [row['checkpoint'] for row in csv.DictReader(f)] == [row['checkpoint'] for row in results]


def test_file_of_names_evaluates_each_model(run, capsys, tmp_path):
    folder, _ = run
    (tmp_path / 'names.txt').write_text('test_resnet\n\ntest_vit\n')
    assert validate.main(flags(folder, '--model', str(tmp_path / 'names.txt'))) == 0  # the weights fit one of them
    assert [row['model'] for row in results_of(capsys.readouterr().out)] == ['test_resnet']


def test_wildcard_names_models(run):
    args = parse_args(create_validate_parser(), flags(run[0], '--model', 'test_resne*'))
    assert ('test_resnet', args.checkpoint) in validate.list_jobs(args)


def test_bulk_evaluation_without_any_success_is_an_error(run, capsys, tmp_path):
    torch.save({'something': 'else'}, tmp_path / 'c.pth')
    assert validate.main(flags(run[0], '--checkpoint', str(tmp_path))) == 2
    assert 'None of the 1 evaluations succeeded' in capsys.readouterr().err


def test_retry_halves_the_batch_until_memory_suffices(run, capsys, monkeypatch):
    sizes = []

    def evaluate_model(args):
        sizes.append(args.batch_size)
        if args.batch_size > 3:
            raise RuntimeError('CUDA out of memory')
        return {'model': 'x', 'top1': 0., 'top1_err': 0., 'top5': 0., 'top5_err': 0.}

    monkeypatch.setattr(validate_script, 'evaluate_model', evaluate_model)
    assert validate.main(flags(run[0], '--retry')) == 0
    assert sizes[0] == 8
    assert sizes[-1] <= 3
    assert sizes == sorted(sizes, reverse=True)


def test_valid_labels_and_averaged_metrics_agree_with_scikit_learn(run, capsys, tmp_path):
    sklearn_metrics = pytest.importorskip('sklearn.metrics')
    folder, task = run
    (tmp_path / 'labels.txt').write_text('5\n4\n3\n2\n1\n0\n')
    argv = flags(folder, '--valid-labels', str(tmp_path / 'labels.txt'), '--metrics-avg', 'macro')
    assert validate.main(argv) == 0
    results = results_of(capsys.readouterr().out)
    args = parse_args(create_validate_parser(), flags(folder))
    data_config = timm.data.resolve_data_config(vars(args), model=task.get_trainable_module(), use_test_size=True)
    loader = create_eval_loader(args, data_config, create_eval_dataset(args, data_config, 6), torch.device('cpu'))
    model = task.get_trainable_module().eval()
    with torch.no_grad():
        batches = [(5 - model(x).argmax(1), y) for x, y in loader]
    predicted, target = (torch.cat(column).numpy() for column in zip(*batches))
    assert results['top1'] == round(100 * float((predicted == target).mean()), 4)
    expected = 100 * sklearn_metrics.f1_score(target, predicted, average='macro', zero_division=0)
    assert results['macro_f1_score'] == pytest.approx(expected, abs=1e-3)


def test_real_labels_replace_the_accuracies(run, monkeypatch, capsys, tmp_path):
    folder, task = run

    class RealLabels:
        def __init__(self, filenames, real_json):
            assert len(filenames) == 30

        def add_result(self, output):
            assert output.shape[1] == 6

        def get_accuracy(self, k):
            return 10. * k

    monkeypatch.setattr('timm_distill.run.evaluate.RealLabelsImagenet', RealLabels)
    assert validate.main(flags(folder, '--real-labels', 'real.json')) == 0
    results = results_of(capsys.readouterr().out)
    assert (results['top1'], results['top5']) == (10., 50.)


@pytest.mark.parametrize('more', [
    ['--torchscript'], ['--reparam'], ['--crop-border-pixels', '2', '--crop-mode', 'squash'], ['--fast-norm']])
def test_other_forms_of_evaluation_run(run, capsys, more):
    assert validate.main(flags(run[0], *more)) == 0
    assert 0 <= results_of(capsys.readouterr().out)['top1'] <= 100


@pytest.mark.parametrize(('more', 'words'), [
    (['--num-gpu', '99'], '--num-gpu 99 is more than there are here'),
    (['--naflex-loader'], 'choose a naflexvit model'),
    (['--real-labels', 'none.json'], '50,000'),
    (['--valid-labels', 'none.txt'], 'one class index per line'),
    (['--model', 'no_such_model*'], 'matches no timm model'),
])
def test_flags_that_cannot_be_followed_are_one_line(run, capsys, more, words):
    assert validate.main(flags(run[0], *more)) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count('\n') == 1
