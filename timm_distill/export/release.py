"""Release of a training checkpoint: plain timm weights, a folder in the hub's format, ONNX.

    python -m timm_distill.export output/train/RUN/model_best.pth.tar --output released

Reads the student's own entries of a checkpoint alone; methods, teachers and tasks are unknown here.
"""
import argparse
import json
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Sequence

import numpy as np
import timm
import torch
import torch.nn as nn
from safetensors.torch import save_file
from timm.data import resolve_data_config
from timm.models import clean_state_dict, save_for_hf

from ..checkpoint.file import flush, put_in_place, read_checkpoint, respect_umask, write_checkpoint, written_at_once
from ..checkpoint.run_files import nonfinite_tensors
from ..checkpoint.weights import refuse_unmerged
from ..errors import UsageError
from ..models.external import is_code, is_external
from ..models.named import create_model, is_hub
from ..utils.text import printable
from .model_card import create_model_card

ONNX_TOLERANCE = 1e-3  # largest logit difference, relative to the logits' spread
_ONNX_BATCH = 3  # an exported graph with a fixed batch would not take it

_MODEL_ARGS = (
    'num_classes', 'in_chans', 'global_pool', 'drop_rate', 'drop_path_rate', 'drop_block_rate', 'bn_momentum', 'bn_eps')

_OF_OTHER_WEIGHTS = (
    'url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'tag', 'label_names', 'label_descriptions',
    'label_offset', 'license', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes')


@dataclass
class Release:
    """A student that is ready to be given away.

    Attributes:
        model: Plain timm model in eval mode, float32, on the CPU.
        architecture: timm name.
        data_config: What its input looks like: input_size, mean, std, interpolation, crop_pct, crop_mode.
        provenance: Where it comes from, plain values by name.
        ema: Whether the weights are the averaged ones.
        label_names: Name of every class in label order, None where they are not known.
    """
    model: nn.Module
    architecture: str
    data_config: Dict[str, Any]
    provenance: Dict[str, Any] = field(default_factory=dict)
    ema: bool = False
    label_names: Optional[Sequence[str]] = None


def load_release(checkpoint: str, use_ema: Optional[bool] = None, model_name: str = '') -> Release:
    """Read a checkpoint of a training run.

    Args:
        checkpoint: File that `train_distill.py` wrote.
        use_ema: Take the averaged weights; None takes them where the file has them.
        model_name: Name of the student, needed where that is a function of a file: no checkpoint has code run.

    Raises:
        UsageError: If the file is missing, is no checkpoint of a run, would run code, or has no averaged weights.
    """
    state = _read(checkpoint)
    has_ema = 'state_dict_ema' in state
    if use_ema and not has_ema:
        raise UsageError(f'{checkpoint} holds no averaged weights: leave out --use-ema.')
    ema = has_ema if use_ema is None else use_ema
    args: argparse.Namespace = _with_model(state['args'], checkpoint, model_name)
    model = _create_model(args)
    try:
        model.load_state_dict(clean_state_dict(state['state_dict_ema' if ema else 'state_dict']))
        _check_finite(model, checkpoint)
    except RuntimeError as e:
        raise UsageError(
            f"{checkpoint} does not fit its own architecture '{args.model}' as timm {timm.__version__} "
            f'builds it: {str(e).splitlines()[-1].strip()}') from e
    data_config = state.get('data_config') or resolve_data_config(vars(args), model=model, use_test_size=False)
    provenance = {**(state.get('provenance') or {}), 'metrics': _metrics(state)}
    return Release(model.float().eval(), args.model, dict(data_config), provenance, ema, state.get('label_names'))


def _with_model(args: argparse.Namespace, checkpoint: str, model_name: str) -> argparse.Namespace:
    """Return a run's flags with the name of its student that the user gave."""
    if is_code(args.model) and not model_name:
        raise UsageError(
            f'{checkpoint} is of a student that a function of a file builds: give --model FILE.py:FUNCTION to run it '
            f'(the run named {printable(args.model)!r}).')
    if model_name and model_name != args.model and not (is_code(args.model) and is_code(model_name)):
        raise UsageError(f"{checkpoint} is of '{args.model}', not of --model {model_name}: leave the flag out.")
    return argparse.Namespace(**{**vars(args), 'model': model_name or args.model})


def _check_finite(model: nn.Module, checkpoint: str) -> None:
    nonfinite = nonfinite_tensors(model.state_dict(), constant=None)
    if nonfinite:
        raise UsageError(
            f'{checkpoint}: its weights are not finite ({", ".join(nonfinite[:3])}), the run diverged '
            'before it was written: give an earlier checkpoint. Nothing was written.')


def _metrics(state: Dict[str, Any]) -> Dict[str, Any]:
    if state.get('metric') is None:
        return {}
    name = state.get('metric_name') or f'validation {state["args"].eval_metric}'
    return {name: float(state['metric']), 'epochs trained': int(state['epoch']) + 1}


def _read(checkpoint: str) -> Dict[str, Any]:
    state = read_checkpoint(checkpoint, 'CHECKPOINT')
    refuse_unmerged(state, checkpoint, 'CHECKPOINT')
    if not isinstance(state.get('args'), argparse.Namespace) or 'state_dict' not in state:
        raise UsageError(
            f'{checkpoint} holds no flags of a run: give a last.pth.tar, model_best.pth.tar or '
            'checkpoint-N.pth.tar that train_distill.py wrote.')
    return state


def _create_model(args: argparse.Namespace) -> nn.Module:
    """Create the student as the run did, without its initial weights."""
    kwargs = _student_kwargs(args)
    if is_hub(args.model):
        kwargs['pretrained'] = False
    return create_model(args.model, 'student', '--model-kwargs', **kwargs)


def _student_kwargs(args: argparse.Namespace) -> Dict[str, Any]:
    names = dict(global_pool='gp', drop_rate='drop', drop_path_rate='drop_path', drop_block_rate='drop_block')
    kwargs = {name: getattr(args, names.get(name, name), None) for name in _MODEL_ARGS}
    if kwargs['in_chans'] is None:
        kwargs['in_chans'] = args.input_size[0] if getattr(args, 'input_size', None) else 3
    return {**kwargs, **(getattr(args, 'model_kwargs', None) or {})}


def export_hub(release: Release, folder: str) -> str:
    """Write `config.json`, `model.safetensors` and a model card.

    `timm.create_model('local-dir:FOLDER', pretrained=True)` builds the student from it. The files are complete and on
    disk before the first of them has its place; other files of the folder stay.

    Args:
        release: What to write.
        folder: Made where it does not exist.

    Returns:
        The folder.
    """
    parent = os.path.dirname(os.path.abspath(folder))
    os.makedirs(parent, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix='.hub-', suffix='.tmp', dir=parent)
    try:
        _write_hub_files(release, temporary)
        _put_folder_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _put_folder_in_place(source: str, target: str) -> None:
    """Move files, the config last: without one a folder is no model to anybody."""
    config, names = 'config.json', sorted(os.listdir(source))
    os.makedirs(target, exist_ok=True)
    if os.path.exists(os.path.join(target, config)):
        os.remove(os.path.join(target, config))
    for name in sorted(names, key=lambda name: name == config):
        flush(os.path.join(source, name))
        put_in_place(os.path.join(source, name), os.path.join(target, name))


def _write_hub_files(release: Release, folder: str) -> None:
    if is_external(release.architecture):
        _write_external_files(release, folder)
        return
    forget_source(release.model)
    model_config = {'label_names': list(release.label_names)} if release.label_names else None
    save_for_hf(
        release.model, folder, model_config=model_config, safe_serialization=True, data_config=release.data_config)
    respect_umask(os.path.join(folder, 'model.safetensors'))
    card = create_model_card(
        release.architecture, printable(release.provenance), release.data_config, release.ema,
        headless=getattr(release.model, 'num_classes', 1) == 0)
    card.save(os.path.join(folder, 'README.md'))


def _write_external_files(release: Release, folder: str) -> None:
    """Write a student that timm does not build: its config names no architecture of timm, its card says what does."""
    save_file(_tensors(release), os.path.join(folder, 'model.safetensors'))
    respect_umask(os.path.join(folder, 'model.safetensors'))
    config = {
        'model': os.path.basename(release.architecture), 'num_classes': getattr(release.model, 'num_classes', None),
        'pretrained_cfg': release.data_config}
    if release.label_names:
        config['label_names'] = list(release.label_names)
    with open(os.path.join(folder, 'config.json'), 'w', encoding='utf-8') as file:
        json.dump(printable(config), file, indent=2, default=str)
    card = create_model_card(
        os.path.basename(release.architecture), printable(release.provenance), release.data_config, release.ema,
        load=describe_loading(release.architecture))
    card.save(os.path.join(folder, 'README.md'))


def describe_loading(name: str) -> str:
    """Return Python that loads the folder's weights into a model that timm does not build, by its name."""
    if is_code(name):
        path, _, function = os.path.basename(name).rpartition(':')
        build = (
            f'from {path[:-3]} import {function}  # {path} of whoever trained it\n\n'
            f'model = {function}(...)  # the module that it returns')
    else:
        architecture = name.partition(':')[2].partition('.')[0]
        build = f'import torchvision\n\nmodel = torchvision.models.get_model({architecture!r}, num_classes=...)'
    return f"{build}\nmodel.load_state_dict(safetensors.torch.load_file('model.safetensors'))"


def _tensors(release: Release) -> Dict[str, torch.Tensor]:
    # copies: a file holds no two names of one tensor
    return {name: tensor.contiguous().clone() for name, tensor in release.model.state_dict().items()}


def forget_source(model: nn.Module) -> None:
    """Take out of a model's config what it says of the weights that timm offers for the architecture.

    Their tag, address, licence, papers and labels are not those of the weights that were trained here.
    """
    described: Any = model
    described.pretrained_cfg = {
        name: value for name, value in described.pretrained_cfg.items() if name not in _OF_OTHER_WEIGHTS}


def export_weights(release: Release, path: str) -> str:
    """Write the weights alone, for `timm.create_model(NAME, checkpoint_path=PATH)`: .safetensors, or .pth.

    Returns:
        The path.
    """
    tensors = _tensors(release)
    with written_at_once(path) as name:
        if path.endswith('.safetensors'):
            save_file(tensors, name)
            respect_umask(name)
        else:
            write_checkpoint(tensors, name)
    return path


def export_onnx(release: Release, path: str) -> float:
    """Write an ONNX graph with a free batch size and compare it with torch in onnxruntime.

    Args:
        release: What to write.
        path: File to write.

    Returns:
        Largest logit difference over the logits' spread.

    Raises:
        UsageError: If a package is missing, the model cannot be exported, or the graph's logits differ.
    """
    _require('onnx', 'onnxscript', 'onnxruntime')
    images = torch.randn(_ONNX_BATCH, *release.data_config['input_size'], generator=torch.Generator().manual_seed(0))
    try:
        torch.onnx.export(
            release.model,
            (images[:2],),
            path,
            input_names=['images'],
            output_names=['logits'],
            dynamic_shapes={'x': {0: torch.export.Dim('batch', min=1)}} if _takes_x(release.model) else None,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    except Exception as e:  # tracing runs all of the model's own code
        raise UsageError(
            f"'{release.architecture}' cannot be exported to ONNX: {type(e).__name__}: "
            f'{" ".join(str(e).split())[:300]}') from e
    error = _compare_onnx(release.model, path, images)
    if not error <= ONNX_TOLERANCE:
        os.remove(path)
        raise UsageError(
            f"The ONNX graph of '{release.architecture}' gives other logits than torch: largest "
            f'difference {error:.2g} of their spread, allowed {ONNX_TOLERANCE:g}. Nothing was written.')
    return error


def _takes_x(model: nn.Module) -> bool:
    return 'x' in model.forward.__code__.co_varnames[:model.forward.__code__.co_argcount]


def _compare_onnx(model: nn.Module, path: str, images: torch.Tensor) -> float:
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    with torch.no_grad():
        expected = model(images).numpy()
    (actual,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return float(np.abs(actual - expected).max() / np.abs(expected - expected.mean()).max())


def push_to_hub(folder: str, repo_id: str) -> str:
    """Upload a folder that `export_hub` wrote; the token is the one of `huggingface-cli login` or HF_TOKEN.

    Returns:
        Address of the upload.

    Raises:
        UsageError: If the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi
    api = HfApi(library_name='timm', library_version=timm.__version__)
    try:
        repo = api.create_repo(repo_id, exist_ok=True)
        return str(api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message='Add model'))
    except Exception as e:  # no connection, no token, no rights: each has an error of its own
        reason = str(e).splitlines()[0] if str(e) else 'no message'
        raise UsageError(
            f'--push-to-hub {repo_id}: {type(e).__name__}: {reason} '
            f'The folder {folder} is complete; it can be pushed later.') from e


def _require(*packages: str) -> None:
    import importlib.util
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"Exporting to ONNX needs {', '.join(missing)}: pip install 'timm_distill[export]'.")
