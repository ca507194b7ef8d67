"""Random features of a student and a teacher, and the pair that a method is built for."""
from typing import Sequence

import torch

from timm_distill.features.spec import Features, FeatureSpec, PairSpec, Stage

INPUT_SIZE = (3, 16, 16)
CLASSES = 5
_CHANNELS = {'student': (6, 8, 10), 'teacher': (8, 12, 16)}


def create_features(
        model: str,
        batch_size: int = 4,
        grids: Sequence[int] = (8, 4, 1),
        dtype: torch.dtype = torch.float32,
        scale: float = 1.,
        requires_grad: bool = True,
) -> Features:
    """Return random features of 'student' or 'teacher', with a stage for every grid."""
    channels = _CHANNELS[model][-len(grids):]

    def draw(*shape: int) -> torch.Tensor:
        return (scale * torch.randn(batch_size, *shape)).to(dtype).requires_grad_(requires_grad)

    stages = tuple(draw(c, grid, grid) for c, grid in zip(channels, grids))
    return Features(logits=draw(CLASSES), feature=stages[-1], pre_logits=draw(channels[-1]), stages=stages)


def spec_of(features: Features) -> FeatureSpec:
    """Return what features look like for one image."""
    assert features.logits is not None and features.feature is not None and features.pre_logits is not None
    return FeatureSpec(
        num_classes=features.logits.shape[1],
        feature=tuple(features.feature.shape[1:]),  # type: ignore[arg-type]
        pre_logits=features.pre_logits.shape[1],
        stages=tuple(Stage(i, tuple(x.shape[1:])) for i, x in enumerate(features.stages)),  # type: ignore[arg-type]
        input_size=INPUT_SIZE,
    )


def create_pair(student: Features, teacher: Features) -> PairSpec:
    """Return the pair of two models with such features."""
    return PairSpec(spec_of(student), spec_of(teacher))
