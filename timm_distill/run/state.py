"""State of a training run: its parts, and the results that it leaves."""
import argparse
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

import torch

from ..args.per_teacher import teachers_of
from ..data import DataLoaders, label_names
from ..engine.evaluate import ComputeSpec
from ..engine.meters import Streak
from ..engine.train_log import StepTiming
from ..export.provenance import collect_provenance
from ..methods._scopes import join_scope
from ..models.external import code_digest
from ..task import DistillTask
from ..teacher.several import ask_each
from ..utils.text import printable
from .device import Precision
from .probing import Probes


@dataclass
class RunResult:
    """Results of a run.

    Attributes:
        output_dir: Folder of the run.
        checkpoint: Path of the best checkpoint; '' where nothing was saved.
        best_metric: Best value of the evaluation metric.
        best_epoch: Epoch of it, counted from 0.
        param_count: Parameters of the student as saved.
        seconds: Duration of the run.
        stopped_by: Signal that ended it early, 0 for none.
        history: Metrics of each validated epoch, the best last.
    """
    output_dir: str = ''
    checkpoint: str = ''
    best_metric: Optional[float] = None
    best_epoch: Optional[int] = None
    param_count: int = 0
    seconds: float = 0.
    stopped_by: int = 0
    history: List[Dict[str, Any]] = field(default_factory=list)


@dataclass
class Run:
    """The parts of a run that the phases build and the epochs use.

    Attributes:
        args: Flags.
        device: Where the run computes.
        precision: How it represents numbers.
        data_config: Input size, normalisation and crop.
        loaders: Training and validation data.
        task: Student, teacher and methods.
        optimizer: Over everything that trains.
        scheduler: Learning rate schedule, None for a constant rate.
        num_epochs: Length of the run.
        probes: Measures frozen features, None where nothing asks for it.
        teacher_predictions: What each teacher predicts on the validation data, and how surely, by name, one without
            others under ''; those that cannot are left out.
        streak: Updates in a row that were not finite, at the end of the newest epoch.
        timing: Where the time of training went.
    """
    args: argparse.Namespace
    device: torch.device
    precision: Precision
    data_config: Dict[str, Any]
    loaders: DataLoaders
    task: DistillTask
    optimizer: torch.optim.Optimizer
    scheduler: Any
    num_epochs: int
    probes: Optional[Probes] = None
    teacher_predictions: Dict[str, Tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    streak: Streak = field(default_factory=Streak)
    timing: StepTiming = field(default_factory=StepTiming)

    @property
    def last_epoch(self) -> int:
        """How many epochs are trained: all of them, unless `--stop-epoch` stops before."""
        return min(self.args.stop_epoch or self.num_epochs, self.num_epochs)

    @property
    def compute(self) -> ComputeSpec:
        """Where and how the loops compute."""
        return ComputeSpec(
            self.device, self.precision.model_dtype, self.precision.autocast, self.args.channels_last,
            not self.args.no_prefetcher, self.args.distributed)

    @property
    def progress(self) -> Optional[bool]:
        """Whether progress is drawn as a bar, by `--log-style`; None leaves it to the terminal."""
        return {'auto': None, 'bar': True, 'lines': False}[self.args.log_style]


def weights_in_force(run: Run) -> Dict[str, float]:
    """Return the weight of every loss term, defaults included; empty for a student that trains alone."""
    return {'task': run.task.task_loss_weight, **run.task.weights} if run.task.weights else {}


def fingerprints(run: Run) -> Dict[str, Any]:
    """Return what the run's results depend on beside flags and weights, to be compared when it is resumed."""
    teacher = run.task.teacher
    codes = {join_scope('teacher', name): code_digest(model) for name, model in teachers_of(run.args.teacher).items()}
    return {
        'datasets': run.loaders.fingerprints,
        'teacher_input': ask_each(teacher, lambda one: one.preprocessing.values()),
        'model_code': {'student': code_digest(run.args.model), **(codes or {'teacher': ''})},
        'teacher_classes': ask_each(teacher, lambda one: one.class_sources),
        'cached_targets': None if run.task.targets is None else run.task.targets.describe(),
    }


def describe_run(run: Run, version: str) -> Dict[str, Any]:
    """Return what exporting a checkpoint needs to know: plain values."""
    train = run.loaders.train.dataset
    teacher_hash = ask_each(run.task.teacher, lambda one: one.digest) or ''
    weights = weights_in_force(run) or None
    num_samples = len(train) if hasattr(train, '__len__') else None
    return {
        'data_config': dict(run.data_config),
        'label_names': label_names(train, run.args.num_classes),
        'provenance': printable(collect_provenance(run.args, version, teacher_hash, num_samples, weights)),
        **fingerprints(run),
    }
