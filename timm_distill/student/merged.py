"""Plain students with the merged weights: kept beside a student that trains, brought up to date, and verified."""
import math
from typing import Callable, Dict, Iterator, Mapping, Optional, Sequence

import torch
import torch.nn as nn
from timm.utils import unwrap_model

from ..errors import MergeError
from ..features.inputs import random_images
from .adapted import AdaptedStudent
from .merge import MERGE_TOLERANCE

_PROBE_IMAGES = 4


class MergedStudents:
    """Plain timm models that merged weights are loaded into, one for the student and one for its average.

    They are neither saved nor trained.

    Args:
        input_size: (channels, height, width), for images to measure a merge on before any batch was seen.

    Attributes:
        probe: Images that were noted to measure merges on, [B, C, H, W]; None for none.
    """

    def __init__(self, input_size: Sequence[int]):
        self.input_size = input_size
        self._models: Dict[bool, nn.Module] = {}
        self._compile: Optional[Callable[[nn.Module], nn.Module]] = None
        self.probe: Optional[torch.Tensor] = None

    def note_probe(self, images: Optional[torch.Tensor]) -> None:
        """Note images of a batch, [B, C, H, W], to measure merges on; None forgets them."""
        self.probe = None if images is None else images[:_PROBE_IMAGES].detach().clone()

    def compile_with(self, compile: Callable[[nn.Module], nn.Module]) -> None:
        """Compile the models; those that were built before are built anew."""
        self._compile = compile
        self._models.clear()

    def load(self, trained: AdaptedStudent, ema: bool, state: Mapping[str, torch.Tensor]) -> nn.Module:
        """Load a merged state dict into the model that is kept for it; return that in eval mode."""
        if ema not in self._models:
            plain = trained.plain_student(self._random_probe(trained))
            self._models[ema] = self._compile(plain) if self._compile is not None else plain
        unwrap_model(self._models[ema]).load_state_dict(state)
        return self._models[ema].eval()

    @torch.no_grad()
    def verify(self, trained: AdaptedStudent, ema: bool, state: Mapping[str, torch.Tensor]) -> Optional[float]:
        """Compare the student as trained with a plain model that the state dict of the file was loaded into.

        Returns:
            The largest logit difference relative to the logits' spread; None where nothing was merged.

        Raises:
            MergeError: If it is more than rounding explains; holds the raw tensors.
        """
        if not trained.adapters or trained.tap is None or trained.tap.point == 'side':
            return None
        plain = unwrap_model(self.load(trained, ema, state)).eval()
        parameter = next(trained.parameters())
        error = float('nan')
        for images in self._probes(trained):
            error = trained.merge_error(images.to(parameter.device, parameter.dtype), plain)
            if math.isfinite(error):
                break  # logits of images that overflow tell nothing of the merge
        tolerance = MERGE_TOLERANCE[parameter.dtype]
        what = 'EMA student' if ema else 'student'
        if not error <= tolerance:  # true for nan
            raise MergeError(
                f'The merged {what} differs from the {what} as trained: largest logit difference {error:.2g} of the '
                f"logits' spread, allowed {tolerance:g}. A nan means that the weights are not finite.",
                {'state_dict': trained.student.state_dict(), 'task_state': trained.task_state()},
            )
        return error

    def _random_probe(self, trained: AdaptedStudent) -> torch.Tensor:
        return random_images(trained, self.input_size, _PROBE_IMAGES)

    def _probes(self, trained: AdaptedStudent) -> Iterator[torch.Tensor]:
        """Yield batches to measure a merge on: the finite images of the epoch's first batch, then random ones."""
        if self.probe is not None:
            finite = self.probe[self.probe.flatten(1).isfinite().all(1)]
            if len(finite):
                yield finite
        yield self._random_probe(trained)
