"""A teacher's model with its weights: timm's pretrained ones, those of a hub or folder, or those of a file.

Whatever is missing, unreadable or of another architecture is one clear error; nothing is re-initialised silently.
"""
import logging
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, cast
from unittest import mock

import timm
import torch
import torch.nn as nn
from timm.models import resolve_model_input_args

from ..errors import UsageError
from ..features.inputs import CANNOT_RUN
from ..features.parts import complete
from ..models.external import is_code, is_external
from ..models.named import cannot_build, check_name, create_model, is_hub
from ..utils.random import unchanged_randomness
from .preprocessing import InputRecord, is_same
from .weight_files import WeightFile, read_weight_file, recorded_size

_logger = logging.getLogger(__name__)

_FLAG = '--teacher-checkpoint'
_ARGUMENTS, _OTHER_WEIGHTS = '--teacher-kwargs', '--teacher-checkpoint FILE, or --no-teacher-pretrained'
_CLASS_COUNTS = (7, 8)  # any two: what differs between models of both is the classifier


@dataclass(frozen=True)
class TeacherSource:
    """Source of a teacher: the model that is loaded, and what the user says of its input.

    Attributes:
        name: timm architecture, `hf-hub:REPO` or `local-dir:FOLDER`.
        checkpoint: File with its weights, '' for those that come with the name.
        pretrained: Load the weights that come with the name.
        model_kwargs: More arguments of `timm.create_model`.
        weights: 'raw' or 'ema' of a training checkpoint; None takes the averaged ones where there are any.
        mean: Its normalisation, where that is not what the weights say.
        std: Likewise.
        img_size: Height and width that it is fed, likewise.
    """
    name: str
    checkpoint: str = ''
    pretrained: bool = True
    model_kwargs: Optional[Mapping[str, Any]] = None
    weights: Optional[str] = None
    mean: Optional[Sequence[float]] = None
    std: Optional[Sequence[float]] = None
    img_size: Optional[int] = None

    @property
    def is_hub(self) -> bool:
        """Whether the name stands for weights with a config of their own."""
        return is_hub(self.name)

    def flag_records(self) -> List[InputRecord]:
        """Return what the user says of the input."""
        size = None if self.img_size is None else (self.img_size, self.img_size)
        return [
            InputRecord('--teacher-mean', mean=self.mean), InputRecord('--teacher-std', std=self.std),
            InputRecord('--teacher-img-size', size=size)]


def load_teacher_model(
        source: TeacherSource,
        in_chans: int,
        num_classes: int,
        verbose: bool = True,
) -> Tuple[nn.Module, List[InputRecord]]:
    """Create a teacher's model with its weights.

    Args:
        source: Which one.
        in_chans: Channels of its input.
        num_classes: Class count, used only for a teacher without weights.
        verbose: Log what was loaded, warn of a teacher without weights.

    Returns:
        The model, and what is said of its input, the one that counts most first.

    Raises:
        UsageError: If the name is unknown, or the weights are missing, unreadable or of another architecture.
    """
    check_name(source.name, 'teacher')
    model, records = _load_model(source, in_chans, num_classes, verbose)
    if is_external(source.name):
        complete(model, source.name, 'teacher', in_chans)
    return model, records


def _load_model(
        source: TeacherSource,
        in_chans: int,
        num_classes: int,
        verbose: bool,
) -> Tuple[nn.Module, List[InputRecord]]:
    kwargs = {'in_chans': in_chans, **(source.model_kwargs or {})}
    if source.checkpoint:
        return _load_checkpoint_teacher(source, kwargs, verbose)
    kwargs = _with_size(source, kwargs, None)
    if source.pretrained:
        model = _load_pretrained_teacher(source.name, kwargs)
        return model, [*source.flag_records(), _pretrained_record(model, source)]
    if verbose:
        _logger.warning(
            f'The teacher {source.name} has random weights (--no-teacher-pretrained): there is nothing to '
            'learn from it. Give it weights with --teacher-checkpoint FILE.')
    if not is_code(source.name):  # a function gives the classes that it gives
        kwargs = {'num_classes': num_classes, **kwargs}
    return create_model(source.name, 'teacher', _ARGUMENTS, **kwargs), source.flag_records()


def _with_size(source: TeacherSource, kwargs: Dict[str, Any], size: Optional[Tuple[int, int]]) -> Dict[str, Any]:
    """Add the size that a model of fixed size is built for: the user's, else that of its weights.

    Raises:
        UsageError: If the user names two.
    """
    asked = kwargs.get('img_size')
    if source.img_size is not None and asked not in (None, source.img_size, (source.img_size, source.img_size)):
        raise UsageError(
            f'--teacher-img-size {source.img_size} and --teacher-kwargs img_size={asked} name two sizes: '
            'leave out one of them.')
    size = size if source.img_size is None else (source.img_size, source.img_size)
    if asked is not None or size is None or is_external(source.name):
        return kwargs
    try:
        resolved = resolve_model_input_args(source.name, {'img_size': size}, **kwargs)
    except Exception as e:  # a hub, a folder and timm's own checks each raise their own errors
        raise cannot_build(source.name, 'teacher', _ARGUMENTS, e) from e
    return {**kwargs, 'img_size': resolved['img_size']} if 'img_size' in resolved else kwargs


def _pretrained_record(model: nn.Module, source: TeacherSource) -> InputRecord:
    """Return what pretrained weights say of themselves; a size of timm's own is known, but not kept to."""
    config = cast(Dict[str, Any], model.pretrained_cfg)
    names_itself = source.is_hub or is_external(source.name)
    name = source.name if names_itself else f"timm's pretrained {config.get('architecture', source.name)}"
    tag = config.get('tag')
    if tag and not names_itself:
        name = f'{name}.{tag}' if not name.endswith(f'.{tag}') else name
    size = recorded_size(config)
    keeps_size = (source.is_hub or config.get('fixed_input_size')) and 'img_size' not in (source.model_kwargs or {})
    return InputRecord(
        name, config.get('mean'), config.get('std'), size if keeps_size else None,
        config.get('interpolation'), trained_size=size)


def _load_pretrained_teacher(name: str, kwargs: Dict[str, Any]) -> nn.Module:
    if 'num_classes' in kwargs:
        raise UsageError(
            f'--teacher-kwargs num_classes={kwargs["num_classes"]} would re-initialise the head of the '
            f"pretrained teacher '{name}'. Leave it out, or give --teacher-checkpoint FILE.")
    if not is_hub(name) and not is_external(name) and not timm.is_model_pretrained(name):
        raise UsageError(
            f"timm has no pretrained weights for the teacher '{name}'. Give --teacher-checkpoint FILE, or "
            '--no-teacher-pretrained to distil from random weights.')
    return create_model(name, 'teacher', f'{_ARGUMENTS}, or give {_OTHER_WEIGHTS}', pretrained=True, **kwargs)


# Weights of a file

def _load_checkpoint_teacher(
        source: TeacherSource,
        kwargs: Dict[str, Any],
        verbose: bool,
) -> Tuple[nn.Module, List[InputRecord]]:
    file = read_weight_file(source.checkpoint, _FLAG, source.weights)
    kwargs = _with_file_kwargs(source, file, kwargs, verbose)
    kwargs = _with_size(source, kwargs, file.size)
    state_dict, num_classes = fit_weights(source.name, file.state_dict, kwargs, source.checkpoint)
    kwargs = {**kwargs, **({} if num_classes is None else {'num_classes': num_classes})}
    model = create_model(source.name, 'teacher', _ARGUMENTS, **kwargs)
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as e:
        raise UsageError(
            f"{_FLAG} {source.checkpoint} does not fit the architecture '{source.name}': "
            f'{_load_error(model, state_dict)}. Change --teacher or --teacher-kwargs.') from e
    if file.label_names is not None:
        config = getattr(model, 'pretrained_cfg', None) or {}
        cast(Any, model).pretrained_cfg = {**config, 'label_names': file.label_names}
    if verbose and file.entry:
        _logger.info(f"Teacher weights: '{file.entry}' of {source.checkpoint}.")
    if verbose and num_classes == 0:
        _logger.info(f'{source.checkpoint} holds no classifier: the teacher gives features and no logits.')
    records = _file_records(source, file, model)
    if verbose:
        _warn_of_contradictions(source, records)
    return model, [*source.flag_records(), *records]


def _with_file_kwargs(
        source: TeacherSource,
        file: WeightFile,
        kwargs: Dict[str, Any],
        verbose: bool,
) -> Dict[str, Any]:
    """Add the arguments that the file's own run gave its model; those of the user win."""
    if file.architecture != source.name:
        return kwargs
    taken = {name: value for name, value in file.model_kwargs.items() if name not in kwargs}
    if taken and verbose:
        words = ' '.join(f'{name}={value}' for name, value in taken.items())
        _logger.info(f'Teacher arguments from the args in {source.checkpoint}: {words} (--teacher-kwargs wins).')
    return {**taken, **kwargs}


def _file_records(source: TeacherSource, file: WeightFile, model: nn.Module) -> List[InputRecord]:
    """Return what a file says of the input; where it says nothing, the architecture's default is assumed."""
    config = getattr(model, 'pretrained_cfg', None) or {}
    default = InputRecord(
        f"the architecture's default, {source.checkpoint} says nothing of it", config.get('mean'), config.get('std'),
        interpolation=config.get('interpolation'), assumed=True)
    if file.follows_defaults:
        default = replace(
            default, source=f'{file.follows_defaults}: the default', size=recorded_size(config), assumed=False)
    records = [*file.records, default]
    if 'img_size' in (source.model_kwargs or {}):
        records = [replace(record, size=None) for record in records]
    return records


def _warn_of_contradictions(source: TeacherSource, records: Sequence[InputRecord]) -> None:
    for name in ('mean', 'std'):
        said = next((r for r in records if getattr(r, name) is not None and not r.assumed), None)
        given = getattr(source, name)
        if given is not None and said is not None and not is_same(given, getattr(said, name)):
            _logger.warning(
                f'--teacher-{name} {" ".join(map(str, given))} is used, though {said.source} says '
                f'{getattr(said, name)}: leave the flag out unless that is wrong.')


def fit_weights(
        name: str,
        state_dict: Dict[str, torch.Tensor],
        kwargs: Mapping[str, Any],
        path: str,
) -> Tuple[Dict[str, torch.Tensor], Optional[int]]:
    """Bring weights into an architecture's own form.

    Weights under its own names and shapes stay as they are. Others go through timm's filter for the checkpoints of the
    architecture, which renames, and resamples position embeddings to the size that the model is built for.

    Args:
        name: Architecture.
        state_dict: Weights.
        kwargs: Arguments of `timm.create_model`.
        path: File of the weights, for messages.

    Returns:
        The weights, and the class count that all of the model's heads have in them: 0 without heads, None where the
        architecture has none.

    Raises:
        UsageError: If the heads have different class counts, or another one than is asked for.
    """
    with unchanged_randomness():
        shapes, class_dims = find_class_tensors(name, kwargs)
        body = {key: shape for key, shape in shapes.items() if key not in class_dims}
        own = {key: tuple(tensor.shape) for key, tensor in state_dict.items() if key not in class_dims}
        if own != body:
            converted = _convert(name, state_dict, kwargs, shapes)
            _log_resampled(state_dict, converted)
            state_dict = converted
    num_classes = _count_classes(state_dict, class_dims, path)
    asked = kwargs.get('num_classes')
    if asked == 0:
        return {key: tensor for key, tensor in state_dict.items() if key not in class_dims}, 0
    if asked is not None and num_classes is not None and asked != num_classes:
        raise UsageError(
            f'--teacher-kwargs num_classes={asked} would re-initialise the head of the teacher: {path} '
            f'has {num_classes or "no"} classes. Leave it out.')
    return state_dict, num_classes


def find_class_tensors(
        name: str,
        kwargs: Mapping[str, Any],
) -> Tuple[Dict[str, Tuple[int, ...]], Dict[str, int]]:
    """Return the shape of every tensor of an architecture, and the dimension that is the class count where one is.

    Both are read off two models that differ in nothing but their class count, built without memory where that goes.
    """
    shapes, others = (_shapes(name, {**kwargs, 'num_classes': count}) for count in _CLASS_COUNTS)
    class_dims = {
        key: next(i for i, (a, b) in enumerate(zip(shape, others[key])) if a != b)
        for key, shape in shapes.items() if key in others and others[key] != shape
    }
    return shapes, class_dims


def _shapes(name: str, kwargs: Mapping[str, Any]) -> Dict[str, Tuple[int, ...]]:
    try:
        with torch.device('meta'):
            model = timm.create_model(name, **kwargs)
    except (*CANNOT_RUN, OSError):  # computes with its weights while it is built, or cannot be built at all
        model = create_model(name, 'teacher', _ARGUMENTS, **kwargs)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def _convert(
        name: str,
        state_dict: Dict[str, torch.Tensor],
        kwargs: Mapping[str, Any],
        shapes: Mapping[str, Tuple[int, ...]],
) -> Dict[str, torch.Tensor]:
    """Return what timm loads into an architecture when it is given weights: the output of its own filter."""
    converted: Dict[str, torch.Tensor] = {}

    def _keep(module: nn.Module, weights: Mapping[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        converted.update(weights)
        return SimpleNamespace(missing_keys=[], unexpected_keys=[])

    count = _CLASS_COUNTS[0]
    overlay = dict(state_dict=dict(state_dict), source='', num_classes=count, label_offset=0)
    try:
        with mock.patch.object(nn.Module, 'load_state_dict', _keep):  # timm has no other way to its filters
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **{**kwargs, 'num_classes': count})
    except CANNOT_RUN as e:  # a filter that these weights are not for
        _logger.debug(f'The filter of {name} does not take these weights: {e}')
        return state_dict
    return converted


def _log_resampled(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> None:
    changed = [
        f'{key} {list(before[key].shape)} -> {list(tensor.shape)}' for key, tensor in after.items()
        if key in before and before[key].shape != tensor.shape]
    if changed:
        _logger.warning(
            'Weights of the teacher were made for another input and are resampled: '
            f'{", ".join(changed[:3])}{", ..." if len(changed) > 3 else ""}. --teacher-img-size N is the '
            'size that it runs at.')


def _count_classes(state_dict: Mapping[str, torch.Tensor], class_dims: Mapping[str, int], path: str) -> Optional[int]:
    """Return the class count of all heads in the weights; 0 without heads, None where the architecture has none."""
    if not class_dims:
        return None
    counts = {
        key: state_dict[key].shape[dim] for key, dim in class_dims.items()
        if key in state_dict and state_dict[key].ndim > dim}
    if len(set(counts.values())) > 1:
        raise UsageError(
            f'{_FLAG} {path}: its heads have different class counts: '
            f'{", ".join(f"{key} {count}" for key, count in counts.items())}.')
    return next(iter(counts.values()), 0)


def _load_error(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> str:
    own = model.state_dict()
    missing = sorted(own.keys() - state_dict.keys())
    unexpected = sorted(state_dict.keys() - own.keys())
    shapes = [
        f'{k} is {list(state_dict[k].shape)}, not {list(own[k].shape)}'
        for k in own if k in state_dict and own[k].shape != state_dict[k].shape]
    parts = [
        f'{len(keys)} {what} ({", ".join(keys[:3])}{", ..." if len(keys) > 3 else ""})'
        for what, keys in (('missing', missing), ('unexpected', unexpected), ('of another shape', shapes)) if keys
    ]
    return ', '.join(parts)
