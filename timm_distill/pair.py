"""Check of a pair before training: insertion point, layouts, costs, merging. No data and no weights are needed."""
import logging
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Union, cast

import timm
import torch
import torch.nn as nn

from .errors import UsageError
from .factory import DataSpec, create_distill_task
from .features.inputs import evaluation_mode, random_images
from .features.spec import Features
from .features.stages import classes_of
from .methods import Recipe
from .models.external import is_code, is_external, pretrained_classes
from .models.named import is_hub
from .student.merge import MERGE_TOLERANCE
from .task import DistillTask
from .teacher.build import name_teachers, split_by_teacher
from .teacher.teacher import Teacher
from .utils.random import unchanged_randomness

_logger = logging.getLogger(__name__)

_TIMED_STEPS = 3
_SAMPLES = 1024  # of the imagined training set
_LARGEST_BATCH = 1024
_USABLE_MEMORY = 0.8  # leaves room for workspaces and the loader


@dataclass(frozen=True)
class PairReport:
    """Result of the check of a teacher and a student.

    Attributes:
        teacher: Name of the teacher, or of several.
        student: Name of the student.
        kd: Methods.
        ok: Whether the pair can be trained and saved.
        reason: Why not, '' where it can.
        tap: Where the adapters sit and why, '' for methods without one.
        point: 'features', 'pre_logits', 'side' or ''.
        student_shapes: Shape of every tapped feature of the student for one image.
        teacher_shape: Shape of the teacher's counterpart, (C, H, W).
        teacher_shapes: That of each of several teachers by name, where `teacher_shape` is ().
        adapter_params: Parameters of the adapters, none of which are in the saved student.
        adapter_macs: Their multiply-adds per image, forward.
        consumers: Layers that the adapters fold into.
        merge_error: Largest logit difference between the student as trained and as saved, relative to their spread.
        teacher_share: Part of a training step that the teacher takes.
        step_seconds: Duration of a training step.
        batch_size: Images in that step.
        memory: Bytes that the step needs: measured on CUDA; elsewhere weights, gradients, momentum and what autograd
            keeps.
        suggested_batch_size: Largest power of two whose step fits the free memory of the device.
        classes: The teacher's classes of each class of the student in words, where they are mapped.
    """
    teacher: str
    student: str
    kd: str
    ok: bool
    reason: str = ''
    tap: str = ''
    point: str = ''
    student_shapes: Tuple[Tuple[int, ...], ...] = ()
    teacher_shape: Tuple[int, ...] = ()
    adapter_params: int = 0
    adapter_macs: int = 0
    consumers: Tuple[str, ...] = ()
    merge_error: float = 0.
    teacher_share: float = 0.
    step_seconds: float = 0.
    batch_size: int = 0
    memory: int = 0
    suggested_batch_size: int = 0
    classes: Tuple[str, ...] = ()
    teacher_shapes: Mapping[str, Tuple[int, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f'{self.teacher} -> {self.student} with --kd {self.kd}: {"works" if self.ok else "does not work"}']
        if self.reason:
            return '\n'.join([*lines, f'  {self.reason}'])
        if self.tap:
            shapes = [f'{name} {list(shape)}' for name, shape in self.teacher_shapes.items()]
            lines += [
                f'  tap                {self.tap}',
                f'  student feature    {"; ".join(str(list(shape)) for shape in self.student_shapes)}',
                f'  teacher feature    {"; ".join(shapes) or list(self.teacher_shape)}',
                f'  adapter            {self.adapter_params:,} parameters, {self.adapter_macs / 1e6:,.1f} M '
                'multiply-adds per image',
                f'  consumer           {", ".join(self.consumers) or "none, dropped at save"}',
                f"  merge error        {self.merge_error:.1e} of the logits' spread",
            ]
        if self.classes:
            indent = '\n' + ' ' * 21
            lines.append(f'  classes            {indent.join(self.classes)}')
        return '\n'.join([
            *lines,
            f"  teacher's share    {100 * self.teacher_share:.0f} % of a step of {self.step_seconds:.2f} s at "
            f'{self.batch_size} images',
            f'  memory of it       {self.memory / 2 ** 20:,.0f} MiB',
            f'  batch size         up to {self.suggested_batch_size} fits',
        ])


def check_pair(
        teacher: Union[str, nn.Module, Teacher, Mapping[str, Union[str, nn.Module, Teacher]]],
        student: Union[str, nn.Module],
        kd: Union[str, Recipe] = 'norm',
        batch_size: int = 8,
        teacher_kwargs: Optional[Dict[str, Any]] = None,
        teacher_pretrained: bool = True,
        device: Union[str, torch.device] = 'cpu',
        inspect: Optional[Callable[[DistillTask], None]] = None,
        **task_kwargs: Any,
) -> PairReport:
    """Build a pair with random weights, train a few steps on noise, merge, and report.

    Args:
        teacher: timm architecture or module, of several by name.
        student: timm architecture or module.
        kd: Methods, joined by '+', or a recipe.
        batch_size: Images of the measured step.
        teacher_kwargs: More arguments of `timm.create_model` for the teacher, of several for all or by name.
        teacher_pretrained: Give the teacher the class count of its pretrained weights, which are not loaded.
        device: Where to measure.
        inspect: Called with the task that was built.
        task_kwargs: More arguments of `create_distill_task`. Without `num_samples` or `sample_labels` a small training
            set is assumed for methods that keep something of each image.

    Returns:
        A report; `ok` is False, with the reason, where the pair cannot be trained or does not merge.
    """
    names = _describe_models(teacher), _describe_models(student), kd.kd if isinstance(kd, Recipe) else kd
    try:
        chosen = name_teachers(teacher)
        own_kwargs = {name: dict(own.get('teacher_kwargs') or {}) for name, own in split_by_teacher(
            {'teacher_kwargs': teacher_kwargs or {}}, list(chosen)).items()}
        checkpoints = split_by_teacher({'teacher_checkpoint': task_kwargs.get('teacher_checkpoint')}, list(chosen))
        for name, model in chosen.items():
            if isinstance(model, str):
                num_classes = _teacher_classes(model, teacher_pretrained)
                if num_classes is not None and not checkpoints[name].get('teacher_checkpoint'):
                    own_kwargs[name].setdefault('num_classes', num_classes)
        if any(isinstance(model, str) for model in chosen.values()):
            by_name = {name: kwargs for name, kwargs in own_kwargs.items() if isinstance(chosen[name], str)}
            task_kwargs.update(
                teacher_pretrained=dict.fromkeys(by_name, False) if '' not in by_name else False,
                teacher_kwargs=by_name if '' not in by_name else by_name[''])
        data = task_kwargs.get('data', DataSpec())
        if data.sample_labels is None:
            num_samples = task_kwargs.pop('num_samples', data.num_samples) or _SAMPLES
            task_kwargs.setdefault('sample_labels', torch.arange(num_samples) % 2)
        task = create_distill_task(student, teacher, kd, device=device, verbose=False, **task_kwargs)
        if inspect is not None:
            inspect(task)
        return _measure(task, *names, batch_size)
    except UsageError as e:
        return PairReport(*names, ok=False, reason=str(e))


def _describe_models(model: Any) -> str:
    if isinstance(model, Mapping):
        return ', '.join(f'{name} ({_describe_models(one)})' for name, one in model.items())
    return model if isinstance(model, str) else type(model).__name__


def _teacher_classes(name: str, pretrained: bool) -> Optional[int]:
    """Return the class count of the pretrained weights of an architecture, None where it has none."""
    if pretrained and is_hub(name):
        try:
            with unchanged_randomness(), torch.device('meta'):
                return cast(int, timm.create_model(name).num_classes)  # by its config
        except Exception as e:  # a hub and a folder raise errors of many libraries; said where the teacher is built
            _logger.debug(f'The class count of {name} is not known: {e}')
            return None
    if pretrained and is_external(name):
        return None if is_code(name) else pretrained_classes(name)
    if not pretrained or not timm.is_model(name) or not timm.is_model_pretrained(name):
        return None
    return timm.get_pretrained_cfg(name).num_classes


def _measure(task: DistillTask, teacher: str, student: str, kd: str, batch_size: int) -> PairReport:
    module = task.module
    images = random_images(module, task.input_size, batch_size).to(task.device)
    with evaluation_mode(module):
        num_classes = max(classes_of(module(images[:2])), 1)
    target = torch.arange(batch_size, device=task.device) % num_classes
    if task.needs_indices:
        target = torch.stack([target, torch.arange(batch_size, device=task.device)], 1)
    module.train()
    for name, shape in task.class_means_shapes.items():
        task.set_class_means(torch.randn(shape), name)
    if task.needs_target_statistics:
        task.standardize_targets([(images, target)])
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
    memory = _step_memory(task, images, target)
    seconds = _time(lambda: _step(task, optimizer, images, target), task.device)
    teacher_seconds = 0.
    if task.teacher is not None:
        teacher_seconds = _time(lambda: task.teacher_features(images), task.device)
    error = module.merge_error(images[:4]) if module.adapters else 0.
    merges = error <= MERGE_TOLERANCE[images.dtype]
    fixed = _fixed_memory(task)
    class_maps = {name: teacher.class_map for name, teacher in task.teachers.items() if teacher.class_map is not None}
    return PairReport(
        teacher, student, kd,
        ok=merges,
        reason='' if merges else f"The merged student's logits differ from the trained one's by {error:.1e}.",
        memory=fixed + memory,
        merge_error=error,
        teacher_share=teacher_seconds / seconds,
        step_seconds=seconds,
        batch_size=batch_size,
        suggested_batch_size=_suggest_batch_size(fixed, memory / batch_size, task.device),
        classes=tuple(
            f'{name}: {line}' if name else line for name, class_map in class_maps.items()
            for line in class_map.describe()),
        **_describe_tap(task, images),
    )


def _describe_tap(task: DistillTask, images: torch.Tensor) -> Dict[str, Any]:
    tap, adapters = task.module.tap, task.module.adapters
    if tap is None:
        return {}
    features = task.teacher_features(images[:1])
    taps = {'': features.tap} if isinstance(features, Features) else {
        name: own.tap for name, own in features.items()}
    matched = {name: tuple(tap.shape[1:]) for name, tap in taps.items() if tap is not None}
    shapes = [site.shape for site in tap.sites]
    positions = [site.layout.to_positions(torch.empty(1, *site.shape)).flatten(2).shape[2] for site in tap.sites]
    return dict(
        tap=str(tap),
        point=tap.point,
        student_shapes=tuple(shapes),
        teacher_shape=matched.pop('', ()),
        teacher_shapes=matched,
        adapter_params=sum(p.numel() for p in adapters.parameters()),
        adapter_macs=sum(
            n * sum(p.numel() for p in adapter.parameters() if p.ndim > 1) for n, adapter in zip(positions, adapters)),
        consumers=tuple(str(consumer) for consumer in tap.consumers),
    )


def _step(
        task: DistillTask,
        optimizer: torch.optim.Optimizer,
        images: torch.Tensor,
        target: torch.Tensor,
) -> None:
    task(images, target)['loss'].backward()
    optimizer.step()
    optimizer.zero_grad()


def _time(run: Callable[[], Any], device: torch.device) -> float:
    """Return the median duration of a call, after one call to warm up."""
    durations: List[float] = []
    for _ in range(_TIMED_STEPS + 1):
        start = time.perf_counter()
        run()
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        durations.append(time.perf_counter() - start)
    return sorted(durations[1:])[_TIMED_STEPS // 2]


def time_teacher(task: DistillTask, batch_size: int, amp_autocast: Callable[[], Any] = nullcontext) -> float:
    """Return the seconds that the teacher takes for a batch of noise."""
    parameter = next(task.module.parameters())
    images = random_images(task.module, task.input_size, batch_size).to(parameter.device, parameter.dtype)
    with amp_autocast():
        return _time(lambda: task.teacher_features(images), task.device)


def _step_memory(task: DistillTask, images: torch.Tensor, target: torch.Tensor) -> int:
    """Return the bytes that one forward and backward needs on top of what stays between steps."""
    if task.device.type == 'cuda':
        task(images, target)['loss'].backward()  # allocates the gradients
        torch.cuda.reset_peak_memory_stats(task.device)
        before = torch.cuda.memory_allocated(task.device)
        task(images, target)['loss'].backward()
        return torch.cuda.max_memory_allocated(task.device) - before
    own = {p.untyped_storage().data_ptr() for p in task.parameters()}
    kept: Dict[int, int] = {}

    def _keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(_keep, lambda tensor: tensor):
        task(images, target)['loss'].backward()
    return sum(kept.values())


def _fixed_memory(task: DistillTask) -> int:
    """Return the bytes of weights, and of gradients and momentum of what trains."""
    trained = sum(p.numel() * p.element_size() for p in task.module.parameters())
    everything = sum(t.numel() * t.element_size() for t in [*task.parameters(), *task.buffers()])
    return everything + 2 * trained


def _suggest_batch_size(fixed: int, per_image: float, device: torch.device) -> int:
    if device.type == 'cuda':
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    images = (_USABLE_MEMORY * free - fixed) / max(per_image, 1.)
    batch_size = 0
    while max(1, 2 * batch_size) <= min(images, _LARGEST_BATCH):
        batch_size = max(1, 2 * batch_size)
    return batch_size
