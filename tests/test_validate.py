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
from timm_distill.engine import evaluate

_spec = importlib.util.spec_from_file_location('validate', Path(__file__).parent.parent / 'validate.py')
assert _spec is not None and _spec.loader is not None
validate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(validate)


@pytest.fixture(autouse=True)
def _no_log_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    # they would outlive the captured streams that they write to
    monkeypatch.setattr(validate, 'setup_default_logging', lambda: None)


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
    metrics = evaluate(model, loader, device=torch.device('cpu'))
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
    (['--model', 'test_resnett'], 'similar ones: test_resnet'),
    (['--model', 'test_vit'], '--model test_vit'),
    (['--checkpoint', 'missing.pth'], 'missing.pth'),
    (['--checkpoint', __file__], 'cannot be read'),
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
