"""The frozen teacher: eval and no gradient from construction, with its own normalisation and input size.

A teacher keeps the class count of its weights; nothing of it is ever re-initialised silently.
"""
import copy
import hashlib
import logging
from contextlib import nullcontext
from dataclasses import replace
from typing import AbstractSet, Any, ContextManager, Dict, List, Optional, Sequence, Union

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..errors import UsageError, arguments_in_messages
from ..features.classifier import classifier_linear
from ..features.head import HeadInput
from ..features.inspection import inspect
from ..features.reader import LOGITS, ModelReader, read
from ..features.spec import Features, FeatureSpec
from ..features.tail import find_tail
from .class_map import ClassMap, ClassMatch, create_class_map, report_class_map
from .fold import FoldReport, fold_batch_norms
from .label_set import LabelSet, find_labels
from .memory_order import order_channels_last
from .preprocessing import InputRecord, Preparation, first_record, model_record, resolve_preprocessing, resolve_size
from .sharding import shard_reader
from .standardize import Standardizer
from .weights import TeacherSource, load_teacher_model

_logger = logging.getLogger(__name__)


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
        fold: Fold batch norms.
        channels_last: Memory order of the convolutions' weights, which their outputs follow. By default channels_last
            on the CPU, where it is faster whatever order the images have, and as it comes elsewhere.
        copy_model: Keep a copy, so that `model` stays as it is; else it is frozen and changed.
        records: What is said of its own normalisation, input size and interpolation, the one that counts most first;
            the model's `pretrained_cfg`, its size apart, stands behind them.
        classes: Restrict the logits to the student's classes.

    Attributes:
        spec: What it gives and how it is read.
        preprocessing: What is done to its images, and where that was taken from.
        trained_size: (height, width) of the images that its weights were trained on, where it need not be fed that and
            its weights say so.
        input_size: What it is fed, (channels, height, width), whatever the student is fed.
        num_classes: Columns of its logits, 0 where these are nothing but its pre-logits; with `classes` the student's.
        labels: Names of its own classes, None where nobody knows them.
        class_map: From its own classes to the student's, with `classes`.
        head_input: What its head can be run on.
        autocast: Whether the run's autocast holds for it too; else it computes in its own precision.
        standardizer: How its features are standardised for the methods that get such targets; `forward` gives them as
            they are.
        folded: Which batch norms were folded.
        digest: SHA-256 of the weights as they came, before folding and rounding.

    Raises:
        UsageError: If the model runs neither at the student's input size nor at its own, or not at that of a record;
            if its classes cannot be matched.
    """

    def __init__(
            self,
            model: nn.Module,
            input_size: Sequence[int],
            student_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
            student_std: Sequence[float] = IMAGENET_DEFAULT_STD,
            device: Union[str, torch.device, None] = None,
            dtype: Optional[torch.dtype] = None,
            fold: bool = True,
            channels_last: Optional[bool] = None,
            copy_model: bool = True,
            records: Sequence[InputRecord] = (),
            classes: Optional[ClassMatch] = None,
    ):
        super().__init__()
        model = (copy.deepcopy(model) if copy_model else model).to(device=device).requires_grad_(False).eval()
        self.digest = hash_weights(model)
        resize_to, size_source = resolve_size(model, input_size, records)
        own_input = (input_size[0], *(resize_to or input_size[1:]))
        self.preprocessing = resolve_preprocessing([*records, model_record(model)], own_input, size_source)
        self.input_size = self.preprocessing.input_size
        self.trained_size = first_record([*records, InputRecord('')], 'trained_size').trained_size
        self.spec = inspect(model, own_input)
        self.folded = fold_batch_norms(model, own_input, self._read_all) if fold else FoldReport(0, 0)
        if self.folded.norms:
            _logger.info(f'Teacher: {self.folded}.')
        self.reader = ModelReader(model.eval().requires_grad_(False).to(dtype=dtype), self.spec)
        weight = next(model.parameters())
        if channels_last or channels_last is None and weight.device.type == 'cpu':
            order_channels_last(model, self.input_size, self._read_all)
        self.autocast = True
        self.prepare = Preparation(self.preprocessing, student_mean, student_std, resize_to, weight)
        self.is_sharded = False
        self.standardizer = Standardizer()
        self.class_map: Optional[ClassMap] = None
        if classes is not None:
            self.class_map = create_class_map(classes, self.num_classes, self.labels).to(weight.device)
            report_class_map(self.class_map)
        self.eval()

    @property
    def model(self) -> nn.Module:
        return self.reader.model

    @property
    def feature_spec(self) -> FeatureSpec:
        """Shapes of its features, for the methods."""
        assert self.spec.features is not None
        return replace(self.spec.features, num_classes=self.num_classes)

    @property
    def head_input(self) -> Optional[HeadInput]:
        return self.spec.head

    @property
    def classifier_weight(self) -> Optional[torch.Tensor]:
        """Weight of the classifier, [K, D], where that is one linear layer with a row for each class; else None.

        With `classes` of each class of the student that it knows, as far as none takes several of its own.
        """
        assert self.spec.features is not None
        if self.spec.split:
            classifier = classifier_linear(self.model)
        else:
            classifier = self.model.get_submodule(self.spec.classifiers[0])
        weight: Any = getattr(classifier, 'weight', None)
        if weight is None or len(weight) != self.spec.features.num_classes:
            return None
        rows = weight.detach().flatten(1)
        return rows if self.class_map is None else self.class_map.select(rows)

    @property
    def num_classes(self) -> int:
        assert self.spec.features is not None
        return self.spec.features.num_classes if self.class_map is None else self.class_map.num_classes

    @property
    def labels(self) -> Optional[LabelSet]:
        assert self.spec.features is not None
        return find_labels(self.model, self.spec.features.num_classes)

    @property
    def class_sources(self) -> Optional[List[List[int]]]:
        """Its own classes for every class of the student, None where its logits are as they come."""
        return None if self.class_map is None else self.class_map.plain_sources()

    def tap_channels(self, point: str) -> int:
        """Return the channels of the counterpart of a student's tap point, 'features' or 'pre_logits'."""
        if point == 'pre_logits' or self.spec.layout is None:
            return self.feature_spec.pre_logits
        return self.spec.layout.channels

    def train(self, mode: bool = True) -> 'Teacher':
        """Stay in eval mode; the teacher's dropout and batch norms never train."""
        return super().train(False)

    def forward(self, images: torch.Tensor, outputs: AbstractSet[str] = LOGITS) -> Features:
        """Run the teacher once.

        Args:
            images: Batch normalised for the student, [B, C, H, W].
            outputs: Which of `spec.outputs` to compute.

        Returns:
            The outputs asked for. They have the images' dtype, or autocast's where it is enabled. The logits of classes
            that only the student has are minus infinity.
        """
        self.eval()  # whoever may have called train() on a part of it
        return self._run(images, outputs)

    @torch.no_grad()  # not inference mode: its tensors cannot be saved for the backward pass of a loss
    def _run(self, images: torch.Tensor, outputs: AbstractSet[str]) -> Features:
        autocast = torch.is_autocast_enabled(images.device.type)
        with self._precision(images.device):
            features = self._read(self.prepare(images), outputs)
        features = self.map_classes(features)
        # autocast converts where it is needed; without it the methods' own layers take nothing but the run's dtype
        return features if autocast else features.to(images.dtype)

    def map_classes(self, features: Features) -> Features:
        """Bring the logits to the student's classes, in place, where there is a map."""
        if self.class_map is not None and features.logits is not None:
            features.logits = self.class_map(features.logits)
            features.classes = self.class_map.known
        return features

    def _read(self, images: torch.Tensor, outputs: AbstractSet[str]) -> Features:
        if not self.is_sharded:
            return self.reader(images, outputs)
        with torch.inference_mode(False):  # what is gathered stays, and the head may be differentiated later
            return self.reader(images, outputs)

    def _precision(self, device: torch.device) -> ContextManager:
        """Return the context that the model runs in: the run's autocast, or none."""
        return nullcontext() if self.autocast else torch.autocast(device.type, enabled=False)

    def run_head(self, x: torch.Tensor) -> torch.Tensor:
        """Run the frozen head on another model's feature; gradients reach `x` and nothing of the teacher.

        Args:
            x: Map [B, Ct, H, W] or pre-logits [B, D, 1, 1], by `head_input.output`.

        Returns:
            Logits, [B, K].
        """
        assert self.head_input is not None
        with self._precision(x.device):
            logits = self.head_input.run(self.model, x.to(self.prepare.dtype))
        return logits if self.class_map is None else self.class_map(logits)

    def resolve_tail(self) -> str:
        """Find what follows the last stage but one, for `run_tail`; return why there is none, '' where there is."""
        tail, reason = None, ''
        if len(self.spec.stages) < 2 or self.spec.layout is None:
            reason = 'it has no stage before its last feature'
        elif self.is_sharded:
            reason = 'its weights are spread over processes (--teacher-fsdp)'
        else:
            tail, reason = find_tail(self.model, self.spec.stages[-2], self.spec.layout, self.input_size)
        stage, features = None if tail is None else tail.stage, self.spec.features
        assert features is not None
        self.spec = replace(self.spec, tail=tail, features=replace(features, tail=stage, no_tail=reason))
        self.reader.spec = self.spec
        return reason

    @torch.compiler.disable  # it runs on copies of modules, which no compiled graph can hold
    def run_tail(self, x: torch.Tensor, prefix: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Run the frozen last stage on another model's feature; gradients reach `x` and nothing of the teacher.

        Args:
            x: Map [B, C, H, W] in the shape of `spec.tail.stage`.
            prefix: This teacher's class and register tokens of the same images, as `forward` gave them for 'tail'.

        Returns:
            Its last feature, [B, C', H', W'].
        """
        assert self.spec.tail is not None
        with self._precision(x.device):
            return self.spec.tail.run(self.model, x.to(self.prepare.dtype), prefix).to(x.dtype)

    def compile(self, **kwargs: Any) -> None:
        """Compile the forward pass with `torch.compile`'s arguments."""
        self._run = torch.compile(self._run, **kwargs)  # type: ignore[method-assign]

    def shard(self, device: torch.device) -> None:
        """Spread the parameters over the processes and move to the device; all of them then run it together.

        Raises:
            UsageError: If the sharded teacher does not give what it gave before.
        """
        if self.spec.tail is not None:
            raise UsageError(
                "--teacher-fsdp does not go with --kd methods that run the teacher's last stage on the student's "
                'feature (scalekd): leave it out, or take another method (--list-kd).')
        shard_reader(self.reader, self.input_size, device)
        for part in (self.prepare, self.class_map):
            if part is not None:
                part.to(device)
        self.is_sharded = True

    def _read_all(self, model: nn.Module, images: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return all that can be asked for of the model or one built alike, logits by every way to them."""
        logits = read(model, self.spec, images).tensors()
        features = read(model, self.spec, images, self.spec.outputs)
        if self.head_input is not None:
            taken = features.feature if self.head_input.output == 'feature' else features.pre_logits
            assert taken is not None
            logits.append(self.head_input.run(model, taken))
        return [*logits, *features.tensors()]


def hash_weights(model: nn.Module) -> str:
    """Return the SHA-256 of a model's state: the names and bytes of its tensors, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@arguments_in_messages({
    'teacher': 'name', 'teacher-kwargs': 'model_kwargs', 'img-size': 'input_size', 'in-chans': 'input_size',
    **{f'teacher-{name}': name.replace('-', '_') for name in (
        'checkpoint', 'pretrained', 'weights', 'mean', 'std', 'img-size', 'standardize')}})
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
        teacher_kwargs: More arguments of `wrap_teacher`: standardize, student_mean, student_std, device, dtype, ...

    Raises:
        UsageError: If the name is unknown, or the weights are missing, unreadable or of another architecture.
    """
    source = TeacherSource(name, checkpoint or '', pretrained, model_kwargs, weights, mean, std, img_size)
    model, records = load_teacher_model(source, input_size[0], num_classes, verbose)
    return wrap_teacher(model, input_size, copy_model=False, records=records, **teacher_kwargs)


def wrap_teacher(
        model: nn.Module,
        input_size: Sequence[int],
        standardize: Optional[str] = None,
        autocast: bool = True,
        **kwargs: Any,
) -> Teacher:
    """Make a model a teacher.

    Args:
        model: As for `Teacher`.
        input_size: Likewise.
        standardize: How its features are standardised for the methods: 'none', 'channel' or 'phi-s'; None for those
            methods alone that ask for it ('channel').
        autocast: Let the run's autocast hold for the teacher too; else it computes in its own precision.
        kwargs: More arguments of `Teacher`.

    Raises:
        UsageError: As `Teacher`, and for another `standardize`.
    """
    standardizer = Standardizer(standardize)
    teacher = Teacher(model, input_size, **kwargs)
    teacher.standardizer = standardizer
    teacher.autocast = autocast
    return teacher

