"""Guard against gradients that are not finite: such an update is skipped, without waiting for the device.

Batches that overflow leave NaN in the gradients, and in running statistics already in the forward pass. The guard
notes the statistics before an update, looks at the gradients on the device and takes both back there. What it saw is
a tensor that the loop reads later together with the losses.
"""
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from ..utils._compat import foreach_add_, foreach_copy_, foreach_mul_, foreach_sub, masks_updates

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _on_cpu(tensors: Sequence[torch.Tensor]) -> bool:
    return all(tensor.device.type == 'cpu' for tensor in tensors)


def all_finite(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return whether all tensors, and their joint norm, are finite, as a scalar on the device."""
    return nn.utils.get_total_norm([tensor.detach() for tensor in tensors]).isfinite()


@torch.no_grad()
def keep_where(tensors: Sequence[torch.Tensor], keep: torch.Tensor) -> None:
    """Zero tensors where the scalar `keep` is false, also those that hold NaN; else leave every bit.

    NaN times zero is NaN, so the product is taken of the bits as integers.
    """
    for dtype, group in _by_dtype(tensors).items():
        bits = [tensor.view(dtype) for tensor in group]
        foreach_mul_(bits, keep.to(device=group[0].device, dtype=dtype))


def _by_dtype(tensors: Sequence[torch.Tensor]) -> Dict[torch.dtype, List[torch.Tensor]]:
    groups: Dict[torch.dtype, List[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(_INTEGERS[tensor.element_size()], []).append(tensor)
    return groups


class UpdateGuard:
    """Skips updates whose gradients are not finite.

    Where the gradients lie on the CPU, or the optimizer takes `found_inf` (torch's fused ones), nothing at all
    changes. Other optimizers on CUDA run with gradients of zero instead, since only the host could leave the call
    out, and it would have to wait: momentum and weight decay go on for that update.

    Args:
        module: What trains; its persistent buffers (running statistics) are restored.
        optimizer: Runs the updates.
        eager: Let the host look at each update; by default where that costs nothing, on the CPU.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, eager: Optional[bool] = None):
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group['params']]
        self.buffers = [buffer for buffer in module.buffers() if buffer.numel()]
        self.eager = _on_cpu(self.parameters) if eager is None else eager
        self.masks_itself = masks_updates(optimizer) and not self.eager
        self.watching = False  # look at each update for a while, although it costs a wait
        self.bad_batch: Optional[Tuple[torch.Tensor, torch.Tensor]] = None  # first of a streak that was looked at
        self._is_finite: Optional[torch.Tensor] = None
        self._saved: List[torch.Tensor] = [buffer.clone() for buffer in self.buffers]

    @torch.no_grad()
    def note(self) -> None:
        """Note the buffers before the first batch of an update."""
        self._is_finite = None
        if self.buffers:
            foreach_copy_(self._saved, self.buffers)

    @torch.no_grad()
    def check(self, tensors: Sequence[torch.Tensor]) -> None:
        """Look at tensors on which the update depends, on the device: its gradients, or the losses of its batches."""
        finite = all_finite(tensors)
        self._is_finite = finite if self._is_finite is None else self._is_finite & finite

    @property
    def finite(self) -> torch.Tensor:
        """Whether all that was checked since `note` was finite, a scalar on the device."""
        assert self._is_finite is not None, 'nothing was checked'
        return self._is_finite

    def step(self) -> None:
        """Run the optimizer's step if the update is finite, else take back what its batches did."""
        if self.eager:
            if self.finite.item():
                self.optimizer.step()
            else:
                self.restore_buffers()
            return
        keep_where(self.gradients(), self.finite)
        self.restore_buffers()
        if self.masks_itself:
            optimizer: Any = self.optimizer
            optimizer.found_inf = 1. - self.finite.float()
            optimizer.grad_scale = None
        self.optimizer.step()

    def was_applied(self, batch: Tuple[torch.Tensor, torch.Tensor]) -> bool:
        """Return whether the update was applied, true where nobody looks; keeps the batch of one that was not."""
        if not self.eager and not self.watching:
            return True
        if self.finite.item():
            self.bad_batch = None
            return True
        if self.bad_batch is None:
            self.bad_batch = batch
        return False

    def gradients(self) -> List[torch.Tensor]:
        """Return the gradients of what the optimizer trains, those of the distillation that it holds apart included."""
        apart: List[torch.Tensor] = getattr(self.optimizer, 'distill_gradients', list)()
        return [*(p.grad for p in self.parameters if p.grad is not None), *apart]

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Take the buffers back to what they were at `note` if the update is not finite."""
        if not self.buffers:
            return
        if self.eager:
            if not self.finite.item():
                foreach_copy_(self.buffers, self._saved)
            return
        for (dtype, new), (_, old) in zip(*(_by_dtype(x).items() for x in (self.buffers, self._saved))):
            _select(new, old, dtype, self.finite)


def _select(new: Sequence[torch.Tensor], old: Sequence[torch.Tensor], dtype: torch.dtype, keep: torch.Tensor) -> None:
    """Where `keep` is false, write old into new; in integers, whose differences wrap around and so are exact."""
    new_bits, old_bits = [x.view(dtype) for x in new], [x.view(dtype) for x in old]
    difference = foreach_sub(old_bits, new_bits)
    foreach_mul_(difference, (~keep).to(device=new[0].device, dtype=dtype))
    foreach_add_(new_bits, difference)


__all__ = ['UpdateGuard', 'all_finite', 'keep_where']
