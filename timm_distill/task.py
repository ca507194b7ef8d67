"""The distillation task: a student with its adapters, a frozen teacher, methods, weights and schedules."""
import logging
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Union, cast

import torch
import torch.nn as nn
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch.nn.parallel import DistributedDataParallel

from .cache.targets import CachedTargets
from .checkpoint.run_files import nonfinite_tensors
from .engine.grad_norms import reached_tensors
from .errors import MergeError, UsageError
from .features.classifier import classifier_parameters
from .methods._terms import TermWeights
from .student.adapted import AdaptedStudent
from .student.merged import MergedStudents
from .teacher.dropping import TeacherDrop
from .teacher.reading import ReadsTeachers
from .teacher.several import Teachers
from .teacher.stored import StoredTeacher
from .teacher.targets import (
    check_statistics,
    load_statistics,
    statistics_state,
    teacher_outputs,
)
from .teacher.teacher import Teacher
from .utils._compat import ignore_in_ddp

_logger = logging.getLogger(__name__)


class DistillTask(ReadsTeachers, TrainingTask):
    """Train a student with a task loss and the weighted terms of distillation methods.

    `task(input, target)` returns 'loss' and 'output' (logits); with methods also 'task_loss' and every method's
    unweighted terms by name. Without labels there is no task loss, and the target is not read.

    Args:
        module: Student, adapter and methods.
        teacher: Frozen teacher, or several under names; None where no method asks for one.
        criterion: Task loss of (logits, target), None without labels.
        weights: Weight of each method's terms, by method name; of one that several teachers share with each of them,
            METHOD@TEACHER.
        schedules: Factor on each method's terms by epoch; its own schedule by default.
        task_loss_weight: Weight of the task loss.
        teacher_drop: Probability with which a step leaves out the terms of one of several teachers.
        input_size: (channels, height, width), for the probe of a merge before any batch was seen.
        device: Device of the task.
        dtype: Dtype of the task.
        verbose: Log what was built.
    """

    def __init__(
            self,
            module: AdaptedStudent,
            teacher: Union[Teacher, StoredTeacher, Teachers, None],
            criterion: Optional[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]],
            weights: Mapping[str, float],
            task_loss_weight: float = 1.,
            input_size: Sequence[int] = (3, 224, 224),
            schedules: Optional[Mapping[str, Callable[[int], float]]] = None,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
            verbose: bool = True,
            teacher_drop: float = 0.,
    ):
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        self.trainable_module: nn.Module = module
        self.teacher = teacher
        self.targets: Optional[CachedTargets] = None  # of a run whose targets carry the keys of views
        self.summon_teacher: Optional[Callable[[], Teacher]] = None  # where one is known by its cache and can be had
        self.criterion = criterion
        self.terms = TermWeights(module.methods, weights, schedules, task_loss_weight)
        self.input_size = tuple(input_size)
        self._teacher_outputs = {name: teacher_outputs(module, name) for name in self.teachers}
        self.needs_indices = any(method.needs_indices for method in module.methods.values())
        self._drop = TeacherDrop(teacher_drop, torch.initial_seed()) if teacher_drop else None
        self._untrained: Optional[List[nn.Parameter]] = None  # by terms with a weight, in the current epoch
        self._merged = MergedStudents(self.input_size)
        self.set_epoch(0)

    @property
    def module(self) -> AdaptedStudent:
        """The trainable module without DDP and compile wrappers."""
        return unwrap_model(self.trainable_module)

    @property
    def weights(self) -> Dict[str, float]:
        """Weight of each method's terms, of one that several teachers share with each of them."""
        return self.terms.weights

    @property
    def schedules(self) -> Dict[str, Callable[[int], float]]:
        """Factor on these terms by epoch, counted from 0."""
        return self.terms.schedules

    @property
    def task_loss_weight(self) -> float:
        """Weight of the task loss."""
        return self.terms.task_loss_weight

    @task_loss_weight.setter
    def task_loss_weight(self, weight: float) -> None:
        self.terms.task_loss_weight = weight

    def set_epoch(self, epoch: int) -> None:
        """Apply the methods' weight schedules for an epoch, counted from 0."""
        self.terms.set_epoch(epoch)
        self.module.unweighted = self.terms.unweighted()
        self._untrained = None
        self._merged.note_probe(None)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Run teacher and student once and combine the losses.

        Args:
            input: Normalised batch, [B, C, H, W].
            target: Class indices [B] or soft targets [B, K]; pairs (class index, index of the sample in the training
                set), int64 [B, 2], where a method reads sample indices.

        Returns:
            'loss' (weighted sum), 'output' (logits, [B, K]) and, with methods, 'task_loss' and their unweighted terms.
        """
        if self._merged.probe is None and isinstance(input, torch.Tensor):  # patch sequences come as a dict
            for method in self.module.methods.values():
                method.check_ready()
            self._merged.note_probe(input)
        if self.teacher is None:
            logits = self.trainable_module(input)
            assert self.criterion is not None  # for mypy: without labels there is a teacher
            return {'loss': self.criterion(logits, target), 'output': logits}
        target, teacher = self.read_targets(input, target)
        check_statistics(self.module, teacher)
        logits, task_logits, terms = self.trainable_module(input, teacher, target)
        task_terms = {} if self.criterion is None else {'task_loss': self.criterion(task_logits, target)}
        weighted = [(self.task_loss_weight, task_loss) for task_loss in task_terms.values()]
        if self._drop is not None:
            self.terms.kept = self._choose_teachers(terms)
        weighted += self.terms.weigh(terms)
        # 0 times an infinite term is nan: what has no weight is left out
        loss = sum((weight * term for weight, term in weighted if weight), torch.zeros_like(weighted[0][1]))
        if isinstance(self.trainable_module, DistributedDataParallel) or not loss.requires_grad:
            loss = self._with_all_parameters(loss)
        flat = {name: value for named in terms.values() for name, value in named.items()}
        return {'loss': loss, 'output': logits, **task_terms, **flat}

    def _choose_teachers(self, terms: Dict[str, Dict[str, torch.Tensor]]) -> Dict[str, torch.Tensor]:
        """Return whether each teacher's terms count in this step; all of them where nothing is trained."""
        if self._drop is None or not self.module.training:
            return {}
        distributed = isinstance(self.trainable_module, DistributedDataParallel)
        return self._drop.choose(self.terms.by_teacher(terms), distributed)

    @torch.no_grad()
    def distill_terms(self, input: torch.Tensor, ema: bool = False) -> Dict[str, torch.Tensor]:
        """Return the unweighted terms of a batch that nothing is trained on, of the methods that can be measured so.

        Those that keep something of each training image cannot.

        Args:
            input: Normalised batch, [B, C, H, W].
            ema: Of the EMA student.
        """
        trained = self._trained_module(ema)
        if trained is None or not self.measurable:
            return {}
        target = torch.zeros(len(input), dtype=torch.int64, device=input.device)
        teacher = self.teacher_features(input)
        check_statistics(self.module, teacher)
        return trained.measure(input, teacher, target, self.measurable)

    @property
    def student(self) -> nn.Module:
        """The student, without adapters."""
        return self.module.student

    def weighted_terms(self, result: Mapping[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        """Return the terms of the newest result, each times its current weight, by name without '_loss'."""
        return self.terms.weighted_terms(result) if self.module.methods else {'task': result['loss']}

    def term_weights(self) -> Dict[str, float]:
        """Return the current weight of each term of `weighted_terms`, schedules included."""
        methods = self.terms.term_weights()
        return methods if self.criterion is None else {'task': self.task_loss_weight, **methods}

    def changes_terms(self, epoch: int) -> bool:
        """Whether other terms have a weight in an epoch than in the one before; true for the first."""
        return self.terms.changes_terms(epoch)

    @property
    def is_scheduled(self) -> bool:
        """Whether the weight of a method changes over epochs."""
        return self.terms.is_scheduled

    @property
    def trains_classifier(self) -> bool:
        """Whether the task loss, or a method that reads the student's logits, has a weight."""
        return self.terms.trains_classifier

    def unscheduled_loss(self, averages: Mapping[str, float]) -> float:
        """Return the weighted sum of an epoch's averages of the terms without the schedules, to compare epochs by."""
        return self.terms.unscheduled_loss(averages) if self.module.methods else averages['loss']

    def _with_all_parameters(self, loss: torch.Tensor) -> torch.Tensor:
        """Give zero gradients to what trains with terms of weight 0 alone: DDP waits for the gradients of all."""
        if not torch.is_grad_enabled():
            return loss
        if self._untrained is None:
            reached = reached_tensors(loss)
            self._untrained = [
                p for p in self.trainable_module.parameters()
                if p.requires_grad and id(p) not in reached]
        return loss + sum(0. * p.sum() for p in self._untrained) if self._untrained else loss

    def state_dict(self, *args: Any, **kwargs: Any) -> Dict[str, Any]:  # type: ignore[override]
        """Return the state of what trains. The teacher is left out: libraries that save a module whole save this."""
        state = super().state_dict(*args, **kwargs)
        prefix = (args[1] if len(args) > 1 else kwargs.get('prefix', '')) + 'teacher.'
        for name in [name for name in state if name.startswith(prefix)]:
            del state[name]
        return state

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        """Load as a module does, with the teacher as it is: an entry of it neither has to be there nor is read."""
        for name in [name for name in state_dict if name.startswith(f'{prefix}teacher.')]:
            del state_dict[name]
        if self.teacher is not None:
            state_dict.update(self.teacher.state_dict(prefix=f'{prefix}teacher.'))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def get_clip_parameters(self, exclude_head: bool = False) -> List[nn.Parameter]:
        """Return the parameters to clip; `exclude_head` leaves out the student's classifier (for AGC)."""
        head = {id(p) for p in classifier_parameters(self.module.student)} if exclude_head else set()
        return [p for p in self.trainable_module.parameters() if id(p) not in head]

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs: Any) -> 'DistillTask':
        """Wrap the one trainable module in DDP; the teacher is replicated outside it."""
        if device_ids and torch.device(device_ids[0]).type == 'cpu':
            device_ids = None  # DDP takes no ids for CPU modules
        self._share_memory()
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def _share_memory(self) -> None:
        """Let all ranks start from the first one's memory of the methods, which they keep equal without DDP."""
        if self._drop is not None:
            self._drop.share()
        memory = self.module.memory()
        for buffer in memory.values():
            torch.distributed.broadcast(buffer, 0)
        kept = {id(buffer) for buffer in memory.values()}
        names = [name for name, buffer in self.trainable_module.named_buffers() if id(buffer) in kept]
        ignore_in_ddp(self.trainable_module, names)

    def setup_ema(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Create the EMA student; what the methods keep of the run (memory banks) is not copied for it."""
        with self.module.without_memory():
            return super().setup_ema(*args, **kwargs)

    def compile(  # type: ignore[override]
            self,
            backend: str = 'inductor',
            mode: Optional[str] = None,
            **compile_kwargs: Any,
    ) -> nn.Module:
        """Compile the trainable module, the teacher and the model that is evaluated, before DDP wrapping."""
        def _compile(module: nn.Module) -> nn.Module:
            return cast(nn.Module, torch.compile(module, backend=backend, mode=mode, **compile_kwargs))

        self.trainable_module = _compile(self.trainable_module)
        if self.teacher is not None:
            self.teacher.compile(backend=backend, mode=mode, **compile_kwargs)
        self._merged.compile_with(_compile)
        return self.trainable_module

    def compile_ema(self, backend: str = 'inductor', mode: Optional[str] = None, **compile_kwargs: Any) -> None:
        """Nothing to do: `compile` holds for every model that `get_eval_model` returns."""

    def get_eval_model(self, module: Optional[nn.Module] = None, ema: bool = False) -> Optional[nn.Module]:
        """Return the plain timm student with the current weights, adapter merged: what is saved is what is validated.

        The model is a copy that a later call with the same `ema` brings up to date.
        """
        trained = self._trained_module(ema)
        if trained is None:
            return None
        return self._merged.load(trained, ema, trained.merged_state_dict())

    def _trained_module(self, ema: bool) -> Optional[AdaptedStudent]:
        module = self.get_trainable_module(ema=ema)
        return None if module is None else unwrap_model(module)

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, Any]:
        """Return what resuming needs besides the merged student: raw tensors, adapter and methods."""
        trained = self._trained_module(ema)
        drop = {} if self._drop is None else {'teacher_drop': self._drop.state_dict()}
        targets = {} if ema else statistics_state(self.module, self.teachers)
        return {} if trained is None else {'kd': list(trained.methods), **trained.task_state(), **drop, **targets}

    def load_task_state(
            self,
            state: Optional[Dict[str, Any]],
            strict: bool = True,
            module: Optional[nn.Module] = None,
            ema: bool = False,
    ) -> None:
        """Nothing to do: `load_checkpoint_state` needs both entries at once."""

    def get_checkpoint_state(
            self,
            ema: bool = False,
            unwrap_fn: Callable[[nn.Module], nn.Module] = unwrap_model,
    ) -> Dict[str, Any]:
        """Return the merged student, verified, under timm's keys, and the task's state beside it.

        Raises:
            MergeError: If the merged student's logits differ from the trained one's; holds the raw tensors.
        """
        trained = self._trained_module(ema)
        if trained is None:
            return {}
        state = trained.merged_state_dict()
        suffix = '_ema' if ema else ''
        entries = {f'state_dict{suffix}': state, f'task_state{suffix}': self.get_task_state(ema=ema)}
        try:
            error = self._merged.verify(trained, ema, state)
        except MergeError as e:
            raw = {'student': trained.student.state_dict(), 'adapters': trained.adapters.state_dict()}
            if nonfinite_tensors(raw, constant=None):
                e.spoiled_state = entries
            raise
        if self.verbose and error is not None:
            what = 'EMA student' if ema else 'student'
            _logger.info(f"Merged {what} verified: largest logit difference {error:.1e} of the logits' spread.")
        return entries

    def load_checkpoint_state(
            self,
            state_dict: Dict[str, Any],
            task_state: Optional[Dict[str, Any]] = None,
            ema: bool = False,
            strict: bool = True,
    ) -> None:
        """Restore the student as trained, the adapter and the methods.

        Raises:
            UsageError: If the entries are those of another run.
        """
        trained = self._trained_module(ema)
        if trained is None:
            raise RuntimeError('Cannot load EMA state before setup_ema().')
        saved = (task_state or {}).get('kd', [])
        if task_state is not None and saved != list(trained.methods):
            raise UsageError(
                f'The checkpoint was written with --kd {"+".join(saved) or "none"}, this run has --kd '
                f'{"+".join(trained.methods) or "none"}. Resume with the former, or start from its '
                'weights with --initial-checkpoint.')
        if task_state is not None and not ema:
            load_statistics(self.module, self.teachers, task_state.get('standardized'))
        trained.load_task_state(state_dict, task_state)
        if self._drop is not None and 'teacher_drop' in (task_state or {}):
            self._drop.load_state_dict((task_state or {})['teacher_drop'])


def merge_student(task: DistillTask, ema: bool = False) -> nn.Module:
    """Return a plain timm model with the student's (or EMA student's) weights, adapter merged, in eval mode.

    Raises:
        ValueError: If `ema` is asked for and the task has none.
    """
    module = task.get_trainable_module(ema=ema)
    if module is None:
        raise ValueError('The task has no EMA student: call task.setup_ema() before training.')
    return unwrap_model(module).merged_copy()
