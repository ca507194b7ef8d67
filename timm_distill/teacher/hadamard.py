"""Hadamard matrices and other rotations that spread variance evenly over channels."""
import math
from typing import Optional

import torch


def hadamard_matrix(size: int) -> Optional[torch.Tensor]:
    """Return an orthogonal matrix whose entries all are +-1 / sqrt(size), float64; None where none is constructed here.

    Sylvester's for powers of two, else the Kronecker product of the largest possible one with one of Paley's (Journal
    of Mathematics and Physics, 1933), of order q + 1 or 2 (q + 1) for a prime q. None for sizes above 2 that are no
    multiple of 4, where there is no such matrix, and for some that are (52, 92, 100).
    """
    core = size & -size  # the largest power of two in it
    if core == size:
        return _sylvester(size) / math.sqrt(size)
    order = 4 * (size // core)
    while order <= size and size % order == 0:
        paley = _paley(order)
        if paley is not None:
            return torch.kron(_sylvester(size // order), paley) / math.sqrt(size)
        order *= 2
    return None


def _sylvester(size: int) -> torch.Tensor:
    matrix, step = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1., 1.], [1., -1.]], dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(step, matrix)
    return matrix


def _paley(order: int) -> Optional[torch.Tensor]:
    """Return a matrix of +-1 with orthogonal rows by one of Paley's constructions over prime fields."""
    if order % 4 == 0 and _is_prime(order - 1):
        return torch.eye(order, dtype=torch.float64) + _conference(order - 1, -1.)
    q = order // 2 - 1
    if order % 4 == 0 and q % 4 == 1 and _is_prime(q):
        blocks = torch.tensor([[[1., 1.], [1., -1.]], [[1., -1.], [-1., -1.]]], dtype=torch.float64)
        return torch.kron(_conference(q, 1.), blocks[0]) + torch.kron(torch.eye(q + 1, dtype=torch.float64), blocks[1])
    return None


def _conference(q: int, sign: float) -> torch.Tensor:
    """Return Paley's conference matrix of order q + 1: zeros on the diagonal, quadratic characters of differences.

    Args:
        q: Odd prime.
        sign: Of the first column: -1 for a skew-symmetric matrix (q = 3 mod 4), 1 for a symmetric one (q = 1 mod 4).
    """
    character = -torch.ones(q, dtype=torch.float64)
    character[[x * x % q for x in range(1, q)]] = 1.
    character[0] = 0.
    rows = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1., sign
    matrix[1:, 1:] = character[(rows[:, None] - rows) % q]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))


def equalize(values: torch.Tensor) -> torch.Tensor:
    """Return a rotation R, [D, D], for which R diag(values) R^T has equal entries on its diagonal.

    For sizes without a Hadamard matrix. D - 1 plane rotations, each of which brings one entry to the mean (Bendel and
    Mickey, Communications in Statistics, 1978).

    Args:
        values: [D], float64.
    """
    rotation, matrix, mean = torch.eye(len(values), dtype=values.dtype), torch.diag(values), values.mean()
    for _ in range(len(values) - 1):
        diagonal = matrix.diagonal()
        low, high = int(diagonal.argmin()), int(diagonal.argmax())
        below, above = diagonal[low] - mean, diagonal[high] - mean
        if not (below < 0 < above):
            break
        cross = matrix[low, high]
        tangent = (-cross + (cross * cross - below * above).sqrt()) / above
        cosine = 1 / (1 + tangent * tangent).sqrt()
        plane = torch.stack([torch.stack([cosine, tangent * cosine]), torch.stack([-tangent * cosine, cosine])])
        pair = [low, high]
        rotation[pair] = plane @ rotation[pair]
        matrix[pair] = plane @ matrix[pair]
        matrix[:, pair] = matrix[:, pair] @ plane.T
    return rotation
