"""Mixup and cutmix of replayed views: partner, factor and box of a view are those of (image, view number).

timm mixes an image with the one at the other end of its batch, which depends on the order of the data. Here the images
of a training set are paired anew for every view number, whatever batch they are in; the partner is seen at its own view
of that number.
"""
from typing import Any, Callable, Tuple

import numpy as np
import torch
from timm.data.mixup import Mixup, cutmix_bbox_and_lam, mixup_target

from ..utils._compat import draw_mixing
from ..utils.random import scramble

_ROUNDS = 4
_PARTNER, _MIX = 3, 4  # what is drawn, each from generators of its own

class Pairing:
    """Pairs of the numbers below `count`, other ones for every key: each is its partner's partner.

    A permutation (a Feistel network over the next even number of bits, walked until it stays below `count`) puts the
    numbers in an order, in which the first goes with the last.

    Args:
        count: How many numbers; of an odd number one is its own partner.
        key: Which pairs.
    """

    def __init__(self, count: int, key: int):
        self.count = count
        self.half = max(1, ((count - 1).bit_length() + 1) // 2)
        self.keys = [scramble(key, i) for i in range(_ROUNDS)]

    def partner(self, number: int) -> int:
        """Return the partner of a number."""
        place = self._walk(number, self.keys)
        return self._walk(self.count - 1 - place, self.keys[::-1])

    def _walk(self, number: int, keys: Any) -> int:
        while True:
            number = self._permute(number, keys)
            if number < self.count:
                return number

    def _permute(self, number: int, keys: Any) -> int:
        mask = (1 << self.half) - 1
        left, right = number >> self.half, number & mask
        for key in keys:
            left, right = right, left ^ (scramble(key, right) & mask)
        return (right << self.half) | left  # halves swapped, so that the keys in reverse undo it


class ViewMixing:
    """Mixing of single views, as timm's modes 'elem' and 'pair' mix the elements of a batch.

    Args:
        num_samples: Images of the training set.
        mode: 'pair' for one factor and box of both partners, 'elem' for one of each.
        mixup_kwargs: Arguments of timm's `Mixup` without its mode.
    """

    def __init__(self, num_samples: int, mode: str, **mixup_kwargs: Any):
        self.num_samples = num_samples
        self.mode = mode
        self.mixup = Mixup(mode='elem', **mixup_kwargs)

    def partner(self, index: int, number: int) -> int:
        """Return the image that one is mixed with, which may be itself."""
        return Pairing(self.num_samples, scramble(_PARTNER, number)).partner(index)

    def seed(self, index: int, partner: int, number: int) -> Tuple[int, ...]:
        """Return what the factor and the box of a view depend on."""
        return (_MIX, min(index, partner), number) if self.mode == 'pair' else (_MIX, index, number)

    def mix(self, image: Any, target: Any, read_partner: Callable[[], Tuple[Any, Any]]) -> Tuple[Any, torch.Tensor]:
        """Mix a view; draws from the global generators.

        Args:
            image: uint8 array or tensor, or a normalised tensor, [C, H, W].
            target: Class index, or vector [K].
            read_partner: Gives image and target of its partner; called behind all drawing.

        Returns:
            The mixed image and its target, [K].
        """
        lam, use_cutmix = (values[0] for values in draw_mixing(self.mixup, 1))
        if lam == 1.:
            return image, self._mix_targets(target, target, 1.)
        box = None
        if use_cutmix:
            box, lam = cutmix_bbox_and_lam(
                image.shape, lam, ratio_minmax=self.mixup.cutmix_minmax, correct_lam=self.mixup.correct_lam)
        other, other_target = read_partner()
        mixed = _blend(image, other, float(lam)) if box is None else _paste(image, other, box)
        return mixed, self._mix_targets(target, other_target, float(lam))

    def _mix_targets(self, target: Any, other: Any, lam: float) -> torch.Tensor:
        both = torch.stack([torch.as_tensor(target), torch.as_tensor(other)])
        return mixup_target(
            both, self.mixup.num_classes, lam, self.mixup.label_smoothing, self.mixup.multi_label)[0]


def _paste(image: Any, other: Any, box: Tuple[int, int, int, int]) -> Any:
    top, bottom, left, right = box
    mixed = image.copy() if isinstance(image, np.ndarray) else image.clone()
    mixed[:, top:bottom, left:right] = other[:, top:bottom, left:right]
    return mixed


def _blend(image: Any, other: Any, lam: float) -> Any:
    """Blend two images; those of 8 bits are rounded, as timm's collate function does."""
    if isinstance(image, np.ndarray):
        mixed = image.astype(np.float32) * lam + other.astype(np.float32) * (1 - lam)
        return np.rint(mixed).astype(np.uint8)
    if image.dtype == torch.uint8:
        return torch.round(image.float() * lam + other.float() * (1 - lam)).byte()
    return image * lam + other * (1 - lam)
