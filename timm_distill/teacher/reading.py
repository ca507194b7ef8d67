"""Reading of a task's teachers: their features of a batch, live or cached, and what is measured of them beforehand."""
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, Dict, FrozenSet, Iterable, List, Mapping, Optional, Tuple, Union

import torch

from ..cache.targets import CachedTargets
from ..data.views import split_keys
from ..errors import UsageError
from ..features.spec import Features, TeacherFeatures
from ..methods._scopes import split_scope
from .rounding import run_rounded
from .several import Teachers, live_teachers, teachers_by_name
from .standardize import NUM_IMAGES
from .stored import StoredTeacher
from .targets import add_to_statistics, finish_statistics, lacks_statistics, standardized_outputs
from .teacher import Teacher


class ReadsTeachers:
    """Part of a task that knows its teachers.

    Attributes:
        teacher: Frozen teacher, or several under names; None where no method asks for one.
        targets: Cached targets of a run whose labels carry the keys of views.
        summon_teacher: Gives the teacher itself where it is known by its cache and can be had.
        needs_indices: Whether a method reads the indices of the samples.
    """
    teacher: Union[Teacher, StoredTeacher, Teachers, None]
    targets: Optional[CachedTargets]
    summon_teacher: Optional[Callable[[], Teacher]]
    needs_indices: bool
    module: Any
    device: Any
    _teacher_outputs: Dict[str, FrozenSet[str]]  # of each teacher

    @property
    def teachers(self) -> Dict[str, Any]:
        """The teachers by name; one without others under ''."""
        return teachers_by_name(self.teacher)

    @property
    def teacher_outputs(self) -> FrozenSet[str]:
        """What the methods read of the teacher, by the names of its own outputs; of any of several."""
        return frozenset[str]().union(*self._teacher_outputs.values())

    @property
    def measurable(self) -> List[str]:
        """The methods whose terms can be measured on images that are not trained on, and have no labels."""
        if not live_teachers(self.teacher):  # stored targets are those of the training images
            return []
        methods = self.module.methods.items()
        return [name for name, method in methods if not (method.needs_indices or method.reads_labels)]

    def teacher_features(self, input: torch.Tensor) -> TeacherFeatures:
        """Run each teacher once on a batch normalised for the student, [B, C, H, W], for all that the methods read."""
        features = {name: self._run_teacher(input, name) for name in self.teachers}
        return features if isinstance(self.teacher, Teachers) else features['']

    def read_targets(self, input: torch.Tensor, target: torch.Tensor) -> Tuple[torch.Tensor, TeacherFeatures]:
        """Return labels and the teacher's features, which cached targets know by the keys in the target."""
        if self.targets is None:
            teacher = self.teacher_features(input)
            if self.needs_indices:
                target, indices = _split_indices(target)
                for features in [teacher] if isinstance(teacher, Features) else teacher.values():
                    features.indices = indices
            return target, teacher
        target, keys = split_keys(target)
        is_stored = isinstance(self.teacher, StoredTeacher)
        live = None if is_stored and self.summon_teacher is None else self._run_summoned_teacher
        stored = self._with_aliases(self.targets.read(keys, input, live, self._run_rounded), '')
        stored.indices = self.targets.grid.indices(keys)
        return target, stored

    def _run_teacher(self, images: torch.Tensor, name: str) -> Features:
        return self._with_aliases(self.teachers[name](images, self._teacher_outputs[name]), name)

    def _run_summoned_teacher(self, images: torch.Tensor) -> Features:
        if isinstance(self.teacher, StoredTeacher):
            self.summon()
        assert self.teacher is not None
        return self.teacher(images, self._teacher_outputs[''])

    def _run_rounded(self, images: torch.Tensor) -> Tuple[Features, float]:
        assert isinstance(self.teacher, Teacher)
        return run_rounded(self.teacher, images, self._teacher_outputs[''])

    def summon(self) -> None:
        """Put the teacher itself in the place of what its cache says of it, where it can be had."""
        if self.summon_teacher is not None:
            (known,) = self.teachers.values()
            self.teacher = self.summon_teacher()
            self.teacher.standardizer = known.standardizer

    def _with_aliases(self, features: Features, name: str) -> Features:
        """Add what the methods know a teacher's outputs by: tap, stages of a teacher without any, head."""
        outputs, standardized = self._teacher_outputs[name], standardized_outputs(self.module, name)
        self._set_tap(features)
        if standardized:
            features.standardized = self.teachers[name].standardizer(features, standardized)
            if features.standardized is not None:
                self._set_tap(features.standardized)
        if outputs & {'head', 'tail'}:
            teacher = live_teachers(self.teacher)[name]
            features.head = teacher.run_head if 'head' in outputs else None
            features.tail = partial(teacher.run_tail, prefix=features.prefix) if 'tail' in outputs else None
        return features

    def _set_tap(self, features: Features) -> None:
        features.tap = features.feature
        tap = self.module.tap
        if tap is not None and tap.point == 'pre_logits' and features.pre_logits is not None:
            features.tap = features.pre_logits[:, :, None, None]

    @property
    def needs_target_statistics(self) -> bool:
        """Whether targets are standardised and their statistics have not been measured yet."""
        return lacks_statistics(self.module, self.teachers)

    def standardize_targets(
            self,
            batches: Iterable[Any],
            num_images: int = NUM_IMAGES,
            amp_autocast: Callable[[], Any] = nullcontext,
            distributed: bool = False,
    ) -> None:
        """Measure the statistics that targets are standardised by, where methods get such.

        Args:
            batches: Training images in any order, normalised for the student, (images, target) each.
            num_images: How many to take at most, of this process.
            amp_autocast: Makes the context of each forward pass.
            distributed: Each process has its part of the images; all get the statistics of the whole.

        Raises:
            UsageError: If a teacher's features are not finite or all the same.
        """
        if not self.module.standardized:
            return
        for input, target in batches:
            with torch.no_grad(), amp_autocast():
                live = self.targets is None
                features = self.teacher_features(input.to(self.device)) if live else self.read_targets(input, target)[1]
            add_to_statistics(self.module, self.teachers, features, num_images)
            num_images -= len(input)
            if num_images <= 0 and not distributed:  # processes that share a teacher run it equally often
                break
        finish_statistics(self.teachers, distributed)

    @property
    def class_means_shapes(self) -> Dict[str, Tuple[int, int]]:
        """The student's classes and the width of the pre-logits, (K, D), of each teacher whose class means are read."""
        methods = self.module.methods.items()
        readers = {split_scope(name)[1] for name, method in methods if method.needs_class_means}
        student: Any = self.module.spec.features
        return {
            name: (student.num_classes, teacher.tap_channels('pre_logits'))
            for name, teacher in self.teachers.items() if name in readers}

    @property
    def class_means_shape(self) -> Optional[Tuple[int, int]]:
        """The student's classes and the width of the teacher's pre-logits, (K, D); None where no method needs means."""
        return self.class_means_shapes.get('')

    def set_class_means(self, means: Union[torch.Tensor, Mapping[str, torch.Tensor]], teacher: str = '') -> None:
        """Give the methods that need them the teacher's mean pre-logits of every class, [K, D].

        Args:
            means: Of the teacher, or by the name of each of several.
            teacher: Whose these are, of several.

        Raises:
            UsageError: If the shape is another, a value is not finite, or no method reads them.
        """
        if isinstance(means, Mapping):
            for name, own in means.items():
                self.set_class_means(own, name)
            return
        readers = [
            method for name, method in self.module.methods.items()
            if method.needs_class_means and split_scope(name)[1] == teacher]
        if not readers and isinstance(self.teacher, Teachers):
            names = ', '.join(self.class_means_shapes) or 'none'
            raise UsageError(f"No method reads class means of a teacher '{teacher}'; of these they are read: {names}.")
        for method in readers:
            method.set_class_means(means)


def _split_indices(target: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    if target.ndim != 2 or target.shape[1] != 2 or target.is_floating_point():
        raise UsageError(
            f'A method of --kd reads sample indices: the target must hold pairs (class index, sample '
            f'index), int64 [B, 2], not {target.dtype} {list(target.shape)}. IndexedDataset of '
            'timm_distill.data makes such targets; mixup and cutmix cannot.')
    return target[:, 0], target[:, 1]
