"""Factor transfer.

Paraphrasing Complex Network: Network Compression via Factor Transfer (Kim et al., NeurIPS 2018),
https://arxiv.org/abs/1802.04977.

A paraphraser, an autoencoder of the teacher's last stage, gives the teacher's factor; a translator on the student's
gives the student's. Both are summed over channels as attention maps are, and compared.

Published is a first phase that trains the paraphraser alone. Here it trains beside the student: its reconstruction
error is a term of its own, the teacher's factor is a constant for the student's. Inner weights: 200 for the factors,
as in the common implementation, 1 for the reconstruction. `difference_power=1` is the published L1 distance.
"""
from typing import Annotated, Dict, List, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..features.spec import Stage
from ..losses import l2_normalize, match_grids
from ..utils.precision import in_full_precision
from ..utils.ranges import OneOf, Range
from ..utils.registry import LARGEST_NUMBER
from ._base import register_method
from ._layers import BatchNorm2d
from ._stages import SingleStage, StageMethod

PositiveWeight = Annotated[float, Range(0, LARGEST_NUMBER, without_low=True)]


@in_full_precision
def factor_loss(
        student: torch.Tensor,
        teacher: torch.Tensor,
        difference_power: int = 1,
        power: int = 2,
) -> torch.Tensor:
    """Mean difference of factors, each as the unit vector of its mean power at every position.

    Args:
        student: Factor, [B, Fs, Hs, Ws].
        teacher: Factor, [B, Ft, Ht, Wt], treated as constant. The larger of two grids is pooled to the smaller.
        difference_power: Exponent of the difference: of its size for 1, of the signed difference for others.
        power: Exponent of the factors, with their sign.

    Returns:
        Scalar.
    """
    maps = [l2_normalize(_mean_power(f, power)) for f in match_grids(student, teacher.detach())]
    difference = maps[0] - maps[1]
    return difference.abs().mean() if difference_power == 1 else difference.pow(difference_power).mean()


def _mean_power(factor: torch.Tensor, power: int) -> torch.Tensor:
    """Mean over channels of a power, [B, C, H, W] -> [B, H * W], with large factors scaled down so that it is finite.

    The unit vector that is made of it does not depend on their scale.
    """
    scale = factor.detach().abs().amax((1, 2, 3), keepdim=True).clamp_min(1.)
    return ((factor / scale) ** power).mean(1).flatten(1)


@in_full_precision
def reconstruction_loss(reconstruction: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the paraphraser, [B, Ct, H, W]."""
    return F.mse_loss(reconstruction, teacher.detach())


def _create_stack(channels: Tuple[int, ...], batch_norm: bool, transposed: bool = False) -> nn.Sequential:
    """Return 3x3 convolutions through these widths, each with a leaky ReLU behind it."""
    convolution = nn.ConvTranspose2d if transposed else nn.Conv2d
    layers = [(
        convolution(c, d, 3, padding=1),
        BatchNorm2d(d) if batch_norm else nn.Identity(),
        nn.LeakyReLU(0.1),
    ) for c, d in zip(channels, channels[1:])]
    return nn.Sequential(*[layer for block in layers for layer in block])


class Paraphraser(nn.Module):
    """Autoencoder of the teacher's feature; what is between its halves is the teacher's factor.

    Args:
        channels: Ct.
        width: Channels of the factor.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.encoder = _create_stack((channels, channels, width, width), batch_norm=False)
        self.decoder = _create_stack((width, width, channels, channels), batch_norm=False, transposed=True)

    def forward(self, feature: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return factor and reconstruction."""
        factor = self.encoder(feature.to(next(self.parameters()).dtype))
        return factor, self.decoder(factor)


class Translator(nn.Module):
    """Maps the student's feature to its factor.

    Args:
        channels: Cs.
        width: Channels of the factor.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.encoder = _create_stack((channels, channels, width, width), batch_norm=True)

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        return self.encoder(feature)


@register_method('ft')
class FactorTransfer(StageMethod):
    """Factors of the last feature: the teacher's from an autoencoder that trains along.

    Args:
        factor_rate: Channels of the factor in units of the teacher's.
        difference_power: Exponent of the factors' difference, 1 or an even one: with others the official code rewards
            differences of one sign.
        factor_power: Exponent of the factors, with their sign.
        factor_weight: Weight of the factors' difference.
        reconstruction_weight: Weight of the paraphraser's reconstruction error, which the student does not see.
        stages: Which matched stage: 'last', 'middle' or one position, shallow to deep.
    """
    paper = 'Kim et al., NeurIPS 2018, https://arxiv.org/abs/1802.04977'
    weight_source = 'RepDistiller, whose 200 is ft.factor_weight'
    spatial = True

    def __init__(
            self,
            factor_rate: Annotated[float, Range(0, 16, without_low=True)] = 0.5,
            difference_power: Annotated[int, OneOf(1, 2, 4)] = 1,
            factor_power: Annotated[int, OneOf(1, 2, 3, 4)] = 2,
            factor_weight: PositiveWeight = 200.,
            reconstruction_weight: PositiveWeight = 1.,
            stages: SingleStage = 'last',
    ):
        super().__init__(stages)
        self.factor_rate = float(factor_rate)
        self.difference_power, self.factor_power = difference_power, factor_power
        self.factor_weight = float(factor_weight)
        self.reconstruction_weight = float(reconstruction_weight)

    def build_stages(self, stages: List[Tuple[Stage, Stage]]) -> None:
        (student, teacher), = stages
        width = max(1, int(self.factor_rate * teacher.shape[0]))
        self.paraphraser = Paraphraser(teacher.shape[0], width)
        self.translator = Translator(student.shape[0], width)

    def compare(self, students: Sequence[torch.Tensor], teachers: Sequence[torch.Tensor]) -> Dict[str, torch.Tensor]:
        (of_student,), (of_teacher,) = students, teachers
        factor, reconstruction = self.paraphraser(of_teacher.detach())
        difference = factor_loss(self.translator(of_student), factor, self.difference_power, self.factor_power)
        return {
            'ft_loss': self.factor_weight * difference,
            'ft_reconstruction_loss': self.reconstruction_weight * reconstruction_loss(reconstruction, of_teacher),
        }
