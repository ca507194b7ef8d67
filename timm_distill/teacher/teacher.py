"""The frozen teacher: eval and no gradient from construction, with its own normalisation and input size.

A teacher keeps the class count of its weights; nothing of it is ever re-initialised silently.
"""
import copy
import hashlib
import logging
from contextlib import nullcontext
from typing import AbstractSet, Any, ContextManager, Dict, FrozenSet, List, Optional, Sequence, Tuple, Union

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..errors import UsageError
from ..features.classifier import classifier_linear, classifier_reads_pre_logits, last_linear
from ..features.head import HeadInput, find_head_input
from ..features.inputs import (
    CANNOT_RUN,
    RawFeature,
    evaluation_mode,
    random_images,
    reason_not_to_run,
    resize_images,
    runnable_size,
)
from ..features.layouts import FeatureLayout
from ..features.spec import Features, Stage
from ..features.stages import (
    classes_of,
    forward_with_stages,
    has_head,
    last_stage_feature,
    layout_for,
    resolve_feature_layout,
    resolve_stages,
    stages_share_trunk,
)
from .fold import FuseReport, fuse_batch_norms
from .preprocessing import (
    InputRecord,
    first_record,
    is_same_normalization,
    renormalization,
    resolve_preprocessing,
)
from .sharding import count_local_parameters, find_parts, shard
from .weights import TeacherSource, load_teacher_model

_logger = logging.getLogger(__name__)

TEACHER_OUTPUTS = frozenset({'logits', 'feature', 'pre_logits', 'stages'})


class _Reader(nn.Module):
    """The one forward of a sharded teacher: whatever is read of the model, its parameters are gathered before."""

    def __init__(self, teacher: 'Teacher'):
        super().__init__()
        self.model = teacher.model
        self.__dict__['teacher'] = teacher  # not a submodule, which would contain this one

    def forward(self, images: torch.Tensor, outputs: AbstractSet[str]) -> Features:
        return self.__dict__['teacher']._read(self.model, images, outputs)


class Teacher(nn.Module):
    """A frozen timm model that gives everything the methods ask for in one forward.

    Stays in eval mode whatever `train()` is called on, and its parameters require no gradient. Batch norms are folded
    into the layers before them, as far as that is measured to change nothing.

    Args:
        model: timm model, with its weights.
        input_size: What the student is fed, (channels, height, width).
        student_mean: Normalisation of the student's input, per channel.
        student_std: Likewise.
        device: Where the teacher lives, the model's device by default.
        dtype: Its precision, the model's by default. Folding comes before rounding to it.
        autocast: Let the run's autocast hold for the teacher too; else it computes in its own precision.
        fuse: Fold batch norms.
        channels_last: Memory order of the convolutions' weights, which their outputs follow. By default channels_last
            on the CPU, where it is faster whatever order the images have, and as it comes elsewhere.
        copy_model: Keep a copy, so that `model` stays as it is; else it is frozen and changed.
        records: What is said of its own normalisation, input size and interpolation, the one that counts most first;
            the model's `pretrained_cfg`, its size apart, stands behind them.

    Attributes:
        preprocessing: What is done to its images, and where that was taken from.
        trained_size: (height, width) of the images that its weights were trained on, where it need not be fed that and
            its weights say so.
        input_size: What it is fed, (channels, height, width), whatever the student is fed.
        num_classes: Columns of its logits, 0 where these are nothing but its pre-logits.
        fused: Which batch norms were folded.
        digest: SHA-256 of the weights as they came, before folding and rounding.

    Raises:
        UsageError: If the model runs neither at the student's input size nor at its own, or not at that of a record.
    """

    input_scale: torch.Tensor
    input_shift: torch.Tensor

    def __init__(
            self,
            model: nn.Module,
            input_size: Sequence[int],
            student_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
            student_std: Sequence[float] = IMAGENET_DEFAULT_STD,
            device: Union[str, torch.device, None] = None,
            dtype: Optional[torch.dtype] = None,
            autocast: bool = True,
            fuse: bool = True,
            channels_last: Optional[bool] = None,
            copy_model: bool = True,
            records: Sequence[InputRecord] = (),
    ):
        super().__init__()
        self.model = (copy.deepcopy(model) if copy_model else model).to(device=device).requires_grad_(False)
        self.eval()
        self.digest = hash_weights(self.model)
        self.resize_to, size_source = self._resolve_size(input_size, records)
        own_input = (input_size[0], *(self.resize_to or input_size[1:]))
        self.preprocessing = resolve_preprocessing([*records, model_record(self.model)], own_input, size_source)
        self.input_size = self.preprocessing.input_size
        self.trained_size = first_record([*records, InputRecord('')], 'trained_size').trained_size
        self._reader: List[_Reader] = []  # of a sharded teacher; in a list, as it contains the model again
        self._read_structure(own_input)
        self.fused = fuse_batch_norms(self.model, own_input, self._read_all) if fuse else FuseReport(0, 0)
        if self.fused.norms:
            _logger.info(f'Teacher: {self.fused}.')
        self.eval().requires_grad_(False)
        self.model.to(dtype=dtype)
        device_type = next(self.model.parameters()).device.type
        if channels_last or channels_last is None and device_type == 'cpu':
            self._order_channels_last(own_input)
        self._warn_of_assumptions(student_mean, student_std)
        self.autocast = autocast
        self._register_normalization(student_mean, student_std)

    @property
    def outputs(self) -> FrozenSet[str]:
        """Which of `TEACHER_OUTPUTS` the model gives: no map where it does not tell on which grid its tokens lie."""
        return TEACHER_OUTPUTS if self.layout is None or self.layout.is_map else TEACHER_OUTPUTS - {'feature'}

    @property
    def classifier_weight(self) -> Optional[torch.Tensor]:
        """Weight of the classifier where that is one linear layer with a row for each class, [K, D]; else None."""
        if self._classifier_input is not None:
            classifier: Optional[nn.Module] = self.model.get_submodule(self._classifier_input)
        else:
            classifier = classifier_linear(self.model)
        weight: Any = getattr(classifier, 'weight', None)
        return weight.detach().flatten(1) if weight is not None and len(weight) == self.num_classes else None

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
            The outputs asked for; the others are None. They have the images' dtype, or autocast's where it is enabled.
        """
        self.model.eval()  # whoever may have called train() on a part of it
        return self._run(images, outputs)

    def shard(self, device: torch.device) -> None:
        """Spread the parameters over the processes and move to the device; all of them then run it together.

        Raises:
            UsageError: If the sharded teacher does not give what it gave before.
        """
        if not dist.is_initialized():
            raise UsageError('--teacher-fsdp spreads the teacher over processes: start them with torchrun.')
        for parameter in self.model.parameters():
            parameter.data = parameter.data.contiguous()  # shards know no other memory order
        images = random_images(self.model, self.input_size)
        with torch.no_grad():
            expected = self._read(self.model, images, self.outputs).tensors()
        classifier = classifier_linear(self.model) or last_linear(self.model, images)
        parts = find_parts(self.model, [] if classifier is None else [classifier])
        self._reader = [_Reader(self)]
        shard(self._reader[0], parts, device)
        self.input_scale, self.input_shift = self.input_scale.to(device), self.input_shift.to(device)
        try:
            with torch.no_grad():
                actual = self._read_sharded(images.to(device), self.outputs).tensors()
            wrong = max(((a.cpu() - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected))
        except CANNOT_RUN as e:
            raise UsageError(
                f'--teacher-fsdp: the teacher {type(self.model).__name__} does not run in shards: '
                f'{" ".join(str(e).split())[:200]}. Leave it out.') from e
        if not wrong <= 1e-2:  # another device rounds otherwise
            raise UsageError(
                f'--teacher-fsdp: the teacher {type(self.model).__name__} gives other outputs in shards '
                f'(relative difference {wrong:.2g}). Leave it out.')
        _logger.info(
            f'Teacher: {count_local_parameters(self.model):,} of its parameters on this process, gathered in '
            f'{len(parts)} parts.')

    @property
    def is_sharded(self) -> bool:
        return bool(self._reader)

    def _read_sharded(self, images: torch.Tensor, outputs: AbstractSet[str]) -> Features:
        if not self._reader:
            return self._read(self.model, images, outputs)
        with torch.inference_mode(False):  # what is gathered stays, and the head may be differentiated later
            return self._reader[0](images, outputs)

    def run_head(self, x: torch.Tensor) -> torch.Tensor:
        """Run the frozen head on another model's feature; gradients reach `x` and nothing of the teacher.

        Args:
            x: Map [B, Ct, H, W] or pre-logits [B, D, 1, 1], by `head_input.output`.

        Returns:
            Logits, [B, K].
        """
        assert self.head_input is not None
        with self._precision(x.device):
            return self.head_input.run(self.model, x.to(self.dtype))

    def compile(self, **kwargs: Any) -> None:
        """Compile the forward pass with `torch.compile`'s arguments."""
        self._run = torch.compile(self._run, **kwargs)  # type: ignore[method-assign]

    @torch.no_grad()  # not inference mode: its tensors cannot be saved for the backward pass of a loss
    def _run(self, images: torch.Tensor, outputs: AbstractSet[str]) -> Features:
        autocast = torch.is_autocast_enabled(images.device.type)
        with self._precision(images.device):
            features = self._read_sharded(self.prepare(images), outputs)
        # autocast converts where it is needed; without it the methods' own layers take nothing but the run's dtype
        return features if autocast else features.to(images.dtype)

    def _precision(self, device: torch.device) -> ContextManager:
        """Return the context that the model runs in: the run's autocast, or none."""
        return nullcontext() if self.autocast else torch.autocast(device.type, enabled=False)

    def _read(self, model: nn.Module, images: torch.Tensor, outputs: AbstractSet[str]) -> Features:
        """Run the model, or one built alike, on images that are prepared for it."""
        features = Features()
        if self._classifier_input is not None:
            features.logits, features.pre_logits = self._read_whole(model, images)
            features.feature = features.pre_logits[:, :, None, None]
            return features
        if 'stages' in outputs:
            raw, features.stages = forward_with_stages(model, images, self.stages)
        if 'stages' not in outputs or not self._stages_share_trunk:
            raw = model.forward_features(images)
        if 'feature' in outputs:
            assert self.layout is not None
            layout = layout_for(model, self.layout, images)
            features.feature = layout.to_map(layout.to_positions(last_stage_feature(raw, model)))
        if 'pre_logits' in outputs:
            pre_logits = model.forward_head(raw, pre_logits=True)
            features.pre_logits = pre_logits.flatten(1)
        if 'logits' in outputs:
            reuse = self._reuse_pre_logits and 'pre_logits' in outputs
            features.logits = model.get_classifier()(pre_logits) if reuse else _first(model.forward_head(raw))
        return features

    def _read_all(self, model: nn.Module, images: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return all that can be asked for, logits by every way to them."""
        logits = self._read(model, images, frozenset({'logits'})).tensors()
        features = self._read(model, images, self.outputs)
        if self.head_input is not None:
            taken = features.feature if self.head_input.output == 'feature' else features.pre_logits
            assert taken is not None
            logits.append(self.head_input.run(model, taken))
        return [*logits, *features.tensors()]

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise and resize a batch from the student's input to the teacher's, in the teacher's precision."""
        if self.renormalize:
            images = images * self.input_scale + self.input_shift
        images = images.to(self.dtype)
        if self.resize_to is None:
            return images
        return resize_images(images, self.resize_to, self.preprocessing.interpolation)

    def _order_channels_last(self, own_input: Sequence[int]) -> None:
        """Bring the convolutions into channels_last order, unless the model has operations that need another."""
        weights = [m.weight for m in self.model.modules() if isinstance(m, nn.Conv2d)]
        before = [weight.data for weight in weights]
        for weight in weights:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        try:
            with torch.no_grad():
                self._read_all(self.model, random_images(self.model, own_input))
        except CANNOT_RUN as e:
            _logger.debug(f'{type(self.model).__name__} does not run in channels_last order: {e}')
            for weight, data in zip(weights, before):
                weight.data = data

    def _warn_of_assumptions(self, student_mean: Sequence[float], student_std: Sequence[float]) -> None:
        own = self.preprocessing
        said_by_nobody = set(own.assumed) & {'mean', 'std'}
        student = ' and '.join(' '.join(f'{v:.4g}' for v in values) for values in (student_mean, student_std))
        if said_by_nobody and not is_same_normalization(own, student_mean, student_std):
            _logger.warning(
                'Nothing says with which mean and standard deviation the teacher was trained, and a wrong one costs '
                f"its accuracy: its images get {own}; the student's {student}. Give --teacher-mean and --teacher-std.")

    def _register_normalization(self, student_mean: Sequence[float], student_std: Sequence[float]) -> None:
        scale, shift = renormalization(self.preprocessing, student_mean, student_std)
        self.renormalize = bool((scale != 1).any() or (shift != 0).any())
        weight = next(self.model.parameters())
        self.dtype = weight.dtype
        precise = torch.promote_types(weight.dtype, torch.float32)  # images are rounded once, after this
        self.register_buffer('input_scale', scale.to(weight.device, precise), persistent=False)
        self.register_buffer('input_shift', shift.to(weight.device, precise), persistent=False)

    def _resolve_size(
            self,
            input_size: Sequence[int],
            records: Sequence[InputRecord],
    ) -> Tuple[Optional[Tuple[int, int]], str]:
        """Return the size to resize to, None where the teacher runs at the student's; and where that comes from."""
        name, student_size = type(self.model).__name__, (input_size[1], input_size[2])
        said = first_record([*records, InputRecord('')], 'size')
        if said.size is not None:
            size = (int(said.size[0]), int(said.size[1]))
            reason = reason_not_to_run(self.model, (input_size[0], *size))
            if reason:
                raise UsageError(
                    f'The teacher {name} cannot run at {size[0]}x{size[1]} ({said.source}): {reason}. '
                    'Change --teacher-img-size, --in-chans or --teacher-kwargs img_size=N.')
            return (None if size == student_size else size), said.source
        own_size, reason = runnable_size(self.model, input_size)
        if reason:
            raise UsageError(
                f'The teacher {name} cannot run on the input {list(input_size)}: '
                f'{reason}. Change --img-size, --in-chans or --teacher-img-size.')
        return own_size, "the student's size" if own_size is None else 'the size that it was built for'

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
                    raise UsageError(
                        f'The teacher {type(self.model).__name__} has no forward_features() and no linear '
                        'classifier: nothing of it can be read.')
                self._classifier_input = next(n for n, m in self.model.named_modules() if m is classifier)
                logits, pre_logits = self._read_whole(self.model, images)
                self.pre_logits_channels = pre_logits.shape[1]
                self.num_classes = classes_of(logits, pre_logits)
                if torch.equal(_first(classifier(pre_logits)), logits):
                    self.head_input = HeadInput(
                        'pre_logits', shape=(self.pre_logits_channels,), classifier=self._classifier_input)
                return
            self.layout = resolve_feature_layout(self.model, own_input)
            raw = self.model.forward_features(images)
            pre_logits = self._run_head(raw)
            self.pre_logits_channels = pre_logits.flatten(1).shape[1]
            self.num_classes = classes_of(_first(self.model.forward_head(raw)), pre_logits)
            self._reuse_pre_logits = classifier_reads_pre_logits(self.model, raw)
            self.head_input = find_head_input(self.model, raw, self.layout, pre_logits, self._reuse_pre_logits)
            self.stages = resolve_stages(self.model, own_input)
            self._stages_share_trunk = bool(self.stages) and stages_share_trunk(self.model, images, self.stages)

    def _run_head(self, raw: RawFeature) -> torch.Tensor:
        """Return the pre-logits of what `forward_features` returned."""
        try:
            return self.model.forward_head(raw, pre_logits=True)
        except (NotImplementedError, TypeError) as e:  # timm's encoders have the method and refuse, each in its way
            raise UsageError(
                f'The teacher {type(self.model).__name__} is an encoder without a classifier: it gives '
                'neither logits nor pre-logits. Choose a model that classifies as --teacher.') from e

    def _read_whole(self, model: nn.Module, images: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return logits and classifier input of a model that cannot be run in parts."""
        inputs: List[torch.Tensor] = []
        classifier = model.get_submodule(str(self._classifier_input))
        handle = classifier.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        try:
            logits = _first(model(images))
        finally:
            handle.remove()
        return logits, inputs[-1].flatten(1)


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def hash_weights(model: nn.Module) -> str:
    """Return the SHA-256 of a model's state: the names and bytes of its tensors, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def create_teacher(
        name: str,
        input_size: Sequence[int],
        num_classes: int,
        checkpoint: Optional[str] = None,
        pretrained: bool = True,
        model_kwargs: Optional[Dict[str, Any]] = None,
        verbose: bool = True,
        weights: Optional[str] = None,
        mean: Optional[Sequence[float]] = None,
        std: Optional[Sequence[float]] = None,
        img_size: Optional[int] = None,
        **teacher_kwargs: Any,
) -> Teacher:
    """Create a teacher by name, with its weights.

    Its normalisation, input size and interpolation are those that the user names, else those that its weights say of
    themselves (a checkpoint's data config or flags, a folder's config), else the architecture's.

    Args:
        name: timm architecture, `hf-hub:REPO` or `local-dir:FOLDER`.
        input_size: What the student is fed, (channels, height, width).
        num_classes: Class count of the student; used only for a teacher without weights.
        checkpoint: Weights (.safetensors, .pth or a training checkpoint); loaded weights-only, through timm's filter
            for the architecture where they are not in its own form. The class count is the file's own.
        pretrained: Load timm's pretrained weights when there is no `checkpoint`.
        model_kwargs: More arguments of `timm.create_model`.
        verbose: Log what was loaded, warn of a teacher without weights.
        weights: 'raw' or 'ema' of a training checkpoint; None takes the averaged ones where there are any.
        mean: The teacher's own normalisation.
        std: Likewise.
        img_size: Height and width that it is fed.
        teacher_kwargs: More arguments of `Teacher`: student_mean, student_std, device, dtype, ...

    Raises:
        UsageError: If the name is unknown, or the weights are missing, unreadable or of another architecture.
    """
    source = TeacherSource(name, checkpoint or '', pretrained, model_kwargs, weights, mean, std, img_size)
    model, records = load_teacher_model(source, input_size[0], num_classes, verbose)
    return Teacher(model, input_size, copy_model=False, records=records, **teacher_kwargs)


def model_record(model: nn.Module) -> InputRecord:
    """Return what a model's `pretrained_cfg` says; its size is left out, as many models take any."""
    config = getattr(model, 'pretrained_cfg', None) or {}
    return InputRecord(
        'its pretrained_cfg', config.get('mean'), config.get('std'), interpolation=config.get('interpolation'))
