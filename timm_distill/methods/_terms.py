"""Weights of a task's loss terms: the user's, times a schedule over epochs, times whether a teacher is dropped."""
from typing import Any, Callable, Dict, FrozenSet, List, Mapping, Optional, Tuple

import torch

from ._scopes import scope_term, split_scope, unscope_term

_MANY_EPOCHS = 10000

Terms = Mapping[str, Mapping[str, torch.Tensor]]  # unweighted terms of each unit


class TermWeights:
    """Weights of the terms of each unit: a method, METHOD@TEACHER where there are several teachers.

    Args:
        methods: Methods by name. One that several teachers share stands for a unit of each.
        weights: Weight of each unit's terms.
        schedules: Factor on each unit's terms by epoch; its method's own schedule by default.
        task_loss_weight: Weight of the task loss.
    """

    def __init__(
            self,
            methods: Any,
            weights: Mapping[str, float],
            schedules: Optional[Mapping[str, Callable[[int], float]]],
            task_loss_weight: float,
    ):
        self.methods = methods
        self.weights = dict(weights)
        self.schedules = {unit: self.method_of(unit).weight for unit in self.weights} | dict(schedules or {})
        self.task_loss_weight = task_loss_weight
        self.kept: Dict[str, torch.Tensor] = {}  # of the newest batch: whether a teacher's terms count, by teacher
        self._factors: Dict[str, float] = {}  # of the schedules in the current epoch, by unit
        self._units: Dict[str, str] = {}  # which unit a term of the newest result is of

    def method_of(self, unit: str) -> Any:
        """Return the method of a unit."""
        return self.methods[unit if unit in self.methods else split_scope(unit)[0]]

    def set_epoch(self, epoch: int) -> None:
        """Apply the schedules for an epoch, counted from 0."""
        self._factors = {unit: self.schedules[unit](epoch) for unit in self.weights}

    def unweighted(self) -> FrozenSet[str]:
        """Return the units without a term that has a weight in the current epoch."""
        return frozenset(
            unit for unit, weight in self.weights.items()
            if not weight or not (self._factors[unit] or self._unscheduled_terms(unit)))

    def _unscheduled_terms(self, unit: str) -> FrozenSet[str]:
        teacher = split_scope(unit)[1]
        return frozenset(scope_term(term, teacher) for term in self.method_of(unit).unscheduled_terms())

    def _weight_of(self, term: str, unit: str) -> float:
        """Return the current weight of a unit's term."""
        return self.weights[unit] * (1. if term in self._unscheduled_terms(unit) else self._factors[unit])

    def weigh(self, terms: Terms) -> List[Tuple[float, Any]]:
        """Return the sums of each unit's terms that have one weight, with it, and note which unit a term is of."""
        self._units = {name: unit for unit, named in terms.items() for name in named}
        return [part for unit, named in terms.items() for part in self._weigh(unit, named)]

    def _weigh(self, unit: str, terms: Mapping[str, torch.Tensor]) -> List[Tuple[float, Any]]:
        weights = {term: self._weight_of(term, unit) for term in terms}
        return [
            (weight, self._keep(unit, sum(value for term, value in terms.items() if weights[term] == weight)))
            for weight in dict.fromkeys(weights.values())]

    def _keep(self, unit: str, value: Any) -> Any:
        """Return a value, or zero where the unit's teacher is dropped; a choice of the device, which nobody awaits."""
        kept = self.kept.get(split_scope(unit)[1])
        return value if kept is None else torch.where(kept, value, torch.zeros_like(value))

    def by_teacher(self, terms: Terms) -> Dict[str, torch.Tensor]:
        """Return the weighted sum of each teacher's terms, without those that have no weight, detached."""
        self.kept = {}
        sums: Dict[str, Any] = {}
        for unit, named in terms.items():
            for weight, value in self._weigh(unit, named):
                if weight:
                    teacher = split_scope(unit)[1]
                    sums[teacher] = sums.get(teacher, 0.) + weight * value.detach()
        return sums

    def weighted_terms(self, result: Mapping[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        """Return the terms of the newest result, each times its current weight, by name without '_loss'."""
        terms = {}
        if 'task_loss' in result:
            task_loss = result['task_loss']
            terms['task'] = self.task_loss_weight * task_loss if self.task_loss_weight else torch.zeros_like(task_loss)
        for name, unit in self._units.items():
            weight = self._weight_of(name, unit)
            value = self._keep(unit, weight * result[name]) if weight else torch.zeros_like(result[name])
            terms[name[:-len('_loss')]] = value
        return terms

    def term_weights(self) -> Dict[str, float]:
        """Return the current weight of each term of the newest result, schedules included, without the task loss."""
        return {name[:-len('_loss')]: self._weight_of(name, unit) for name, unit in self._units.items()}

    def changes_terms(self, epoch: int) -> bool:
        """Whether other terms have a weight in an epoch than in the one before; true for the first."""
        def _without(epoch: int) -> FrozenSet[str]:
            return frozenset(unit for unit, schedule in self.schedules.items() if not schedule(epoch))
        return epoch == 0 or _without(epoch) != _without(epoch - 1)

    @property
    def is_scheduled(self) -> bool:
        """Whether the weight of a unit changes over epochs."""
        return any(len({schedule(epoch) for epoch in range(_MANY_EPOCHS)}) > 1 for schedule in self.schedules.values())

    @property
    def trains_classifier(self) -> bool:
        """Whether the task loss, or a method that reads the student's logits, has a weight."""
        readers = [unit for unit in self.weights if 'logits' in self.method_of(unit).student_outputs]
        return not self.methods or bool(self.task_loss_weight) or any(self.weights[unit] for unit in readers)

    def unscheduled_loss(self, averages: Mapping[str, float]) -> float:
        """Return the weighted sum of averages of terms without the schedules."""
        weights = {name: self._unscheduled_weight(name) for name in averages if name.endswith('_loss')}
        return sum(weight * averages[name] for name, weight in weights.items() if weight)

    def _unscheduled_weight(self, name: str) -> float:
        """Return the weight of a term by its name, which begins with its method's: no batch has to be seen."""
        if name == 'task_loss':
            return self.task_loss_weight
        term, teacher = unscope_term(name)
        owners = {
            unit: len(unit) for unit in self.weights
            if split_scope(unit)[1] == teacher and term.startswith(f'{split_scope(unit)[0]}_')}
        return self.weights[max(owners, key=owners.__getitem__)] if owners else 0.
