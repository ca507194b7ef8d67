"""Gradient norms of single loss terms on the student, measured without any influence on training."""
import logging
import math
from collections import OrderedDict
from contextlib import contextmanager
from typing import AbstractSet, Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn

from ..utils._compat import foreach_add_, foreach_div_, get_grad_scaler

_logger = logging.getLogger(__name__)


class GradientNorms:
    """Norm of each term's gradient in some of an epoch's optimizer updates.

    A term's gradient is the part that it adds to the update: times its current weight, summed over the batches that
    share the update, averaged over the ranks, without the loss scaler's factor.

    Args:
        task: Gives each term times its weight (`weighted_terms`) and the model that is differentiated (`student`).
        interval: Updates between measurements, from the first of the epoch on; 0 measures nothing and costs nothing.
        loss_scaler: Scales the terms as it does the loss, so that low precision does not lose them.
        distributed: Average the gradients over the default process group.
    """

    def __init__(self, task: Any, interval: int, loss_scaler: Optional[Any] = None, distributed: bool = False):
        self.task = task
        self.interval = interval
        self.loss_scaler = loss_scaler
        self.distributed = distributed
        self.norms: OrderedDict[str, List[torch.Tensor]] = OrderedDict()
        self._sums: Dict[str, List[torch.Tensor]] = {}

    def add(self, result: Dict[str, torch.Tensor], group_size: int, update_idx: int) -> None:
        """Differentiate the terms of a batch, if its update is one to be measured; to be called before backward.

        Args:
            result: What the task returned for the batch.
            group_size: Batches that share the update.
            update_idx: Index of the update in its epoch.
        """
        if not self.interval or update_idx % self.interval:
            return
        student = self.task.student
        parameters = [p for p in student.parameters() if p.requires_grad]
        scale = _scale_of(self.loss_scaler)
        with unchanged_buffers(student):
            for name, term in self.task.weighted_terms(result).items():
                gradients = _gradients(term * (scale / group_size), parameters)
                foreach_div_(gradients, scale)
                if name in self._sums:
                    foreach_add_(self._sums[name], gradients)
                else:
                    self._sums[name] = gradients

    def finish_update(self) -> None:
        """Note the norms of an update whose batches have all been added."""
        for name, gradients in self._sums.items():
            if self.distributed:
                average_over_ranks(gradients)
            norm = torch.stack([_norm(g) for g in gradients]).norm()
            self.norms.setdefault(f'grad_norm_{name}', []).append(norm)
        self._sums = {}

    def newest(self) -> 'OrderedDict[str, float]':
        """Return the norms of the newest measurement."""
        return OrderedDict((name, norms[-1].item()) for name, norms in self.norms.items())

    def average(self) -> 'OrderedDict[str, float]':
        """Return the mean over the epoch's measurements; those that overflowed in low precision are left out."""
        return OrderedDict((name, _finite_mean([norm.item() for norm in norms])) for name, norms in self.norms.items())

    def state_dict(self) -> Dict[str, List[float]]:
        """Return the epoch's measurements so far."""
        return {name: [norm.item() for norm in norms] for name, norms in self.norms.items()}

    def load_state_dict(self, state: Dict[str, List[float]]) -> None:
        """Continue behind the measurements of a stopped process."""
        self.norms = OrderedDict((name, [torch.tensor(norm) for norm in norms]) for name, norms in state.items())


class GradientShares:
    """Logs the weight of each term and its share in the gradient on the student, at a few updates.

    The gradient is that of the first batch of the update on this rank. Norms stay on the device until they are logged.

    Args:
        task: As for `GradientNorms`; also names the terms' weights (`term_weights`). Any other task has no shares.
        updates: Indices of the updates to measure.
        loss_scaler: As for `GradientNorms`.
    """

    def __init__(self, task: Any, updates: AbstractSet[int], loss_scaler: Optional[Any] = None):
        self.task = task
        self.updates = set(updates) if hasattr(task, 'term_weights') else set()
        self.loss_scaler = loss_scaler
        self._measured: List[Tuple[int, Dict[str, float], Dict[str, torch.Tensor]]] = []

    def add(self, result: Dict[str, torch.Tensor], update_idx: int) -> None:
        """Differentiate the terms of a batch, if its update is one to be measured; to be called before backward."""
        if update_idx not in self.updates:
            return
        self.updates.remove(update_idx)
        terms = self.task.weighted_terms(result)
        if len(terms) < 2:
            return
        parameters = [p for p in self.task.student.parameters() if p.requires_grad]
        scale = _scale_of(self.loss_scaler)
        try:
            with unchanged_buffers(self.task.student):
                norms = {name: _gradient_norm(term * scale, parameters) for name, term in terms.items()}
        except RuntimeError as e:  # a compiled graph that cannot be kept, no memory: no reason to stop training
            _logger.info(
                f'Weights of the terms: {_describe(self.task.term_weights())}. Their gradients cannot be '
                f'measured: {str(e).splitlines()[0]}')
            self.updates.clear()
            return
        self._measured.append((update_idx, self.task.term_weights(), norms))

    def log(self) -> None:
        """Write what was measured; waits for the device where there is something."""
        for update_idx, weights, norms in self._measured:
            values = {name: norm.item() for name, norm in norms.items()}
            total = sum(values.values())
            shares = {name: 100 * value / total if total else 0. for name, value in values.items()}
            _logger.info(f'Gradient on the student at update {update_idx}: {_describe(weights, shares)}.')
        self._measured = []


def _describe(weights: Dict[str, float], shares: Optional[Dict[str, float]] = None) -> str:
    percent = {name: '' if shares is None else f' {_two_digits(shares[name])} %' for name in weights}
    return ', '.join(f'{name}{percent[name]} (weight {weight:g})' for name, weight in weights.items())


def _two_digits(percent: float) -> str:
    return f'{percent:.0f}' if percent >= 10 else f'{percent:.2g}'  # 100, which is 1e+02 in two digits


def _gradient_norm(term: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the norm of a term's gradient as a scalar on the device; the graph stays for the backward pass."""
    if not term.requires_grad:
        return torch.zeros_like(term)
    gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return torch.stack([_norm(g) for g in gradients if g is not None] or [torch.zeros_like(term)]).norm()


def _scale_of(loss_scaler: Optional[Any]) -> float:
    scaler = get_grad_scaler(loss_scaler)
    return 1. if scaler is None else float(scaler.get_scale())


def reached_tensors(result: torch.Tensor) -> Set[int]:
    """Return the ids of the leaf tensors that a backward pass from `result` gives a gradient."""
    nodes, seen, leaves = [result.grad_fn], set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, 'variable'):
            leaves.add(id(node.variable))
        nodes += [parent for parent, _ in node.next_functions]
    return leaves


def _gradients(term: torch.Tensor, parameters: Sequence[torch.Tensor]) -> List[torch.Tensor]:
    """Return the gradient of a term, zero for what it does not depend on; the graph stays for the backward pass."""
    if not term.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g.clone() for g, p in zip(gradients, parameters)]


def _norm(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Put a module's buffers back: gradient checkpointing runs parts again, whose batch norms would count twice."""
    buffers = list(module.buffers())
    before = [buffer.clone() for buffer in buffers]
    yield
    with torch.no_grad():
        for buffer, value in zip(buffers, before):
            # writing to a statistic that the backward pass is to read would end it, also one that is nan as it was
            if ((buffer != value) & ~(buffer.isnan() & value.isnan())).any():
                buffer.copy_(value)


def average_over_ranks(gradients: List[torch.Tensor]) -> None:
    for gradient in gradients:
        dist.all_reduce(gradient)
    foreach_div_(gradients, dist.get_world_size())


def _finite_mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
