"""Distillation-oriented trainer: SGD with separate momenta for the gradients of label loss and distillation.

DOT: A Distillation-Oriented Trainer (Zhao et al., ICCV 2023), https://arxiv.org/abs/2307.08436.

Both losses fall less together than each alone, since gradients of one disturb the other's. A larger momentum for the
distillation's lets it lead: momentum + delta for its gradient, momentum - delta for the label loss's. Published are
delta 0.075 on CIFAR-100 and 0.09 on ImageNet, at momentum 0.9. With delta 0 it is SGD.
"""
from contextlib import nullcontext
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.utils import dispatch_clip_grad
from torch.nn.parallel import DistributedDataParallel

from ..errors import UsageError
from ..utils._compat import foreach_add_, foreach_mul_, get_grad_scaler
from .grad_norms import average_over_ranks, reached_tensors, unchanged_buffers
from .nonfinite import UpdateGuard

SGD_FAMILY = ('sgd', 'momentum', 'nesterov')  # of timm's names
_WITHOUT_EFFECT = ('foreach', 'fused', 'differentiable')  # how torch runs its own step


class DistillationOrientedSGD(torch.optim.Optimizer):
    """SGD with a momentum buffer for each of two gradients.

    The label loss's gradient is `p.grad`, that of the distillation is given to `add_distill_gradients`. As in the
    official code:

    - A parameter with one of the two gradients alone has the plain momentum.
    - Weight decay goes with the label loss's gradient; where a parameter has none, with the other one, except for its
      first step.
    - A buffer begins as the gradient itself, without dampening.
    - All parameters move by the label loss first, then by the distillation.

    Args:
        params: Parameters or groups, with the options of `torch.optim.SGD` and 'delta'.
        lr: Learning rate.
        momentum: Mean of both momenta.
        delta: How far each is from it.
        weight_decay: L2 penalty.
        dampening: Part of a gradient that does not enter its buffer.
        nesterov: Look one step of each buffer ahead.

    Raises:
        UsageError: If one of the momenta is not from 0 to below 1.
    """

    def __init__(
            self,
            params: Iterable[Any],
            lr: float = 1e-3,
            momentum: float = 0.9,
            delta: float = 0.075,
            weight_decay: float = 0.,
            dampening: float = 0.,
            nesterov: bool = False,
    ):
        defaults = dict(
            lr=lr, momentum=momentum, delta=delta, weight_decay=weight_decay, dampening=dampening, nesterov=nesterov)
        super().__init__(params, defaults)
        for group in self.param_groups:
            check_momenta(group['momentum'], group['delta'])
        self._distill: Dict[torch.Tensor, torch.Tensor] = {}

    @property
    def parameters(self) -> List[torch.Tensor]:
        """All parameters that train, of all groups."""
        return [p for group in self.param_groups for p in group['params'] if p.requires_grad]

    @torch.no_grad()
    def add_distill_gradients(self, gradients: Sequence[Optional[torch.Tensor]]) -> None:
        """Add gradients of the distillation to those since `zero_grad`, one for each of `parameters`; None for none."""
        found = [(p, gradient) for p, gradient in zip(self.parameters, gradients, strict=True) if gradient is not None]
        old = [(p, gradient) for p, gradient in found if p in self._distill]
        if old:
            foreach_add_([self._distill[p] for p, _ in old], [gradient for _, gradient in old])
        # a gradient may be the loss's own tensor for several parameters
        self._distill.update({p: gradient.clone() for p, gradient in found if p not in self._distill})

    def distill_gradients(self) -> List[torch.Tensor]:
        """Return the gradients of the distillation."""
        return list(self._distill.values())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget both gradients: a gradient of zero is not that of a loss that does not reach a parameter."""
        super().zero_grad(set_to_none=True)
        self._distill = {}

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], float]] = None) -> Optional[float]:  # type: ignore[override]
        """Move all parameters by both gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_task([p for p in group['params'] if p.grad is not None], group)
        for group in self.param_groups:
            self._step_distill([p for p in group['params'] if p in self._distill], group)
        return loss

    def _step_task(self, params: List[torch.Tensor], group: Dict[str, Any]) -> None:
        for shared in (True, False):
            own = [p for p in params if (p in self._distill) == shared]
            gradients = [p.grad.clone() for p in own if p.grad is not None]
            _decay(gradients, own, group['weight_decay'])
            momentum = max(0., group['momentum'] - group['delta']) if shared else group['momentum']
            self._move(own, gradients, momentum, 'momentum_buffer', group)

    def _step_distill(self, params: List[torch.Tensor], group: Dict[str, Any]) -> None:
        for shared in (True, False):
            own = [p for p in params if (p.grad is not None) == shared]
            gradients = [self._distill[p].clone() for p in own]
            if not shared:
                later = [i for i, p in enumerate(own) if 'momentum_buffer_kd' in self.state[p]]
                _decay([gradients[i] for i in later], [own[i] for i in later], group['weight_decay'])
            momentum = group['momentum'] + group['delta'] if shared else group['momentum']
            self._move(own, gradients, momentum, 'momentum_buffer_kd', group, keeps_buffer=True)

    def _move(
            self,
            params: List[torch.Tensor],
            gradients: List[torch.Tensor],
            momentum: float,
            name: str,
            group: Dict[str, Any],
            keeps_buffer: bool = False,
    ) -> None:
        """Bring buffers up to date and move parameters; the gradients are changed."""
        if not params:
            return
        steps = gradients
        if momentum or keeps_buffer:
            buffers = self._update_buffers(params, gradients, momentum, name, group['dampening'])
            if group['nesterov']:
                foreach_add_(steps, buffers, alpha=momentum)
            else:
                steps = buffers
        foreach_add_(params, steps, alpha=-_number(group['lr']))

    def _update_buffers(
            self,
            params: List[torch.Tensor],
            gradients: List[torch.Tensor],
            momentum: float,
            name: str,
            dampening: float,
    ) -> List[torch.Tensor]:
        old = [i for i, p in enumerate(params) if self.state[p].get(name) is not None]
        if old:
            buffers = [self.state[params[i]][name] for i in old]
            foreach_mul_(buffers, momentum)
            foreach_add_(buffers, [gradients[i] for i in old], alpha=1 - dampening)
        for p, gradient in zip(params, gradients):
            if self.state[p].get(name) is None:
                self.state[p][name] = gradient.clone()
        return [self.state[p][name] for p in params]


def _number(value: Any) -> float:
    return value.item() if isinstance(value, torch.Tensor) else value


def _decay(gradients: List[torch.Tensor], params: List[torch.Tensor], weight_decay: float) -> None:
    if weight_decay and gradients:
        foreach_add_(gradients, params, alpha=weight_decay)


def check_momenta(momentum: float, delta: float) -> None:
    """Reject a delta with which a momentum is none.

    Raises:
        UsageError: Says which values go.
    """
    if not (momentum - delta > -1e-9 and momentum + delta < 1):
        raise UsageError(
            f'--dot-delta {delta:g} at --momentum {momentum:g}: momentum - delta and momentum + delta must both be '
            'from 0 to below 1; e.g. 0.075 at 0.9')


def create_dot(optimizer: torch.optim.Optimizer, delta: float) -> DistillationOrientedSGD:
    """Return the optimizer with separate momenta in the place of torch's SGD, its groups and their options.

    Raises:
        UsageError: If the optimizer is another one, or maximises.
    """
    groups = optimizer.param_groups
    if type(optimizer) is not torch.optim.SGD or any(group['maximize'] for group in groups):
        raise UsageError(
            f'--kd-optimizer dot is a rule for SGD that minimises, not for {type(optimizer).__name__} as --opt and '
            f'--opt-kwargs build it: give --opt {", ".join(SGD_FAMILY[:-1])} or {SGD_FAMILY[-1]}, without maximize')
    left_out = {'maximize', *_WITHOUT_EFFECT}
    return DistillationOrientedSGD(
        [{key: value for key, value in group.items() if key not in left_out} for group in groups], delta=delta)


def split_loss(task: Any, result: Dict[str, torch.Tensor]) -> Tuple[torch.Tensor, torch.Tensor, List[nn.Parameter]]:
    """Return the weighted label loss, the sum of all other terms, and what the label loss does not reach under DDP.

    DDP waits for the gradients of all parameters: there the label loss has those of zero for these, to be taken away.

    Args:
        task: Gives each term times its weight (`weighted_terms`).
        result: What it returned for a batch.
    """
    terms = task.weighted_terms(result)
    task_loss = terms.pop('task')
    distill_loss = sum(terms.values(), torch.zeros_like(task_loss))
    if not isinstance(task.trainable_module, DistributedDataParallel):
        return task_loss, distill_loss, []
    reached = reached_tensors(task_loss)
    unreached = [p for p in task.trainable_module.parameters() if p.requires_grad and id(p) not in reached]
    return task_loss + sum(0. * p.sum() for p in unreached), distill_loss, unreached


def backward_apart(
        losses: Tuple[torch.Tensor, torch.Tensor, List[nn.Parameter]],
        module: nn.Module,
        optimizer: DistillationOrientedSGD,
        share: Callable[[torch.Tensor], torch.Tensor],
        loss_scaler: Optional[Any] = None,
) -> None:
    """Add both losses' gradients, from one graph in two backward passes.

    Args:
        losses: What `split_loss` returned. Gradients of the label loss go to the parameters and through DDP.
        module: What trains.
        optimizer: Gets the gradients of the distillation.
        share: The part of a loss that a batch has in its update.
        loss_scaler: timm's scaler, which both losses are multiplied by.
    """
    task_loss, distill_loss, unreached = losses
    scaler = get_grad_scaler(loss_scaler)
    if distill_loss.requires_grad:
        loss = share(distill_loss)
        # runs parts again, whose batch norms would count twice
        checkpointing = any(getattr(m, 'grad_checkpointing', False) for m in module.modules())
        with unchanged_buffers(module) if checkpointing else nullcontext():
            optimizer.add_distill_gradients(torch.autograd.grad(
                loss if scaler is None else scaler.scale(loss), optimizer.parameters,
                retain_graph=task_loss.requires_grad, allow_unused=True))
    if task_loss.requires_grad:
        loss = share(task_loss)
        (loss if scaler is None else scaler.scale(loss)).backward()
    for parameter in unreached:
        parameter.grad = None


def step_apart(
        guard: UpdateGuard,
        optimizer: DistillationOrientedSGD,
        clip: Callable[[], None],
        loss_scaler: Optional[Any] = None,
        distributed: bool = False,
) -> None:
    """Average the distillation's gradients, clip, and run the optimizer's step where both gradients are finite.

    Args:
        guard: Of the update.
        optimizer: With both gradients.
        clip: Clips them.
        loss_scaler: timm's scaler; its scale follows both gradients.
        distributed: Average over the ranks, as DDP has done with the label loss's gradients.
    """
    if distributed and optimizer.distill_gradients():
        average_over_ranks(optimizer.distill_gradients())
    scaler = get_grad_scaler(loss_scaler)
    if scaler is None:
        guard.check(guard.gradients())
        clip()
        guard.step()
        return
    both = _Both(optimizer)
    scaler.unscale_(both)  # type: ignore[arg-type]
    clip()
    scaler.step(both)  # type: ignore[arg-type]
    scaler.update()
    guard.restore_buffers()


class _Both:
    """Stand-in for the optimizer that torch's GradScaler sees: its parameters, and views with the other gradients."""

    def __init__(self, optimizer: DistillationOrientedSGD):
        self.optimizer = optimizer
        self.param_groups = [{'params': [*optimizer.parameters, *_views(optimizer)]}]

    def step(self) -> None:
        self.optimizer.step()


def _views(optimizer: DistillationOrientedSGD) -> List[torch.Tensor]:
    """Return the parameters as tensors of their own whose gradients are those of the distillation."""
    views = []
    for parameter, gradient in optimizer._distill.items():
        view = parameter.detach()
        view.grad = gradient
        views.append(view)
    return views


@torch.no_grad()
def clip_together(
        parameters: Sequence[torch.Tensor],
        optimizer: DistillationOrientedSGD,
        value: float,
        mode: str,
) -> None:
    """Clip the sum of both gradients as timm does, and shorten both as the sum is shortened.

    Args:
        parameters: What is clipped.
        optimizer: Holds the gradients of the distillation.
        value: Clipping value.
        mode: One of timm's clipping modes ('norm', 'value', 'agc').
    """
    distill = optimizer._distill
    clipped = [p for p in parameters if p.grad is not None or p in distill]
    sums = []
    for parameter in clipped:
        view = parameter.detach()
        parts = [gradient for gradient in (parameter.grad, distill.get(parameter)) if gradient is not None]
        view.grad = parts[0] + parts[1] if len(parts) > 1 else parts[0].clone()
        sums.append(view)
    before = [_gradient(view).clone() for view in sums]
    dispatch_clip_grad(sums, value=value, mode=mode)
    factors = _factors(before, [_gradient(view) for view in sums], mode)
    for parameter, factor in zip(clipped, factors):
        for gradient in (parameter.grad, distill.get(parameter)):
            if gradient is not None:
                gradient.mul_(factor)


def _gradient(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _factors(before: List[torch.Tensor], after: List[torch.Tensor], mode: str) -> List[torch.Tensor]:
    """Return what clipping has multiplied each gradient by: one number for all with 'norm', else elementwise."""
    if mode == 'norm' and before:
        norms = [nn.utils.get_total_norm(gradients) for gradients in (after, before)]
        return [torch.where(norms[1] > 0, norms[0] / norms[1], 1.)] * len(before)
    return [torch.where(b != 0, a / b, 1.) for a, b in zip(after, before)]


__all__ = [
    'SGD_FAMILY', 'DistillationOrientedSGD', 'backward_apart', 'check_momenta', 'clip_together', 'create_dot',
    'split_loss', 'step_apart',
]
