"""The trainable module: the student, the adapters on its path, and whatever the methods train.

One module, so that optimizer, DDP, EMA and compile see everything that trains in one forward.
"""
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Callable, Dict, FrozenSet, Iterator, Mapping, Optional, Sequence, Set, Tuple, Union

import torch
import torch.nn as nn
from timm.models import group_parameters

from ..adapters import Adapter
from ..errors import UsageError
from ..features.inputs import evaluation_mode, logits_of, resize_images
from ..features.reader import LOGITS, ModelSpec, read
from ..features.spec import Features, TeacherFeatures
from ..features.stages import has_head
from ..methods._scopes import join_scope, scope_term, split_scope
from .merge import merge_error, merged_state_dict, merged_tensors, split_batch_norm_tensors
from .paths import path_of
from .plain import copy_plain_student, create_plain_student
from .tap import StudentTap

LogitHead = Callable[[torch.Tensor], torch.Tensor]
MethodTerms = Dict[str, Dict[str, torch.Tensor]]  # unweighted terms by method, with its teacher where there are several


class AdaptedStudent(nn.Module):
    """A student with adapters between its last stage (or its pre-logits) and its classifier.

    Args:
        student: timm model.
        adapters: One for each site of the tap; none for the plain student.
        tap: Insertion point of the adapters.
        methods: Methods by name, METHOD@TEACHER with one of several teachers, whose own parameters train with the
            student.
        resize_to: Size (height, width) that the student's input is resized to, None for the size it comes in.
        spec: What is known of the student; not needed where its logits alone are read.
        outputs: What the methods read of it.
    """

    def __init__(
            self,
            student: nn.Module,
            adapters: Sequence[Adapter] = (),
            tap: Optional[StudentTap] = None,
            methods: Optional[Mapping[str, nn.Module]] = None,
            resize_to: Optional[Tuple[int, int]] = None,
            spec: Optional[ModelSpec] = None,
            outputs: FrozenSet[str] = LOGITS,
    ):
        super().__init__()
        self._logits_spec = ModelSpec(split=has_head(student) and not (tap is not None and tap.inside))
        self.spec = spec or self._logits_spec
        self.outputs = outputs
        self.student = student
        self.adapters = nn.ModuleList(adapters)
        self.tap = tap
        self.methods = nn.ModuleDict(methods or {})
        self.resize_to = resize_to
        self.unweighted: FrozenSet[str] = frozenset()  # what has weight 0 in the current epoch, as in the terms
        self.standardized: FrozenSet[str] = frozenset()  # what gets standardised features of a teacher, likewise

    def forward(
            self,
            images: torch.Tensor,
            teacher: Optional[TeacherFeatures] = None,
            target: Optional[torch.Tensor] = None,
    ) -> Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor, MethodTerms]]:
        """Run the student, and the methods where a teacher's features are given.

        Args:
            images: Normalised batch, [B, C, H, W].
            teacher: Features of the teacher for this batch, of several by name.
            target: Class indices [B] or soft targets [B, K].

        Returns:
            Logits [B, K]; with a teacher (logits, logits for the task loss, each method's named unweighted terms).
        """
        features = self.forward_with_features(images, teacher)
        logits: Any = features.logits
        if teacher is None or target is None:
            return logits
        terms = self._run_methods(features, teacher, target, list(self.methods))
        with_all = isinstance(teacher, Features) and teacher.classes is None
        task_logits = features.logits if with_all else self.transform_logits(logits)
        return logits, task_logits, terms  # type: ignore[return-value]

    def measure(
            self,
            images: torch.Tensor,
            teacher: TeacherFeatures,
            target: torch.Tensor,
            methods: Sequence[str],
    ) -> Dict[str, torch.Tensor]:
        """Return the unweighted terms of some methods, with batch norms and dropout as in evaluation."""
        with evaluation_mode(self):
            features = self.forward_with_features(images, teacher)
            terms = self._run_methods(features, teacher, target, methods)
        return {name: value for named in terms.values() for name, value in named.items()}

    def _make_comparable(self, features: Features, teacher: Features) -> None:
        """Bring the logits of both to the classes that both know, and through the methods' maps."""
        known = teacher.classes

        def _transform(logits: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
            return self.transform_logits(logits if logits is None or known is None else logits[:, known])

        def _behind(head: LogitHead) -> LogitHead:
            return lambda x: _transform(head(x))  # type: ignore[return-value]

        for model in (features, teacher):
            model.logits, model.token_logits = _transform(model.logits), _transform(model.token_logits)
            model.head = None if model.head is None else _behind(model.head)
        features.transform_logits = _transform  # type: ignore[assignment]
        teacher.complete_standardized()

    def _run_methods(
            self,
            features: Features,
            teacher: TeacherFeatures,
            target: torch.Tensor,
            names: Sequence[str],
    ) -> MethodTerms:
        """Return the terms of methods, with the logits that they compare transformed, in place for one teacher."""
        if isinstance(teacher, Features):
            self._make_comparable(features, teacher)
            return {name: self._run_method(name, '', features, teacher, target) for name in names}
        pairs = {name: (self._part_of(features, i), own) for i, (name, own) in enumerate(teacher.items())}
        for pair in pairs.values():
            self._make_comparable(*pair)
        units = [(name, scope) for name in names for scope in ([split_scope(name)[1]] if '@' in name else pairs)]
        return {
            name if '@' in name else join_scope(name, scope): self._run_method(name, scope, *pairs[scope], target)
            for name, scope in units}

    def _part_of(self, features: Features, index: int) -> Features:
        """Return the student's features for one of several teachers: adapters that are shared have a loss for each."""
        matched = tuple(loss[index] if isinstance(loss, tuple) else loss for loss in features.matched)
        return replace(features, matched=matched)

    def _run_method(
            self,
            name: str,
            scope: str,
            features: Features,
            teacher: Features,
            target: torch.Tensor,
    ) -> Dict[str, torch.Tensor]:
        """Return a method's terms; without a graph where its weight is 0, as 0 times an infinite gradient is nan."""
        unit = name if '@' in name else join_scope(name, scope)
        with torch.set_grad_enabled(torch.is_grad_enabled() and unit not in self.unweighted):
            terms = self.methods[name](features, self._source(unit, teacher), target)
        return {scope_term(term, scope): value for term, value in terms.items()} if scope else terms

    def _targets(self, teacher: TeacherFeatures) -> Any:
        """Return what the adapters are matched with: a teacher's counterpart, of each where several share them."""
        name = next((name for name, method in self.methods.items() if method.adapter), '')
        scope = split_scope(name)[1]
        if isinstance(teacher, Features) or scope:
            return self._source(name, teacher if isinstance(teacher, Features) else teacher[scope]).tap
        return tuple(self._source(join_scope(name, one), features).tap for one, features in teacher.items())

    def _source(self, unit: str, teacher: Features) -> Features:
        """Return a teacher's features as a method gets them."""
        if unit not in self.standardized:
            return teacher
        assert teacher.standardized is not None  # for mypy: the task looks
        return teacher.standardized

    def forward_with_features(self, images: torch.Tensor, teacher: Optional[TeacherFeatures] = None) -> Features:
        """Run the student; with a teacher's features, read what the methods ask for and match the adapters."""
        images = self._resize(images)
        outputs = LOGITS if teacher is None else self.outputs
        if self.tap is None and outputs == LOGITS:
            return Features(logits=logits_of(self.student(images)))
        spec = self._logits_spec if outputs == LOGITS else self.spec
        if self.tap is None:
            return read(self.student, spec, images, outputs)
        target = None if teacher is None else self._targets(teacher)
        return path_of(self.tap)(self.student, spec, images, outputs, self.tap, self.adapters, target).run()

    def transform_logits(self, logits: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
        """Apply the methods' maps of the logits, which the task loss and all methods see."""
        if logits is not None:
            first: Dict[str, Any] = {}
            for name, method in self.methods.items():
                first.setdefault(split_scope(name)[0], method)  # with each of several teachers it maps once
            for method in first.values():
                logits = method.transform_logits(logits)
        return logits

    def no_weight_decay(self) -> Set[str]:
        """Return the parameters of student and methods without weight decay, under their names here."""
        own = getattr(self.student, 'no_weight_decay', set)
        methods = {
            f'methods.{name}.{parameter}' for name, method in self.methods.items()
            for parameter in method.no_weight_decay()}
        return {f'student.{name}' for name in own()} | methods

    def group_matcher(self, coarse: bool = False) -> Union[Dict[str, Any], Callable[[str], int]]:
        """Return timm's layer grouping of the student; adapter and methods belong to the last layer."""
        if not hasattr(self.student, 'group_matcher'):
            return {}
        layers = group_parameters(self.student, self.student.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values(), default=0)
        return lambda name: layers.get(name[len('student.'):], last) if name.startswith('student.') else last

    def merged_state_dict(self) -> Dict[str, torch.Tensor]:
        """Return the state dict of the plain student with the adapter merged."""
        return merged_state_dict(self.student, self.adapters, self.tap)

    def merged_copy(self) -> nn.Module:
        """Return a plain timm model with the merged weights, in eval mode."""
        model = copy_plain_student(self.student)
        model.load_state_dict(self.merged_state_dict())
        return model

    def plain_student(self, images: torch.Tensor) -> nn.Module:
        """Return a plain timm model that takes the merged state dict, built again by name where that is the student.

        Args:
            images: Batch to measure that on, [B, C, H, W].
        """
        if not self.adapters or self.tap is None or not self.tap.consumers:
            return copy_plain_student(self.student)
        return create_plain_student(self.student, self._resize(images))

    def merge_error(self, images: torch.Tensor, plain: Optional[nn.Module] = None) -> float:
        """Return the largest logit difference that merging makes on a batch, relative to the logits' spread.

        Args:
            images: Normalised batch, [B, C, H, W].
            plain: Model that the merged state dict was loaded into; by default a new one is made.
        """
        if plain is None:
            plain = self.plain_student(images)
            plain.load_state_dict(self.merged_state_dict())
        return merge_error(self, plain, self._resize(images))

    def _resize(self, images: torch.Tensor) -> torch.Tensor:
        return images if self.resize_to is None else resize_images(images, self.resize_to)

    def memory(self) -> Dict[str, torch.Tensor]:
        """Return what the methods keep of the run, outside of their state dicts: their non-persistent buffers."""
        persistent = self.methods.state_dict()
        return {name: buffer for name, buffer in self.methods.named_buffers() if name not in persistent}

    @contextmanager
    def without_memory(self) -> Iterator[None]:
        """Take what the methods keep of the run away, for a copy that does not need it."""
        kept = self.memory()
        for name in kept:
            self._set_memory(name, None)
        try:
            yield
        finally:
            for name, buffer in kept.items():
                self._set_memory(name, buffer)

    def _set_memory(self, name: str, buffer: Optional[torch.Tensor]) -> None:
        owner, _, attribute = name.rpartition('.')
        setattr(self.methods.get_submodule(owner), attribute, buffer)

    def task_state(self) -> Dict[str, Any]:
        """Return what a merged state dict lacks for resuming: raw tensors that merging changed, adapters, methods."""
        raw = self.student.state_dict()
        changed = [*merged_tensors(self.student, self.adapters, self.tap), *split_batch_norm_tensors(self.student)]
        return {
            'student': {name: raw[name] for name in changed},
            'adapter': self.adapters.state_dict(),
            'methods': self.methods.state_dict(),
            'memory': self.memory(),
        }

    def load_task_state(self, state_dict: Mapping[str, torch.Tensor], task_state: Optional[Mapping[str, Any]]) -> None:
        """Restore a module from a merged state dict and what `task_state()` returned with it.

        Raises:
            UsageError: If the tensors are those of another student, adapter or set of methods.
        """
        task_state = task_state or {}
        if self.adapters and not task_state.get('adapter'):
            raise UsageError(
                'The checkpoint holds no adapter, so this run cannot go on from it with its --kd. '
                'To start from its weights, give it as --initial-checkpoint instead of --resume.')
        if not self.adapters and task_state.get('adapter'):
            raise UsageError(
                'The checkpoint holds an adapter that this --kd does not use. '
                'Resume with the --kd of the run that wrote it.')
        try:
            self.student.load_state_dict({**state_dict, **task_state.get('student', {})})
            self.adapters.load_state_dict(task_state.get('adapter', {}))
            self.methods.load_state_dict(task_state.get('methods', {}))
            self._load_memory(task_state.get('memory', {}))
        except RuntimeError as e:
            reason = str(e).splitlines()[-1].strip()
            raise UsageError(
                f'The checkpoint does not fit this run: {reason} Resume with the --student, --teacher, '
                '--kd and --kd-kwargs of the run that wrote it.') from e

    @torch.no_grad()
    def _load_memory(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, buffer in self.memory().items():
            if name not in state or state[name].shape != buffer.shape:
                found = 'nothing' if name not in state else f'{list(state[name].shape)}'
                raise RuntimeError(f"for '{name}' it holds {found}, here it is {list(buffer.shape)}.")
            buffer.copy_(state[name])
