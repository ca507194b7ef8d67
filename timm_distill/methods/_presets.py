"""Published combinations of methods under one name, with the papers' weights.

A preset's name is matched before '+' splits a `--kd` value; an alias needs no quoting in a shell.
"""
from dataclasses import dataclass, field
from typing import Any, Mapping, Optional, Tuple

from ._base import METHODS
from ._schedules import Steps, WeightSchedule


@dataclass(frozen=True)
class Preset:
    """Methods with weights and options.

    Attributes:
        name: Name that the user writes.
        description: One line on what it is.
        paper: Authors, venue and link.
        weights: Weight of each method's terms, by method name; its keys are the methods.
        options: Options by method name, where they differ from the defaults.
        schedules: Factor on a method's terms over epochs, by method name.
        task_loss_weight: Weight of the task loss, None for the default.
        aliases: Other names.
    """
    name: str
    description: str
    paper: str
    weights: Mapping[str, float]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    aliases: Tuple[str, ...] = ()
    schedules: Mapping[str, Steps] = field(default_factory=dict)
    task_loss_weight: Optional[float] = None

    def __str__(self) -> str:
        weights = dict(self.weights)
        if self.task_loss_weight is not None:
            weights['task loss'] = self.task_loss_weight
        return ', '.join(f'{name} (weight {weight:g})' for name, weight in weights.items())

    def describe(self) -> str:
        """Return a text of what the preset stands for."""
        options = [f'{name}.{key}={value}' for name, given in self.options.items() for key, value in given.items()]
        schedules = [f'{name}={WeightSchedule(steps)}' for name, steps in self.schedules.items()]
        return '\n'.join([
            f'{" or ".join((self.name, *self.aliases))}: {self.description}',
            f'    methods   {self}',
            *([f'    options   {" ".join(options)}'] if options else []),
            *([f'    schedule  {" ".join(schedules)}'] if schedules else []),
            f'    paper     {self.paper}',
        ])


def register_preset(preset: Preset) -> Preset:
    """Make a preset known under its name and aliases.

    Raises:
        ValueError: If a name is taken.
    """
    METHODS.register_preset(preset, preset.name, *preset.aliases)
    return preset


def _warmup_from_zero(epochs: int) -> Steps:
    """Linear warm-up that leaves the first epoch out: min(1, epoch / epochs), as the authors of ND have it."""
    return tuple((epoch, epoch / epochs) for epoch in range(epochs + 1))


_ND_PAPER = 'Wang et al., 2023, https://arxiv.org/abs/2305.17007'

# Weights of the training scripts of github.com/WangYZ1608/Knowledge-Distillation-via-ND, each beside a cross-entropy of
# weight 1. Those of the other pairs are in docs/methods.md.
register_preset(Preset(
    'kd++', 'KD with norm and direction; weights of ResNet-34 to ResNet-18 on ImageNet.', _ND_PAPER,
    weights={'kd': 2.5, 'nd': 1.}, options={'kd': {'temperature': 1.}}, aliases=('kdpp',),
    schedules={'kd': _warmup_from_zero(5)},
))
register_preset(Preset(
    'dkd++', 'DKD with norm and direction; weights of ResNet-34 to ResNet-18 on ImageNet.', _ND_PAPER,
    weights={'dkd': 1., 'nd': 1.}, options={'dkd': {'alpha': 0.8, 'beta': 0.5, 'temperature': 1.}}, aliases=('dkdpp',),
    schedules={'dkd': _warmup_from_zero(5), 'nd': _warmup_from_zero(5)},
))
register_preset(Preset(
    'dist++', 'DIST with norm and direction; weights of ResNet-56 to ResNet-20 on CIFAR-100.', _ND_PAPER,
    weights={'dist': 2., 'nd': 1.}, options={'dist': {'temperature': 4.}}, aliases=('distpp',),
    schedules={'dist': _warmup_from_zero(20)},
))
register_preset(Preset(
    'reviewkd++', 'ReviewKD with norm and direction; weights of ResNet-34 to ResNet-18 on ImageNet.', _ND_PAPER,
    weights={'reviewkd': 1., 'nd': 3.}, aliases=('reviewkdpp',),
    schedules={'reviewkd': _warmup_from_zero(5)},
))
register_preset(Preset(
    'deit++', 'Hard token distillation with norm and direction; weights of RegNetY-16GF to DeiT-B.', _ND_PAPER,
    weights={'token': 0.5, 'nd': 1.5}, options={'token': {'hard': True}}, aliases=('deitpp',),
    schedules={'token': _warmup_from_zero(5)},
))
register_preset(Preset(
    'usi', "Unified Scheme for ImageNet: the teacher's distribution alone, without labels.",
    'Ridnik et al., 2022, https://arxiv.org/abs/2204.03475',
    weights={'kd': 1.}, options={'kd': {'temperature': 1.}}, task_loss_weight=0.,
))
