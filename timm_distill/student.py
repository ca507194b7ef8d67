"""The trainable module: the student, the adapter on its path, and whatever the methods train.

One module, so that optimizer, DDP, EMA and compile see everything that trains in one forward.
"""
from typing import Any, Callable, Dict, Mapping, Optional, Set, Tuple, Union

import torch
import torch.nn as nn
from timm.models import group_parameters

from .adapters import Adapter
from .errors import UsageError
from .merge import merge_error, merged_state_dict, merged_tensors
from .taps import Features, StudentTap

MethodTerms = Dict[str, Dict[str, torch.Tensor]]  # unweighted terms by method


class AdaptedStudent(nn.Module):
    """A student with an adapter between its last stage (or its pre-logits) and its classifier.

    Args:
        student: timm model.
        adapter: Adapter on its path, None for the plain student.
        tap: Insertion point of the adapter.
        methods: Methods by name, whose own parameters train with the student.
    """

    def __init__(
            self,
            student: nn.Module,
            adapter: Optional[Adapter] = None,
            tap: Optional[StudentTap] = None,
            methods: Optional[Mapping[str, nn.Module]] = None,
    ):
        super().__init__()
        self.student = student
        self.adapter = adapter
        self.tap = tap
        self.methods = nn.ModuleDict(methods or {})

    def forward(
            self,
            images: torch.Tensor,
            teacher: Optional[Features] = None,
            target: Optional[torch.Tensor] = None,
    ) -> Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor, MethodTerms]]:
        """Run the student, and the methods where a teacher's features are given.

        Args:
            images: Normalised batch, [B, C, H, W].
            teacher: Features of the teacher for this batch.
            target: Class indices [B] or soft targets [B, K].

        Returns:
            Logits [B, K]; with a teacher (logits, logits for the task loss, each method's named unweighted terms).
        """
        features = self.forward_with_features(images)
        if teacher is None or target is None:
            return features.logits  # type: ignore[return-value]
        logits = features.logits
        features.logits, teacher.logits = self.transform_logits(logits), self.transform_logits(teacher.logits)
        terms = {name: method(features, teacher, target) for name, method in self.methods.items()}
        return logits, features.logits, terms  # type: ignore[return-value]

    def forward_with_features(self, images: torch.Tensor) -> Features:
        """Run the student and keep what the adapter gives."""
        if self.adapter is None or self.tap is None:
            return Features(logits=self.student(images))
        layout = self.tap.layout
        feature = self.student.forward_features(images)
        if self.tap.point == 'pre_logits':
            feature = self.student.forward_head(feature, pre_logits=True)
        adapted = self.adapter(layout.to_positions(feature))
        head = self.student.forward_head if self.tap.point == 'features' else self.student.get_classifier()
        logits = head(layout.from_positions(adapted.output))
        return Features(logits=logits, expanded=layout.to_map(adapted.expanded), segments=adapted.segments)

    def transform_logits(self, logits: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
        """Apply the methods' maps of the logits, which the task loss and all methods see."""
        if logits is not None:
            for method in self.methods.values():
                logits = method.transform_logits(logits)
        return logits

    def no_weight_decay(self) -> Set[str]:
        """Return the student's parameters without weight decay, under their names here."""
        own = getattr(self.student, 'no_weight_decay', set)
        return {f'student.{name}' for name in own()}

    def group_matcher(self, coarse: bool = False) -> Union[Dict[str, Any], Callable[[str], int]]:
        """Return timm's layer grouping of the student; adapter and methods belong to the last layer."""
        if not hasattr(self.student, 'group_matcher'):
            return {}
        layers = group_parameters(self.student, self.student.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values(), default=0)
        return lambda name: layers.get(name[len('student.'):], last) if name.startswith('student.') else last

    def merged_state_dict(self) -> Dict[str, torch.Tensor]:
        """Return the state dict of the plain student with the adapter merged."""
        return merged_state_dict(self.student, self.adapter, self.tap)

    def merge_error(self, images: torch.Tensor) -> float:
        """Return the largest logit difference that merging makes on a batch, relative to the logits' spread."""
        return merge_error(self, self.student, merged_tensors(self.student, self.adapter, self.tap), images)

    def task_state(self) -> Dict[str, Any]:
        """Return what a merged state dict lacks for resuming: raw tensors that merging changed, adapter, methods."""
        raw = self.student.state_dict()
        return {
            'student': {name: raw[name] for name in merged_tensors(self.student, self.adapter, self.tap)},
            'adapter': self.adapter.state_dict() if self.adapter is not None else {},
            'methods': self.methods.state_dict(),
        }

    def load_task_state(self, state_dict: Mapping[str, torch.Tensor], task_state: Optional[Mapping[str, Any]]) -> None:
        """Restore a module from a merged state dict and what `task_state()` returned with it.

        Raises:
            UsageError: If the tensors are those of another student, adapter or set of methods.
        """
        task_state = task_state or {}
        if self.adapter is not None and not task_state.get('adapter'):
            raise UsageError('The checkpoint holds no adapter, so this run cannot go on from it with its --kd. '
                             'To start from its weights, give it as --initial-checkpoint instead of --resume.')
        if self.adapter is None and task_state.get('adapter'):
            raise UsageError('The checkpoint holds an adapter that this --kd does not use. '
                             'Resume with the --kd of the run that wrote it.')
        try:
            self.student.load_state_dict({**state_dict, **task_state.get('student', {})})
            if self.adapter is not None:
                self.adapter.load_state_dict(task_state['adapter'])
            self.methods.load_state_dict(task_state.get('methods', {}))
        except RuntimeError as e:
            reason = str(e).splitlines()[-1].strip()
            raise UsageError(f'The checkpoint does not fit this run: {reason} Resume with the --student, --teacher, '
                             '--kd and --kd-kwargs of the run that wrote it.') from e
