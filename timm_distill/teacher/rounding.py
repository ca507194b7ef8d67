"""Rounding of a teacher's outputs, measured: the same images in another precision."""
import copy
from typing import AbstractSet, Tuple

import torch

from ..features.spec import Features
from .teacher import Teacher

_TF32 = 2 ** -3  # of the rounding of bfloat16, which has three bits less


@torch.no_grad()
def run_rounded(teacher: Teacher, images: torch.Tensor, outputs: AbstractSet[str]) -> Tuple[Features, float]:
    """Run a teacher in another precision, from which its outputs differ by what rounding makes of them.

    Args:
        teacher: One that is not sharded.
        images: Normalised for the student, [B, C, H, W].
        outputs: Which of its outputs to compute.

    Returns:
        The outputs in float32 of a teacher that computes in less, and 1; of others the outputs in autocast to bfloat16,
        and the part of their difference that is left with the bits of TF32.
    """
    kind, reader, prepare = images.device.type, teacher.reader, teacher.prepare
    is_low = prepare.dtype.itemsize < 4
    autocast = teacher.autocast and torch.is_autocast_enabled(kind)
    if is_low:
        reader, prepare = copy.deepcopy(reader).float(), copy.deepcopy(prepare)
        prepare.dtype = torch.float32
    with torch.autocast(kind, torch.bfloat16, enabled=not (is_low or autocast)):
        features = teacher.map_classes(reader(prepare(images.float()), outputs))
    return features.to(torch.float32), 1. if is_low or autocast else _TF32
