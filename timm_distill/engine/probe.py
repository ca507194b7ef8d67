"""Probes of frozen features: nearest neighbours, a linear classifier, how well one model's features give another's.

Tensors in, numbers out; no probe draws random numbers. Features are [N, D], labels int64 [N], both in host memory. They
are worked on in blocks, on the device that is asked for, so that nothing of N x N values is ever held.
"""
from typing import Iterator, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

from ..utils.precision import full_float32

NEIGHBOURS = 20
TEMPERATURE = 0.07
_BLOCK = 1 << 24  # values of a block of similarities or logits: 64 MiB in float32
_DECAYS = (1., 1e-1, 1e-2, 1e-3, 1e-4)  # of the linear classifier, largest first: each starts from the one before
_HELD_BACK = 5  # every fifth image of those to fit chooses among them
_STEPS = 100  # of the optimizer, which stops where the gradient is nothing
_RIDGE = 1e-2  # of the mean variance of a feature


def split_halves(labels: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return the images to fit and those to test of one labelled set: every other of each class, in their order."""
    order = labels.argsort(stable=True)
    counts = labels.bincount()
    starts = counts.cumsum(0) - counts
    rank = torch.arange(len(labels)) - starts[labels[order]]  # inside the class
    return order[rank % 2 == 0].sort().values, order[rank % 2 == 1].sort().values


@torch.no_grad()
def knn_accuracy(
        features: torch.Tensor,
        labels: torch.Tensor,
        test_features: torch.Tensor,
        test_labels: torch.Tensor,
        neighbours: int = NEIGHBOURS,
        temperature: float = TEMPERATURE,
        device: Optional[torch.device] = None,
        block: int = _BLOCK,
) -> float:
    """Return the top-1 accuracy, in percent, of the votes of the most similar images.

    Cosine similarities s, each vote weighted by exp(s / temperature), as in Unsupervised Feature Learning via
    Non-Parametric Instance Discrimination (Wu et al., CVPR 2018), https://arxiv.org/abs/1805.01978, with the settings
    of DINO. The search is exact.

    Args:
        features: Of the images that vote, [N, D].
        labels: Theirs, [N].
        test_features: Of the images that are classified, [M, D].
        test_labels: Theirs, [M].
        neighbours: How many vote; all where there are fewer.
        temperature: Of the weights.
        device: Where to compute; the CPU if None.
        block: Values of a block of similarities.
    """
    side = max(1, int(block ** 0.5))
    num_classes = int(max(labels.max(), test_labels.max())) + 1
    right = 0
    for rows in torch.arange(len(test_features)).split(min(side, max(1, block // num_classes))):
        similar, nearest = _search(test_features[rows].to(device), features, neighbours, side)
        weights = ((similar - similar[:, :1]) / temperature).exp().cpu()
        votes = torch.zeros(len(rows), num_classes).scatter_add_(1, labels[nearest], weights)
        right += int((votes.argmax(1) == test_labels[rows]).sum())
    return 100 * right / len(test_features)


def _search(
        queries: torch.Tensor,
        bank: torch.Tensor,
        count: int,
        block: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return the largest cosine similarities of each query, largest first, and whose they are, [Q, count] each."""
    queries = F.normalize(queries.float(), dim=1)
    similar = queries.new_empty(len(queries), 0)
    nearest = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), block):
        part = F.normalize(bank[start:start + block].to(queries.device).float(), dim=1)
        with full_float32():
            products = queries @ part.T
        indices = torch.arange(start, start + len(part), device=queries.device).expand(len(queries), -1)
        similar = torch.cat([similar, products], 1)
        similar, order = similar.topk(min(count, similar.shape[1]), dim=1)
        nearest = torch.cat([nearest, indices], 1).gather(1, order)
    return similar, nearest.cpu()


@torch.no_grad()
def linear_probe_accuracy(
        features: torch.Tensor,
        labels: torch.Tensor,
        test_features: torch.Tensor,
        test_labels: torch.Tensor,
        decays: Sequence[float] = _DECAYS,
        device: Optional[torch.device] = None,
        block: int = _BLOCK,
) -> float:
    """Return the top-1 accuracy, in percent, of multinomial logistic regression on standardised features.

    The loss is convex and minimised over all images at once (L-BFGS), so that the result depends on no learning rate.
    The weight decay is the one of `decays` that classifies every fifth image to fit best.

    Args:
        features: Of the images to fit, [N, D].
        labels: Theirs, [N].
        test_features: Of the images that are classified, [M, D].
        test_labels: Theirs, [M].
        decays: Weight decays to choose from.
        device: Where to compute; the CPU if None.
        block: Values of a block of logits or features.
    """
    fit, test = _standardize(features.float(), test_features.float())
    num_classes = int(max(labels.max(), test_labels.max())) + 1
    start = torch.zeros(fit.shape[1] + 1, num_classes, device=device)
    held_back = torch.zeros(len(labels), dtype=torch.bool)
    held_back[_HELD_BACK - 1::_HELD_BACK] = True
    chosen = decays[0]
    if len(decays) > 1 and held_back.any():
        scores, layer = [], start
        for decay in decays:
            layer = _fit_linear(fit[~held_back], labels[~held_back], layer, decay, block)
            scores.append(_count_right(fit[held_back], labels[held_back], layer, block))
        chosen = decays[scores.index(max(scores))]
    layer = _fit_linear(fit, labels, start, chosen, block)
    return 100 * _count_right(test, test_labels, layer, block) / len(test_labels)


def _standardize(features: torch.Tensor, others: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return both with the mean and deviation of the former as 0 and 1; a feature that is constant becomes 0."""
    std, mean = torch.std_mean(features, dim=0, correction=0)
    scale = torch.where(std > 1e-6 * std.max(), 1 / std, torch.zeros_like(std)).nan_to_num(posinf=0.)
    return (features - mean) * scale, (others - mean) * scale


def _fit_linear(
        features: torch.Tensor,
        labels: torch.Tensor,
        start: torch.Tensor,
        decay: float,
        block: int,
) -> torch.Tensor:
    """Minimise cross-entropy + decay / 2 * the squared weights; returns weight and, in the last row, bias."""
    layer = start.clone()
    optimizer = torch.optim.LBFGS(
        [layer], max_iter=_STEPS, history_size=10, tolerance_grad=1e-6, line_search_fn='strong_wolfe')

    def _loss() -> torch.Tensor:
        layer.grad = torch.zeros_like(layer)
        loss = layer.new_zeros(())
        for x, y in _blocks(features, labels, layer, block):
            logits = torch.addmm(layer[-1], x, layer[:-1])
            loss = loss + F.cross_entropy(logits, y, reduction='sum')
            error = logits.softmax(1) - F.one_hot(y, logits.shape[1])
            layer.grad[:-1] += x.T @ error
            layer.grad[-1] += error.sum(0)
        layer.grad /= len(features)
        layer.grad[:-1] += decay * layer[:-1]
        return loss / len(features) + decay / 2 * layer[:-1].square().sum()

    with full_float32():
        optimizer.step(_loss)
    return layer


def _blocks(
        features: torch.Tensor,
        labels: torch.Tensor,
        layer: torch.Tensor,
        block: int,
) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    size = max(1, block // max(layer.shape))
    for x, y in zip(features.split(size), labels.split(size)):
        yield x.to(layer.device), y.to(layer.device)


def _count_right(features: torch.Tensor, labels: torch.Tensor, layer: torch.Tensor, block: int) -> int:
    return sum(
        int((torch.addmm(layer[-1], x, layer[:-1]).argmax(1) == y).sum())
        for x, y in _blocks(features, labels, layer, block))


@torch.no_grad()
def mean_cosine(student: torch.Tensor, teacher: torch.Tensor) -> float:
    """Return how well a linear map of the student's features gives the teacher's: the mean cosine, 1 at best.

    The map (ridge regression) is fitted on one half of the images and measured on the other, and the other way round;
    the teacher's mean is taken off, as it alone would give a large cosine. So widths may differ, and no layer that a
    method trains has a part in it.

    Args:
        student: Features of N images, [N, Ds].
        teacher: The teacher's of the same, [N, Dt].
    """
    x, t = student.double(), teacher.double()
    halves = [torch.arange(start, len(x), 2) for start in (0, 1)]
    cosines = [_predict_cosine(x[a], t[a], x[b], t[b]) for a, b in (halves, halves[::-1])]
    return torch.cat(cosines).mean().item()


def _predict_cosine(x: torch.Tensor, t: torch.Tensor, other_x: torch.Tensor, other_t: torch.Tensor) -> torch.Tensor:
    mean_x, mean_t = x.mean(0), t.mean(0)
    x, t = x - mean_x, t - mean_t
    ridge = (_RIDGE * x.square().sum() / x.shape[1]).clamp_min(1e-30)
    if len(x) < x.shape[1]:  # the same map by the smaller of the two systems
        weight = x.T @ torch.linalg.solve(x @ x.T + ridge * torch.eye(len(x), dtype=x.dtype), t)
    else:
        weight = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype), x.T @ t)
    return F.cosine_similarity((other_x - mean_x) @ weight, other_t - mean_t, dim=1)
