"""Probes of a run: what the frozen features of student and teacher are worth, between epochs."""
import argparse
import logging
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from timm.utils import unwrap_model

from ..args import PROBE_METRICS
from ..data import create_eval_loader
from ..data.loaders import DataLoaders
from ..data.probes import choose_images, create_probe_datasets
from ..engine.evaluate import ComputeSpec
from ..engine.probe import knn_accuracy, linear_probe_accuracy, mean_cosine, split_halves
from ..errors import UsageError
from ..features.pooled import PooledFeatures
from ..features.reader import as_vectors
from ..methods._scopes import join_scope
from ..task import DistillTask
from ..teacher.several import live_teachers
from ..teacher.teacher import Teacher
from ..utils.distributed import gather_in_order
from ..utils.random import unchanged_randomness

_logger = logging.getLogger(__name__)

_COSINE_IMAGES = 2048
_LEAST_IMAGES = 8  # of which a map between two features can be fitted and tested

Extract = Callable[[torch.Tensor], torch.Tensor]
FitAndTest = Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Probes:
    """Measures the frozen features of a run's models. Draws no random numbers from the run's generators.

    Args:
        args: Flags.
        data_config: Input size, normalisation and crop of the student.
        loaders: Training and validation data.
        compute: Device and precision.

    Raises:
        UsageError: If a probe is asked for that there are no images for.
    """

    def __init__(
            self,
            args: argparse.Namespace,
            data_config: Dict[str, Any],
            loaders: DataLoaders,
            compute: ComputeSpec,
            task: DistillTask,
    ):
        self.args = args
        self.data_config = data_config
        self.compute = compute
        self.task = task
        self.labelled: List[Any] = []
        self.paired: Optional[Any] = None
        self._pooled: Dict[bool, PooledFeatures] = {}
        self._teacher_metrics: Optional[Dict[str, float]] = None
        self._teacher_features: Dict[str, torch.Tensor] = {}
        with unchanged_randomness():
            if args.probe_interval or args.eval_metric in PROBE_METRICS:
                dataset_eval = None if args.no_labels or loaders.eval is None else loaders.eval.dataset
                self.labelled = [
                    self._load(dataset) for dataset in create_probe_datasets(args, data_config, dataset_eval)]
            if args.no_labels and live_teachers(task.teacher):
                dataset = choose_images(
                    (loaders.eval if loaders.eval is not None else loaders.train).dataset, _COSINE_IMAGES)
                self.paired = None if dataset is None or len(dataset) < _LEAST_IMAGES else self._load(dataset)
        if args.eval_metric == 'cosine' and self.paired is None:
            raise UsageError(
                '--eval-metric cosine is measured without labels, on held-out or training images of a folder, a tar '
                f'file or a hfds/ dataset, {_LEAST_IMAGES} at least: choose another metric')

    def _load(self, dataset: Any) -> Any:
        return create_eval_loader(
            self.args, self.data_config, dataset, self.compute.device, self.args.validation_batch_size,
            self.compute.model_dtype, self.args.distributed, persistent=False)

    def is_due(self, epoch: int) -> bool:
        """Whether labelled images are probed after an epoch, counted from 0."""
        interval = self.args.probe_interval
        return bool(interval) and (epoch + 1) % interval == 0

    def measure(self, epoch: int, last: bool = False) -> Dict[str, float]:
        """Return 'knn' and 'linear_probe' (top-1, percent) of the student and, with 'teacher_', of the teacher; without
        labels 'cosine'. Of several teachers each has its own, as 'teacher_knn@NAME' and 'cosine@NAME', and 'cosine' is
        their mean.

        Args:
            epoch: Which has ended, counted from 0.
            last: Whether it is the last one, after which labelled images are always probed.
        """
        metrics: Dict[str, float] = {}
        with unchanged_randomness():
            student = self._student()
            if self.labelled and (self.is_due(epoch) or last or self.args.eval_metric in PROBE_METRICS):
                metrics.update(self._probe(student))
                teacher = self.measure_teacher()
                metrics.update({f'teacher_{name}': value for name, value in teacher.items()})
            if self.paired is not None:
                metrics.update(self._measure_cosines(student))
        return metrics

    def measure_teacher(self) -> Dict[str, float]:
        """Return the teachers' metrics, measured once; none without a teacher or labelled images."""
        if self._teacher_metrics is None and self.labelled and live_teachers(self.task.teacher):
            with unchanged_randomness():
                self._teacher_metrics = {
                    join_scope(metric, name): value for name, teacher in live_teachers(self.task.teacher).items()
                    for metric, value in self._probe(partial(_read_teacher, teacher)).items()}
        return self._teacher_metrics or {}

    def _student(self) -> Extract:
        """Return the pooled features of the merged student, of its average where there is one, as in validation."""
        ema = self.task.has_ema() and not self.args.model_ema_force_cpu
        model = self.task.get_eval_model(ema=ema)
        assert model is not None  # for mypy: the EMA is there
        model = unwrap_model(model)
        if ema not in self._pooled or self._pooled[ema].model is not model:
            self._pooled[ema] = PooledFeatures(model, self.data_config['input_size'])
        return self._pooled[ema].eval()

    def _probe(self, extract: Extract) -> Dict[str, float]:
        sets = [collect_features(extract, loader, self.compute) for loader in self.labelled]
        return on_first_rank(lambda: probe_features(sets, self.compute.device), self.compute.distributed)

    def _measure_cosines(self, student: Extract) -> Dict[str, float]:
        assert self.paired is not None
        features, _ = collect_features(student, self.paired, self.compute)
        for name, teacher in live_teachers(self.task.teacher).items():
            if name not in self._teacher_features:
                self._teacher_features[name], _ = collect_features(
                    partial(_read_teacher, teacher), self.paired, self.compute)
        pairs = self._teacher_features.items()
        cosines = on_first_rank(
            lambda: {join_scope('cosine', name): mean_cosine(features, own) for name, own in pairs},
            self.compute.distributed)
        return cosines if 'cosine' in cosines else {'cosine': sum(cosines.values()) / len(cosines), **cosines}


def _read_teacher(teacher: Teacher, images: torch.Tensor) -> torch.Tensor:
    return as_vectors(teacher(images, frozenset({'pre_logits'})).pre_logits)


@torch.no_grad()
def collect_features(extract: Extract, loader: Any, compute: ComputeSpec) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return features, float32 [N, D], and targets, [N], of a loader's images in their order, over all ranks.

    Args:
        extract: Gives the features of a batch, [B, D].
        loader: Yields (input, target).
        compute: Where and how.
    """
    features, targets = [], []
    for images, target in loader:
        images, target = compute.prepare_batch(images, target)
        with compute.amp_autocast():
            features.append(extract(images).float().cpu())
        targets.append(target.cpu())
    count = len(loader.dataset) if hasattr(loader.dataset, '__len__') else None
    return tuple(  # type: ignore[return-value]
        gather_in_order(torch.cat(parts), compute.device, count) for parts in (features, targets))


def probe_features(
        sets: Sequence[Tuple[torch.Tensor, torch.Tensor]],
        device: torch.device,
        names: Sequence[str] = PROBE_METRICS,
) -> Dict[str, float]:
    """Return the top-1 accuracies, in percent, of probes.

    Args:
        sets: Features and labels to fit and to test, or of one set that is halved.
        device: Where to compute.
        names: Which probes.
    """
    measures = {'knn': knn_accuracy, 'linear_probe': linear_probe_accuracy}
    data = fit_and_test(sets)
    return {name: measures[name](*data, device=device) for name in names}


def fit_and_test(sets: Sequence[Tuple[torch.Tensor, torch.Tensor]]) -> FitAndTest:
    """Return features and labels to fit, and those to test."""
    if len(sets) == 2:
        return (*sets[0], *sets[1])
    ((features, labels),) = sets
    fit, test = split_halves(labels)
    return features[fit], labels[fit], features[test], labels[test]


def on_first_rank(function: Callable[[], Dict[str, float]], distributed: bool) -> Dict[str, float]:
    """Return what a function gives on the first rank, on all ranks."""
    results: List[Any] = [function() if not distributed or dist.get_rank() == 0 else None]
    if distributed:
        dist.broadcast_object_list(results)
    return results[0]


