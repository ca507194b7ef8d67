"""Losses that two or more methods share: pure functions of tensors.

Every function computes in float32 or better, whatever the precision of its inputs.
"""
from typing import Tuple

import torch
import torch.nn.functional as F

from .utils.precision import in_full_precision, to_full_precision


def kl_divergences(
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        temperature: float = 1.,
) -> torch.Tensor:
    """Kullback-Leibler divergence from the teacher's softened distribution for every sample, times temperature squared.

    Distilling the Knowledge in a Neural Network (Hinton et al., 2015), https://arxiv.org/abs/1503.02531.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K], treated as constant.
        temperature: Divides both logits; the factor temperature squared keeps the gradient's scale.

    Returns:
        [B].
    """
    log_student = F.log_softmax(to_full_precision(student_logits) / temperature, dim=-1)
    log_teacher = F.log_softmax(to_full_precision(teacher_logits.detach()) / temperature, dim=-1)
    return F.kl_div(log_student, log_teacher, reduction='none', log_target=True).sum(-1) * temperature ** 2


def kl_divergence(
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        temperature: float = 1.,
        reduction: str = 'batchmean',
) -> torch.Tensor:
    """`kl_divergences` as one number.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K], treated as constant.
        temperature: Divides both logits.
        reduction: 'batchmean' (sum over classes, mean over samples), 'mean' (mean over classes too) or 'sum'.

    Returns:
        Scalar.
    """
    divergences = kl_divergences(student_logits, teacher_logits, temperature)
    if reduction == 'sum':
        return divergences.sum()
    return divergences.mean() / (student_logits.shape[-1] if reduction == 'mean' else 1)


def target_classes(target: torch.Tensor) -> torch.Tensor:
    """Return one class of each sample, [B]: of soft targets [B, K] the largest, the first of equals."""
    return target if target.ndim == 1 else target.argmax(dim=1)


def other_logits(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Return the logits without those of one class of each sample: [B, K] and [B] -> [B, K - 1]."""
    positions = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, positions + (positions >= classes[:, None]))


def target_cross_entropies(
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        classes: torch.Tensor,
) -> torch.Tensor:
    """Cross-entropy of the target class times the teacher's probability of it, for every sample.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K], treated as constant.
        classes: Target class of each sample, [B].

    Returns:
        [B].
    """
    probability = F.softmax(to_full_precision(teacher_logits.detach()), dim=1).gather(1, classes[:, None])[:, 0]
    return probability * F.cross_entropy(to_full_precision(student_logits), classes, reduction='none')


def standardize_logits(logits: torch.Tensor, scale: float, eps: float = 1e-7) -> torch.Tensor:
    """Layer norm of each sample's logits without affine parameters, times `scale`: [B, K] -> [B, K].

    Logits that are all alike are not divided by their deviation.
    """
    logits = to_full_precision(logits)
    centred = logits - logits.mean(dim=-1, keepdim=True)
    constant = is_constant(logits, centred.square().mean(dim=-1, keepdim=True).sqrt())
    return scale * torch.where(constant, centred, F.layer_norm(logits, logits.shape[-1:], eps=eps))


def among_classes(target: torch.Tensor, classes: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return targets among some of the classes, for logits of these alone, and what share of each target lies in them.

    What all classes share of a soft target (label smoothing) lies in none.

    Args:
        target: Class indices [B] or soft targets [B, K].
        classes: The classes in rising order, [M].

    Returns:
        Class indices [B], 0 for one that is not among them, or soft targets [B, M]; shares [B] from 0 to 1.
    """
    if target.ndim == 1:
        position = torch.searchsorted(classes, target.contiguous()).clamp(max=len(classes) - 1)
        found = classes[position] == target
        return position.masked_fill(~found, 0), found.float()
    mass = (target - target.amin(dim=1, keepdim=True)).float()
    return target[:, classes], mass[:, classes].sum(1) / mass.sum(1).clamp_min(torch.finfo(mass.dtype).tiny)


def is_constant(x: torch.Tensor, deviation: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Whether all values along `dim` are alike, up to the rounding of their mean.

    Such a row must not be divided by its deviation: the gradient of a classifier that starts at zero would be as large
    as one over a rounding error.

    Args:
        x: Values.
        deviation: Their standard deviation along `dim`, with that dimension kept.
        dim: The dimension.

    Returns:
        Booleans in the shape of `deviation`, without gradient.
    """
    return deviation.detach() <= 8 * torch.finfo(x.dtype).eps * x.detach().abs().amax(dim=dim, keepdim=True)


def n_to_one_loss(expanded: torch.Tensor, teacher: torch.Tensor, segments: int) -> torch.Tensor:
    """Sum over the segments of each one's mean squared error against the teacher's feature.

    NORM: Knowledge Distillation via N-to-One Representation Matching (Liu et al., ICLR 2023).

    Args:
        expanded: Student's expanded feature, [B, N * Ct, H, W]; channel j is matched with channel j mod Ct.
        teacher: Teacher's feature, [B, Ct, H, W], treated as constant.
        segments: N.

    Returns:
        Scalar.
    """
    expanded = to_full_precision(expanded).unflatten(1, (segments, -1))  # [B, N, Ct, H, W]
    teacher = to_full_precision(teacher.detach()).unsqueeze(1)
    return segments * (expanded - teacher).square().mean()


def match_grids(
        student: torch.Tensor,
        teacher: torch.Tensor,
        pool: str = 'avg',
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Pool the larger of two feature maps to the grid of the smaller, per dimension.

    Args:
        student: [B, Cs, Hs, Ws].
        teacher: [B, Ct, Ht, Wt].
        pool: 'avg' for adaptive average pooling; 'max' for max pooling, as the official NORM code does with windows
            of floor(larger / smaller), adaptive windows where these do not give the smaller grid.

    Returns:
        Both maps on the grid [min(Hs, Ht), min(Ws, Wt)].
    """
    grid = (min(student.shape[-2], teacher.shape[-2]), min(student.shape[-1], teacher.shape[-1]))
    return pool_to_grid(student, grid, pool), pool_to_grid(teacher, grid, pool)


def pool_to_grid(x: torch.Tensor, grid: Tuple[int, int], pool: str = 'avg') -> torch.Tensor:
    """Pool a feature map to a smaller grid, [B, C, H, W] -> [B, C, *grid]."""
    if x.shape[-2:] == grid:
        return x
    if pool == 'avg':
        return F.adaptive_avg_pool2d(x, grid)
    kernel = (x.shape[-2] // grid[0], x.shape[-1] // grid[1])
    if (x.shape[-2] // kernel[0], x.shape[-1] // kernel[1]) == grid:
        return F.max_pool2d(x, kernel)
    return F.adaptive_max_pool2d(x, grid)


def l2_normalize(x: torch.Tensor, dim: int = -1, eps: float = 1e-12) -> torch.Tensor:
    """Scale to unit length along `dim`; what is shorter than `eps` becomes zero, with zero gradient."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    short = norm <= eps
    return x.masked_fill(short, 0.) / norm.masked_fill(short, 1.)


@in_full_precision
def squared_norm_of_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Squared Frobenius norm of x y^T, from the smaller of that matrix and the two Gram matrices x^T x and y^T y.

    Args:
        x: [..., M, R].
        y: [..., N, R].

    Returns:
        [...].
    """
    (m, rank), n = x.shape[-2:], y.shape[-2]
    if rank * (m + n) < m * n:
        return ((x.mT @ x) * (y.mT @ y)).sum((-2, -1))
    return (x @ y.mT).square().sum((-2, -1))
