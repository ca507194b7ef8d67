"""The frozen teacher: eval and no gradient from construction, with its own normalisation and input size.

A teacher keeps the class count of its weights; nothing of it is ever re-initialised silently.
"""
import difflib
import logging
import os
from typing import AbstractSet, Any, Dict, List, Optional, Sequence, Tuple, Union

import timm
import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import load_state_dict

from .errors import UsageError
from .heads import HeadInput, find_head_input
from .layouts import FeatureLayout
from .probing import evaluation_mode, random_images, resize_images, runnable_size
from .taps import (
    Features,
    Stage,
    classifier_linear,
    classifier_reads_pre_logits,
    forward_with_stages,
    has_head,
    last_linear,
    last_stage_feature,
    resolve_feature_layout,
    resolve_stages,
    stages_share_trunk,
)

_logger = logging.getLogger(__name__)

TEACHER_OUTPUTS = frozenset({'logits', 'feature', 'pre_logits', 'stages'})
_HUB_PREFIXES = ('hf-hub:', 'hf_hub:', 'local-dir:')


class Teacher(nn.Module):
    """A frozen timm model that gives everything the methods ask for in one forward.

    Stays in eval mode whatever `train()` is called on, and its parameters require no gradient.

    Args:
        model: timm model, with its weights.
        input_size: What the student is fed, (channels, height, width).
        student_mean: Normalisation of the student's input, per channel.
        student_std: Likewise.

    Raises:
        UsageError: If the model runs neither at the student's input size nor at its own.
    """

    input_scale: torch.Tensor
    input_shift: torch.Tensor

    def __init__(
            self,
            model: nn.Module,
            input_size: Sequence[int],
            student_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
            student_std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.eval()
        self.resize_to = self._resolve_size(input_size)
        own_input = (input_size[0], *(self.resize_to or input_size[1:]))
        self._read_structure(own_input)
        scale, shift = _renormalize(model, input_size[0], student_mean, student_std)
        self.renormalize = bool((scale != 1).any() or (shift != 0).any())
        weight = next(model.parameters())
        self.register_buffer('input_scale', scale.to(weight.device, weight.dtype), persistent=False)
        self.register_buffer('input_shift', shift.to(weight.device, weight.dtype), persistent=False)

    @property
    def num_classes(self) -> int:
        return int(getattr(self.model, 'num_classes', 0))

    def tap_channels(self, point: str) -> int:
        """Return the channels of the counterpart of a student's tap point, 'features' or 'pre_logits'."""
        if point == 'pre_logits' or self.layout is None:
            return self.pre_logits_channels
        return self.layout.channels

    def train(self, mode: bool = True) -> 'Teacher':
        """Stay in eval mode; the teacher's dropout and batch norms never train."""
        return super().train(False)

    def forward(self, images: torch.Tensor, outputs: AbstractSet[str] = frozenset({'logits'})) -> Features:
        """Run the teacher once.

        Args:
            images: Batch normalised for the student, [B, C, H, W].
            outputs: Which of `TEACHER_OUTPUTS` to compute.

        Returns:
            The outputs asked for; the others are None.
        """
        self.model.eval()  # whoever may have called train() on a part of it
        return self._run(images, outputs)

    def run_head(self, x: torch.Tensor) -> torch.Tensor:
        """Run the frozen head on another model's feature; gradients reach `x` and nothing of the teacher.

        Args:
            x: Map [B, Ct, H, W] or pre-logits [B, D, 1, 1], by `head_input.output`.

        Returns:
            Logits, [B, K].
        """
        assert self.head_input is not None
        return self.head_input.run(self.model, x.to(next(self.model.parameters()).dtype))

    def compile(self, **kwargs: Any) -> None:
        """Compile the forward pass with `torch.compile`'s arguments."""
        self._run = torch.compile(self._run, **kwargs)  # type: ignore[method-assign]

    @torch.no_grad()
    def _run(self, images: torch.Tensor, outputs: AbstractSet[str]) -> Features:
        images, features = self.prepare(images), Features()
        if self._classifier_input is not None:
            features.logits, features.pre_logits = self._run_whole(images)
            features.feature = features.pre_logits[:, :, None, None]
            return features
        if 'stages' in outputs:
            raw, features.stages = forward_with_stages(self.model, images, self.stages)
        if 'stages' not in outputs or not self._stages_share_trunk:
            raw = self.model.forward_features(images)
        if 'feature' in outputs:
            assert self.layout is not None
            features.feature = self.layout.to_map(self.layout.to_positions(last_stage_feature(raw, self.model)))
        if 'pre_logits' in outputs:
            pre_logits = self.model.forward_head(raw, pre_logits=True)
            features.pre_logits = pre_logits.flatten(1)
        if 'logits' in outputs:
            reuse = self._reuse_pre_logits and 'pre_logits' in outputs
            features.logits = self.model.get_classifier()(pre_logits) if reuse else _first(self.model.forward_head(raw))
        return features

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise and resize a batch from the student's input to the teacher's."""
        if self.renormalize:
            images = images * self.input_scale + self.input_shift
        return images if self.resize_to is None else resize_images(images, self.resize_to)

    def _resolve_size(self, input_size: Sequence[int]) -> Optional[Tuple[int, int]]:
        """Return the size to resize to, None where the teacher runs at the student's."""
        size, reason = runnable_size(self.model, input_size)
        if reason:
            raise UsageError(f'The teacher {type(self.model).__name__} cannot run on the input {list(input_size)}: '
                             f'{reason}. Change --img-size, --in-chans or --teacher-kwargs img_size=N.')
        if size is not None:
            _logger.info(f'Teacher input: {input_size[1]}x{input_size[2]} is resized to its own {size[0]}x{size[1]}.')
        return size

    def _read_structure(self, own_input: Sequence[int]) -> None:
        """Find the features of the model, once."""
        self.layout: Optional[FeatureLayout] = None
        self.stages: Tuple[Stage, ...] = ()
        self._classifier_input: Optional[str] = None
        self._reuse_pre_logits = self._stages_share_trunk = False
        self.head_input: Optional[HeadInput] = None
        with evaluation_mode(self.model):
            images = random_images(self.model, own_input)
            if not has_head(self.model):
                classifier = classifier_linear(self.model) or last_linear(self.model, images)
                if classifier is None:
                    raise UsageError(f'The teacher {type(self.model).__name__} has no forward_features() and no linear '
                                     'classifier: nothing of it can be read.')
                self._classifier_input = next(n for n, m in self.model.named_modules() if m is classifier)
                logits, pre_logits = self._run_whole(images)
                self.pre_logits_channels = pre_logits.shape[1]
                if torch.equal(_first(classifier(pre_logits)), logits):
                    self.head_input = HeadInput(
                        'pre_logits', shape=(self.pre_logits_channels,), classifier=self._classifier_input)
                return
            self.layout = resolve_feature_layout(self.model, own_input)
            raw = self.model.forward_features(images)
            pre_logits = self.model.forward_head(raw, pre_logits=True)
            self.pre_logits_channels = pre_logits.flatten(1).shape[1]
            self._reuse_pre_logits = classifier_reads_pre_logits(self.model, raw)
            self.head_input = find_head_input(self.model, raw, self.layout, pre_logits, self._reuse_pre_logits)
            self.stages = resolve_stages(self.model, own_input)
            self._stages_share_trunk = bool(self.stages) and stages_share_trunk(self.model, images, self.stages)

    def _run_whole(self, images: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return logits and classifier input of a model that cannot be run in parts."""
        inputs: List[torch.Tensor] = []
        classifier = self.model.get_submodule(str(self._classifier_input))
        handle = classifier.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        try:
            logits = _first(self.model(images))
        finally:
            handle.remove()
        return logits, inputs[-1].flatten(1)


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def create_teacher(
        name: str,
        input_size: Sequence[int],
        num_classes: int,
        checkpoint: Optional[str] = None,
        pretrained: bool = True,
        model_kwargs: Optional[Dict[str, Any]] = None,
        student_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        student_std: Sequence[float] = IMAGENET_DEFAULT_STD,
        device: Union[str, torch.device, None] = None,
        dtype: Optional[torch.dtype] = None,
        verbose: bool = True,
) -> Teacher:
    """Create a teacher by name, with its weights.

    Args:
        name: timm architecture, `hf-hub:REPO` or `local-dir:FOLDER`.
        input_size: What the student is fed, (channels, height, width).
        num_classes: Class count of the student; used only for a teacher without weights.
        checkpoint: Weights (.safetensors, .pth or a training checkpoint, whose EMA weights are taken where it has
            them); loaded weights-only. The class count is the file's own.
        pretrained: Load timm's pretrained weights when there is no `checkpoint`.
        model_kwargs: More arguments of `timm.create_model`.
        student_mean: Normalisation of the student's input.
        student_std: Likewise.
        device: Where the teacher lives.
        dtype: Its precision, float32 by default.
        verbose: Warn of a teacher without weights.

    Raises:
        UsageError: If the name is unknown, or the weights are missing, unreadable or of another architecture.
    """
    kwargs = {'in_chans': input_size[0], **(model_kwargs or {})}
    if checkpoint:
        model = _load_checkpoint_teacher(name, checkpoint, kwargs)
    elif pretrained:
        model = _load_pretrained_teacher(name, kwargs)
    else:
        if verbose:
            _logger.warning(f'The teacher {name} has random weights (--no-teacher-pretrained): there is nothing to '
                            'learn from it. Give it weights with --teacher-checkpoint FILE.')
        model = _create_model(name, **{'num_classes': num_classes, **kwargs})
    return Teacher(model.to(device=device, dtype=dtype), input_size, student_mean, student_std)


def _create_model(name: str, **kwargs: Any) -> nn.Module:
    if not name.startswith(_HUB_PREFIXES) and not timm.is_model(name):
        raise UsageError(f"Unknown teacher '{name}'{_similar_models(name)}. --teacher takes a timm architecture, "
                         'hf-hub:REPO or local-dir:FOLDER.')
    try:
        return timm.create_model(name, **kwargs)
    except (TypeError, AttributeError, AssertionError) as e:
        raise UsageError(f"The teacher '{name}' does not take these --teacher-kwargs: {e}") from e


def _similar_models(name: str) -> str:
    similar = timm.list_models(f'*{name}*')[:3] or difflib.get_close_matches(name, timm.list_models(), n=3)
    return f' (did you mean {", ".join(similar)}?)' if similar else ''


def _load_pretrained_teacher(name: str, kwargs: Dict[str, Any]) -> nn.Module:
    if 'num_classes' in kwargs:
        raise UsageError(f'--teacher-kwargs num_classes={kwargs["num_classes"]} would re-initialise the head of the '
                         f"pretrained teacher '{name}'. Leave it out, or give --teacher-checkpoint FILE.")
    hub = name.startswith(_HUB_PREFIXES)
    if not hub and timm.is_model(name) and not timm.is_model_pretrained(name):
        raise UsageError(f"timm has no pretrained weights for the teacher '{name}'. Give --teacher-checkpoint FILE, or "
                         '--no-teacher-pretrained to distil from random weights.')
    try:
        return _create_model(name, pretrained=True, **kwargs)
    except UsageError:
        raise
    except Exception as e:  # the hub raises errors of many libraries: connection, missing file, wrong keys
        raise UsageError(f"The pretrained weights of the teacher '{name}' could not be loaded "
                         f'({type(e).__name__}: {str(e).splitlines()[0] if str(e) else "no message"}). '
                         'Give --teacher-checkpoint FILE, or --no-teacher-pretrained.') from e


def _load_checkpoint_teacher(name: str, checkpoint: str, kwargs: Dict[str, Any]) -> nn.Module:
    state_dict = read_state_dict(checkpoint, '--teacher-checkpoint')
    model = _create_model(name, **kwargs)
    num_classes = _count_classes(model, state_dict)
    if num_classes and num_classes != getattr(model, 'num_classes', num_classes):
        model = _create_model(name, **{**kwargs, 'num_classes': num_classes})
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as e:
        raise UsageError(f"--teacher-checkpoint {checkpoint} does not fit the architecture '{name}': "
                         f'{_load_error(model, state_dict)}. Change --teacher or --teacher-kwargs.') from e
    return model


def read_state_dict(path: str, flag: str) -> Dict[str, torch.Tensor]:
    """Read weights from a .safetensors, .pth or training checkpoint, weights-only.

    Raises:
        UsageError: If the file is missing, unreadable or would run code; names `flag`.
    """
    if not os.path.isfile(path):
        raise UsageError(f'{flag} {path}: there is no such file.')
    try:
        return load_state_dict(path, use_ema=True, weights_only=True)
    except Exception as e:  # truncated zip, bad header, pickle with code: each library has its own error
        raise UsageError(f'{flag} {path} is not a readable checkpoint '
                         f'({type(e).__name__}: {str(e).splitlines()[0] if str(e) else "no message"}).') from e


def _count_classes(model: nn.Module, state_dict: Dict[str, torch.Tensor]) -> Optional[int]:
    """Return the class count of the weights: the rows of what is the classifier's weight in the model."""
    classifier = model.get_classifier() if hasattr(model, 'get_classifier') else None
    for name, module in model.named_modules():
        weight = state_dict.get(f'{name}.weight')
        if module is classifier and weight is not None and weight.ndim >= 2:
            return weight.shape[0]
    return None


def _load_error(model: nn.Module, state_dict: Dict[str, torch.Tensor]) -> str:
    own = model.state_dict()
    missing = sorted(own.keys() - state_dict.keys())
    unexpected = sorted(state_dict.keys() - own.keys())
    shapes = [f'{k} is {list(state_dict[k].shape)}, not {list(own[k].shape)}'
              for k in own if k in state_dict and own[k].shape != state_dict[k].shape]
    parts = [
        f'{len(keys)} {what} ({", ".join(keys[:3])}{", ..." if len(keys) > 3 else ""})'
        for what, keys in (('missing', missing), ('unexpected', unexpected), ('of another shape', shapes)) if keys
    ]
    return ', '.join(parts)


def _renormalize(
        model: nn.Module,
        channels: int,
        student_mean: Sequence[float],
        student_std: Sequence[float],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return (scale, shift), [1, C, 1, 1]: the map from the student's normalised input to the teacher's."""
    config = getattr(model, 'pretrained_cfg', None) or {}
    own_mean = _per_channel(config.get('mean', IMAGENET_DEFAULT_MEAN), channels)
    own_std = _per_channel(config.get('std', IMAGENET_DEFAULT_STD), channels)
    mean, std = _per_channel(student_mean, channels), _per_channel(student_std, channels)
    scale, shift = std / own_std, (mean - own_mean) / own_std
    return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)


def _per_channel(values: Sequence[float], channels: int) -> torch.Tensor:
    """Return one value per channel; where the counts differ, the average for all, as timm's loader does."""
    if len(values) != channels:
        values = [sum(values) / len(values)] * channels
    return torch.tensor(values, dtype=torch.float64)
