"""Contrastive representation distillation.

Contrastive Representation Distillation (Tian et al., ICLR 2020), https://arxiv.org/abs/1910.10699.

Both models' pre-logits are embedded on a unit sphere by a linear layer each. A sample's student embedding is told from
K others by its teacher embedding and the reverse, by noise-contrastive estimation. The others come from two memory
banks that hold an embedding of every training image:

    L = sum over both models of -E[ log(x_0 / (x_0 + K/n)) + sum_j log((K/n) / (x_j + K/n)) ]
    x_j = exp(<v, m_j> / T) / Z

The defaults are the official code's (128 dimensions, K = 16384, T = 0.07, momentum 0.5, mode 'exact'); its weight of
the term is 0.8. Negatives are drawn with replacement, which the official code does only where a class has fewer.
"""
import math
from typing import Annotated, Any, Dict, Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from ..errors import UsageError
from ..features.spec import Features, PairSpec
from ..losses import l2_normalize, to_full_precision
from ..utils.ranges import OneOf, Range
from ._base import Count, DistillMethod, Temperature, register_method

_MOST_NUMBERS = 2 ** 27  # half a gigabyte for each image of a batch
_COUNTED = 8  # samples for each negative up to which scores of all are cheaper than rows of those that were drawn
_MANY = 2 ** 62  # a remainder of a number below this is as good as uniform


def contrastive_loss(
        log_positive: torch.Tensor,
        log_negatives: torch.Tensor,
        num_negatives: int,
        num_samples: int,
        counts: Optional[torch.Tensor] = None,
        eps: float = 1e-7,
) -> torch.Tensor:
    """Noise-contrastive estimation of one model, from logarithms: finite for any similarity and temperature.

    Args:
        log_positive: log x of the positive, [B].
        log_negatives: log x of negatives, [B, M].
        num_negatives: K, how many negatives count for each sample.
        num_samples: n, so that 1/n is the density of the noise.
        counts: How often each of the negatives counts, [B, M]; once by default.
        eps: Added to both denominators, as in the official code.

    Returns:
        Scalar, the mean over the batch of the sum over positive and negatives.
    """
    noise = num_negatives / num_samples
    log_noise = math.log(noise + eps)
    positive = F.logsigmoid(log_positive - log_noise)
    negatives = F.logsigmoid(log_noise - log_negatives) + (math.log(noise) - log_noise)
    if counts is not None:
        negatives = negatives * counts
    return -(positive.sum() + negatives.sum()) / len(log_positive)


def similarities(embedding: torch.Tensor, bank: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the scalar products of embeddings [B, D] with rows [B, M] of a bank [n, D], [B, M]."""
    rows = bank[indices].to(embedding.dtype)  # [B, M, D]
    return torch.bmm(rows, embedding[:, :, None]).squeeze(2)


def count_draws(indices: torch.Tensor, num_samples: int, dtype: torch.dtype) -> torch.Tensor:
    """Return how often each of n samples is among those that were drawn, [B, K]: [B, n], exact in any order."""
    counts = torch.zeros(len(indices), num_samples, dtype=dtype, device=indices.device)
    return counts.scatter_add_(1, indices, torch.ones_like(indices, dtype=dtype))


def last_of_equals(indices: torch.Tensor) -> torch.Tensor:
    """Return for each of the indices, [B], the position of the last one equal to it."""
    ordered, positions = torch.sort(indices, stable=True)
    return positions[torch.searchsorted(ordered, indices.contiguous(), right=True) - 1]


@register_method('crd')
class CRD(DistillMethod):
    """Contrastive distillation of the pre-logits against memory banks of the training set.

    Args:
        embed_dim: Width of both embeddings.
        negatives: K, how many negatives each sample is told from.
        temperature: Divides the similarities.
        momentum: Part of the old embedding that stays in a bank when its image is seen.
        mode: 'exact' (the positive is the sample itself, negatives are of other classes), 'relax' (the positive is any
            sample of its class) or 'instance' (negatives are any other samples; needs no labels of the training set).
        half_banks: Keep the banks in float16, half the memory.

    Raises:
        UsageError: If negatives times width is more than fits.
    """
    paper = 'Tian et al., ICLR 2020, https://arxiv.org/abs/1910.10699'
    published_weight = 0.8
    weight_source = "the authors' code, RepDistiller"
    student_outputs = frozenset({'pre_logits'})
    teacher_outputs = frozenset({'pre_logits'})
    needs_indices = True
    reads_labels = True
    mixed_images = False

    student_bank: torch.Tensor
    teacher_bank: torch.Tensor
    log_partition: torch.Tensor
    labels: torch.Tensor
    by_class: torch.Tensor
    class_start: torch.Tensor
    class_count: torch.Tensor

    def __init__(
            self,
            embed_dim: Count = 128,
            negatives: Count = 16384,
            temperature: Temperature = 0.07,
            momentum: Annotated[float, Range(0, 1, without_high=True)] = 0.5,
            mode: Annotated[str, OneOf('exact', 'relax', 'instance')] = 'exact',
            half_banks: bool = False,
    ):
        super().__init__()
        if embed_dim * negatives > _MOST_NUMBERS:
            raise UsageError(
                f'crd.negatives={negatives} of crd.embed_dim={embed_dim} are {embed_dim * negatives:.3g} '
                f'numbers for every image of a batch, of which {_MOST_NUMBERS:.3g} are allowed '
                '(--kd-kwargs crd.negatives=16384 crd.embed_dim=128).')
        self.embed_dim = embed_dim
        self.negatives = negatives
        self.temperature = float(temperature)
        self.momentum = float(momentum)
        self.mode = mode
        self.reads_labels = mode != 'instance'
        self.half_banks = half_banks
        self.num_samples = 0

    def build(self, pair: PairSpec) -> None:
        if pair.num_samples is None or pair.num_samples < 2:
            raise UsageError(
                'crd keeps an embedding of every training image and must know how many there are, two or '
                'more: give sample_labels or num_samples to create_distill_task.')
        self.num_samples = pair.num_samples
        self.embed_student = nn.Linear(pair.student.pre_logits, self.embed_dim)
        self.embed_teacher = nn.Linear(pair.teacher.pre_logits, self.embed_dim)
        bound = math.sqrt(3 / self.embed_dim)  # rows of norm 1 on average
        for name in ('student_bank', 'teacher_bank'):
            bank = torch.empty(self.num_samples, self.embed_dim).uniform_(-bound, bound)
            self.register_buffer(name, bank.half() if self.half_banks else bank, persistent=False)
        # log Z of student and teacher, set by the first batch
        self.register_buffer('log_partition', torch.full((2,), math.nan), persistent=False)
        if self.mode != 'instance':
            self._index_classes(pair)

    def _index_classes(self, pair: PairSpec) -> None:
        """Order the training samples by class, so that those of one class, or of all others, can be drawn."""
        labels = pair.sample_labels
        if labels is None or len(labels) != self.num_samples:
            raise UsageError(
                f"crd.mode={self.mode} chooses samples by class and needs the label of every training "
                'image, which is not known here: use --kd-kwargs crd.mode=instance, or give '
                'sample_labels to create_distill_task.')
        if (labels < 0).any() or len(labels.unique()) < 2:
            raise UsageError(
                f'crd.mode={self.mode} needs training labels of two or more classes, numbered from 0: '
                'use --kd-kwargs crd.mode=instance.')
        count = torch.bincount(labels)
        self.register_buffer('labels', labels.clone(), persistent=False)
        self.register_buffer('by_class', torch.argsort(labels, stable=True), persistent=False)
        self.register_buffer('class_count', count, persistent=False)
        self.register_buffer('class_start', count.cumsum(0) - count, persistent=False)

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        assert student.pre_logits is not None and teacher.pre_logits is not None
        if teacher.indices is None:
            raise ValueError('CRD needs the indices of the samples.')
        student_embedding = _embed(self.embed_student, student.pre_logits)
        teacher_embedding = _embed(self.embed_teacher, teacher.pre_logits.detach())
        contrasted = self.draw(teacher.indices)
        return {'crd_loss': self.contrast(student_embedding, teacher_embedding, teacher.indices, contrasted)}

    @torch.no_grad()
    def draw(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the samples that each of a batch is contrasted with, [B, K + 1], the positive first."""
        size, device = (len(indices), self.negatives), indices.device
        if self.mode == 'instance':
            draws = torch.randint(self.num_samples - 1, size, device=device)
            return torch.cat([indices[:, None], draws + (draws >= indices[:, None])], 1)
        label = self.labels[indices]
        start, count = self.class_start[label][:, None], self.class_count[label][:, None]
        draws = torch.randint(_MANY, size, device=device) % (self.num_samples - count)
        negatives = self.by_class[draws + (draws >= start) * count]  # positions of the own class are jumped over
        positive = indices[:, None]
        if self.mode == 'relax':
            positive = self.by_class[start + torch.randint(_MANY, (len(indices), 1), device=device) % count]
        return torch.cat([positive, negatives], 1)

    def contrast(
            self,
            student: torch.Tensor,
            teacher: torch.Tensor,
            indices: torch.Tensor,
            contrasted: torch.Tensor,
    ) -> torch.Tensor:
        """Return the loss of embeddings [B, D] against samples [B, K + 1]; in training, put them into the banks."""
        num_negatives, counts = contrasted.shape[1] - 1, None
        if self.num_samples <= _COUNTED * num_negatives:
            counts = count_draws(contrasted[:, 1:], self.num_samples, student.dtype)
        with torch.autocast(student.device.type, enabled=False):
            positives, negatives = zip(
                self._score(student, self.teacher_bank, contrasted, counts is not None),
                self._score(teacher, self.student_bank, contrasted, counts is not None))
        self._set_partition(torch.stack(positives).detach(), torch.stack(negatives).detach(), counts, num_negatives)
        log_partition = self.log_partition.clone()  # may be changed before the backward pass
        if self.training:
            self._update_banks(student.detach(), teacher.detach(), indices)
        loss: Any = sum(
            contrastive_loss(positive - log_z, negative - log_z, num_negatives, self.num_samples, counts)
            for positive, negative, log_z in zip(positives, negatives, log_partition))
        return loss

    def _score(
            self,
            embedding: torch.Tensor,
            bank: torch.Tensor,
            contrasted: torch.Tensor,
            with_all: bool,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return the scores of the positives, [B], and of the negatives, [B, K], or with all samples, [B, n]."""
        positive = similarities(embedding, bank, contrasted[:, :1]).squeeze(1)
        if with_all:
            negatives = embedding @ bank.to(embedding.dtype, copy=True).T  # the bank changes before the backward pass
        else:
            negatives = similarities(embedding, bank, contrasted[:, 1:])
        return positive / self.temperature, negatives / self.temperature

    def _set_partition(
            self,
            positives: torch.Tensor,
            negatives: torch.Tensor,
            counts: Optional[torch.Tensor],
            num_negatives: int,
    ) -> None:
        """Set Z on the first batch, to n times the mean of exp(scores) over all ranks; it is never changed again.

        Args:
            positives: Scores of both models, [2, B].
            negatives: Likewise, [2, B, M].
            counts: How often each of the negatives counts, [B, M]; once where it is None.
            num_negatives: K, how many count for each sample.
        """
        drawn = negatives if counts is None else negatives + counts.log()
        scores = torch.cat([positives, drawn.flatten(1)], 1)
        batch = scores.logsumexp(1) - math.log(positives.shape[1] * (num_negatives + 1))
        ranks = _gather(batch[None])  # [ranks, 2]
        batch = ranks.logsumexp(0) - math.log(len(ranks)) + math.log(self.num_samples)
        unset = self.log_partition.isnan()
        self.log_partition.copy_(torch.where(unset, batch.to(self.log_partition.dtype), self.log_partition))

    def _update_banks(self, student: torch.Tensor, teacher: torch.Tensor, indices: torch.Tensor) -> None:
        """Move the rows of a batch, of all ranks, towards its embeddings. A sample that comes twice counts once."""
        indices = _gather(indices)
        last = last_of_equals(indices)  # so that equal indices write equal rows, in whatever order a device does
        for bank, embedding in ((self.student_bank, student), (self.teacher_bank, teacher)):
            new = _gather(embedding)[last]
            row = torch.lerp(new, bank[indices].to(new.dtype), self.momentum)
            bank.index_copy_(0, indices, F.normalize(row, eps=1e-6).to(bank.dtype))


def _embed(layer: nn.Linear, pre_logits: torch.Tensor) -> torch.Tensor:
    return l2_normalize(to_full_precision(layer(pre_logits.to(layer.weight.dtype))), eps=1e-6)


@torch.compiler.disable
def _gather_ranks(tensor: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate a tensor of all ranks, which have equal batches, in the order of the ranks."""
    distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return _gather_ranks(tensor) if distributed else tensor
