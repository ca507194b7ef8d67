"""Giving a student away: hub folder, weights, ONNX, model card."""
import argparse
import errno
import json
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from timm.data import AugMixDataset, ImageDataset

import train_distill
import validate
from timm_distill import UsageError
from timm_distill.checkpoint.resume import resume_task
from timm_distill.data import IndexedDataset, label_names
from timm_distill.export import release as export
from timm_distill.export.__main__ import main
from timm_distill.export.model_card import create_model_card
from timm_distill.export.release import (
    Release,
    export_hub,
    export_onnx,
    export_weights,
    load_release,
    push_to_hub,
)
from timm_distill.run import RunResult
from timm_distill.teacher.weight_files import read_weight_file

MEAN = (0.4, 0.5, 0.6)


@pytest.fixture(scope='module')
def run(digits_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A short distillation with averaged weights and an input of its own size and normalisation."""
    teacher = tmp_path_factory.mktemp('teacher') / 'teacher.pth'
    torch.save(timm.create_model('test_resnet', num_classes=10).state_dict(), teacher)
    return train_distill.main([
        '--data-dir', str(digits_dir), '--output', str(tmp_path_factory.mktemp('run')), '--num-classes', '10',
        '--img-size', '32', '--mean', *map(str, MEAN), '-b', '30', '--epochs', '1', '--warmup-epochs', '0', '--opt',
        'adamw', '--lr', '1e-3', '-j', '0', '--device', 'cpu', '--student', 'test_efficientnet', '--teacher',
        'test_resnet', '--teacher-checkpoint', str(teacher), '--kd', 'norm', '--model-ema', '--model-ema-decay', '0.5',
        '--no-report'])


def run_data(run: RunResult) -> str:
    """Return the data folder of a run."""
    return str(torch.load(run.checkpoint, weights_only=False)['args'].data_dir)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def test_a_run_leaves_a_hub_folder_that_plain_timm_loads_with_the_averaged_weights(run: Any) -> None:
    model = timm.create_model(f'local-dir:{run.output_dir}/hub', pretrained=True)  # alone: test_train_distill.py
    config = timm.data.resolve_data_config(model=model)
    assert tuple(config['mean']) == MEAN and tuple(config['input_size']) == (3, 32, 32), config
    saved, loaded = torch.load(run.checkpoint, weights_only=False)['state_dict_ema'], model.state_dict()
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_the_model_card_says_where_the_student_comes_from(run: Any) -> None:
    card = (Path(run.output_dir) / 'hub' / 'README.md').read_text()
    for fact in ('test_efficientnet distilled from test_resnet', '`norm`', 'top1', timm.__version__, '3 x 32 x 32'):
        assert fact in card, fact
    assert str(Path(run.output_dir).parent) not in card  # paths say nothing to others


def test_raw_weights_are_exported_on_request(run: Any, tmp_path: Path) -> None:
    weights = str(tmp_path / 'w.safetensors')
    main([run.checkpoint, '--output', str(tmp_path / 'hub'), '--weights', weights, '--no-use-ema'])
    state = torch.load(run.checkpoint, weights_only=False)
    model = timm.create_model('test_efficientnet', num_classes=10, checkpoint_path=weights)
    assert all(torch.equal(v, state['state_dict'][k]) for k, v in model.state_dict().items())
    assert 'weights as trained' in (tmp_path / 'hub' / 'README.md').read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_onnx_gives_torchs_logits_at_another_batch_size(run: Any, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip('onnxruntime', reason='the export extra is not installed')
    pytest.importorskip('onnxscript', reason='the export extra is not installed')
    path = str(tmp_path / 'student.onnx')
    assert export_onnx(load_release(run.checkpoint), path) < 1e-4
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    images = torch.randn(5, 3, 32, 32)
    (actual,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = load_release(run.checkpoint).model(images)
    torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-4, atol=1e-4)


def test_a_failed_push_names_the_reason_and_the_folder_that_is_complete(
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub

    def refuse(self: Any, repo_id: str, **kwargs: Any) -> None:
        raise PermissionError('no token')
    monkeypatch.setattr(huggingface_hub.HfApi, 'create_repo', refuse)
    with pytest.raises(UsageError, match='no token.*can be pushed later'):
        push_to_hub(str(tmp_path), 'me/student')


class _Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path('exploded'),))


@pytest.mark.parametrize('content, message', [
    (None, 'No checkpoint file'),
    (b'not a checkpoint', 'Cannot read'),
    ({'state_dict': {}}, 'holds no flags of a run'),
    ({'args': _Bomb()}, 'is refused'),
], ids=['missing', 'damaged', 'weights_alone', 'code'])
def test_a_file_that_cannot_be_exported_is_one_clear_error(
        content: Any,
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'last.pth.tar'
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path, pickle_module=pickle)
    with pytest.raises(UsageError, match=message):
        main([str(path)])
    assert not (tmp_path / 'exploded').exists() and not (tmp_path / 'hub').exists()


@pytest.mark.parametrize('former', [False, True], ids=['marked', 'former version'])
def test_unmerged_tensors_are_no_student_for_any_reader(run: Any, tmp_path: Path, capsys: Any, former: bool) -> None:
    state = torch.load(run.checkpoint, weights_only=False)
    prefix = '' if former else 'unmerged_'
    raw = {f'{prefix}{name}': state[name] for name in ('state_dict', 'task_state')}
    path = tmp_path / 'unmerged-0.pth.tar'
    torch.save({'args': state['args'], 'epoch': 0, **raw}, path)
    with pytest.raises(UsageError, match='could not be merged'):
        load_release(str(path))
    assert validate.main(['--data-dir', 'none', '--model', 'test_efficientnet', '--checkpoint', str(path)]) == 2
    assert 'could not be merged' in capsys.readouterr().err
    with pytest.raises(UsageError, match='could not be merged'):
        resume_task(None, str(path))  # type: ignore[arg-type]
    if not former:
        with pytest.raises(RuntimeError):  # plain timm
            timm.create_model('test_efficientnet', num_classes=10, checkpoint_path=str(path))
        with pytest.raises(UsageError):
            read_weight_file(str(path), '--teacher-checkpoint')


@pytest.mark.parametrize('name', ['hub', 'file'])
def test_released_weights_have_the_permissions_that_the_umask_leaves(run: Any, tmp_path: Path, name: str) -> None:
    former = os.umask(0o022)
    try:
        main([run.checkpoint, '--output', str(tmp_path / 'hub'), '--weights', str(tmp_path / 'w.safetensors')])
    finally:
        os.umask(former)
    path = tmp_path / 'w.safetensors' if name == 'file' else tmp_path / 'hub' / 'model.safetensors'
    assert path.stat().st_mode & 0o777 == 0o644


def test_averaged_weights_that_are_not_there_are_an_error(run: Any, tmp_path: Path) -> None:
    state = torch.load(run.checkpoint, weights_only=False)
    del state['state_dict_ema']
    torch.save(state, tmp_path / 'last.pth.tar')
    with pytest.raises(UsageError, match='--use-ema'):
        load_release(str(tmp_path / 'last.pth.tar'), use_ema=True)
    assert not load_release(str(tmp_path / 'last.pth.tar')).ema


def test_a_card_without_provenance_is_still_a_card() -> None:
    card = create_model_card('resnet18', {}, {'input_size': (3, 224, 224)})
    assert card.data.to_dict() == {
        'tags': ['image-classification', 'timm', 'knowledge-distillation'],
        'pipeline_tag': 'image-classification', 'library_name': 'timm'}
    assert card.text.startswith('\n# resnet18\n') and 'without a teacher' in card.text


def test_the_card_s_metadata_hold_the_measured_metric_where_the_hub_looks_for_it(run: Any) -> None:
    card = ModelCard.load(Path(run.output_dir) / 'hub' / 'README.md')
    (result,) = card.data.eval_results
    assert (result.task_type, result.metric_type) == ('image-classification', 'accuracy')
    assert result.metric_value == pytest.approx(run.best_metric, abs=1e-3)
    assert card.data.model_name == 'test_efficientnet' and card.data.library_name == 'timm'


@pytest.mark.parametrize('kind', ['stock', 'of_its_own_classes'])
def test_the_hub_config_says_nothing_of_the_weights_that_timm_offers(kind: str, tmp_path: Path) -> None:
    classes = 1000 if kind == 'stock' else 10
    model = timm.create_model('test_resnet', num_classes=classes)
    tag = model.pretrained_cfg['tag']
    model.pretrained_cfg = {
        **model.pretrained_cfg, 'license': 'cc-by-nc-4.0', 'label_names': ['a'] * 1000,
        'paper_ids': 'arXiv:1', 'url': 'https://x', 'description': 'of others'}
    names = [f'class {i}' for i in range(classes)]
    export_hub(Release(model, 'test_resnet', {'input_size': (3, 32, 32)}, label_names=names), str(tmp_path))
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['label_names'] == names and config['architecture'] == 'test_resnet'
    assert not {'tag', 'url', 'license', 'label_names', 'paper_ids', 'description'} & set(config['pretrained_cfg'])
    assert tag and tag not in (tmp_path / 'config.json').read_text()
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert loaded.num_classes == classes and loaded.pretrained_cfg['input_size'] == (3, 32, 32)


def test_class_folders_name_the_labels_in_the_hub_config(run: Any) -> None:
    config = json.loads((Path(run.output_dir) / 'hub' / 'config.json').read_text())
    folders = sorted(path.name for path in (Path(run_data(run)) / 'train').iterdir())
    assert config['label_names'] == folders


def test_released_files_can_be_read_by_those_who_may_read_other_files(run: Any, tmp_path: Path) -> None:
    weights = tmp_path / 'w.safetensors'
    export_weights(load_release(run.checkpoint), str(weights))
    usual = tmp_path / 'usual'
    usual.write_text('')
    hub = Path(run.output_dir) / 'hub'
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (*hub.iterdir(), weights, usual)}
    assert set(modes.values()) == {modes['usual']}, modes


def test_the_hub_config_names_the_architecture_and_the_classes(run: Any) -> None:
    config = json.loads((Path(run.output_dir) / 'hub' / 'config.json').read_text())
    assert config['architecture'] == 'test_efficientnet' and config['num_classes'] == 10
    assert isinstance(torch.load(run.checkpoint, weights_only=False)['args'], argparse.Namespace)


def test_labels_are_known_through_views_of_a_dataset_and_unknown_where_a_class_has_no_name(digits_dir: Path) -> None:
    dataset = ImageDataset(str(digits_dir / 'train'))
    folders = sorted(path.name for path in (digits_dir / 'train').iterdir())
    assert label_names(IndexedDataset(dataset), 10) == label_names(AugMixDataset(dataset), 10) == folders
    assert label_names(dataset, 11) is None and label_names(torch.utils.data.TensorDataset(), 10) is None


@pytest.mark.parametrize('failing', ['save_for_hf', 'create_model_card', 'put_in_place'])
def test_hub_folder_that_could_not_be_completed_does_not_look_complete(
        run: Any,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        failing: str,
) -> None:
    release = load_release(run.checkpoint)
    write = getattr(export, failing)

    def write_and_stop(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(export, failing, write_and_stop)
    with pytest.raises(KeyboardInterrupt):
        export_hub(release, str(tmp_path / 'hub'))
    assert os.listdir(tmp_path) == (['hub'] if failing == 'put_in_place' else [])
    assert not (tmp_path / 'hub' / 'config.json').exists()
    monkeypatch.undo()
    (tmp_path / 'hub').mkdir(exist_ok=True)
    (tmp_path / 'hub' / 'notes.txt').write_text('mine')
    export_hub(release, str(tmp_path / 'hub'))
    assert sorted(os.listdir(tmp_path / 'hub')) == ['README.md', 'config.json', 'model.safetensors', 'notes.txt']
    assert os.listdir(tmp_path) == ['hub']


@pytest.mark.parametrize('failing', ['save_for_hf', 'save_file', 'write_checkpoint'])
def test_export_onto_a_full_disk_is_one_message_and_leaves_what_was_there(
        run: Any,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        failing: str,
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        (Path(args[1]) / 'half' if failing == 'save_for_hf' else Path(args[1])).write_bytes(b'half')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    weights = tmp_path / f'w.{"safetensors" if failing == "save_file" else "pth"}'
    weights.write_bytes(b'former')
    monkeypatch.setattr(export, failing, full)
    with pytest.raises(UsageError, match='could not be written .No space left') as error:
        main([run.checkpoint, '--output', str(tmp_path / 'hub'), '--weights', str(weights)])
    assert '\n' not in str(error.value)
    assert weights.read_bytes() == b'former'
    assert set(os.listdir(tmp_path)) <= {'hub', weights.name}
