"""Probes of frozen features against independent references."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from timm_distill.engine.probe import knn_accuracy, linear_probe_accuracy, mean_cosine, split_halves


def blobs(count: int, noise: float, seed: int = 0, classes: int = 5, width: int = 8) -> tuple:
    """Return features around the centre of each class, and labels."""
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    return centers[labels] + noise * torch.randn(count, width, generator=generator), labels


@pytest.mark.parametrize('block', [64, 1 << 24], ids=['in blocks', 'at once'])
def test_nearest_neighbours_vote_as_a_plain_loop_says(block: int) -> None:
    (x, y), (test_x, test_y) = blobs(60, 1.), blobs(40, 1., seed=1)
    right = 0
    for query, label in zip(test_x.double(), test_y):
        similar = F.cosine_similarity(query[None], x.double())
        order = similar.argsort(descending=True)[:20]
        votes = torch.stack([(similar[order] / 0.07).exp()[y[order] == c].sum() for c in range(5)])
        right += int(votes.argmax() == label)
    assert 50 < 100 * right / 40 < 100
    assert knn_accuracy(x, y, test_x, test_y, block=block) == 100 * right / 40


def test_fewer_images_than_neighbours_all_vote() -> None:
    x, y = torch.eye(3), torch.tensor([0, 1, 4])
    assert knn_accuracy(x, y, x, y) == 100


@pytest.mark.parametrize('block', [50, 1 << 24], ids=['in blocks', 'at once'])
def test_linear_probe_is_the_optimum_that_scikit_learn_finds(block: int) -> None:
    linear_model = pytest.importorskip('sklearn.linear_model')
    (x, y), (test_x, test_y) = blobs(120, 1.5), blobs(200, 1.5, seed=1)
    x[:, 0], test_x[:, 0] = 1e3 * x[:, 0], 1e3 * test_x[:, 0]  # its scale must not matter
    mean, std = x.mean(0), x.std(0, correction=0)
    reference = linear_model.LogisticRegression(C=1 / (1e-2 * len(x)), tol=1e-8, max_iter=1000)
    reference.fit(((x - mean) / std).double().numpy(), y.numpy())
    expected = 100 * np.mean(reference.predict(((test_x - mean) / std).double().numpy()) == test_y.numpy())
    assert 50 < expected < 100
    assert linear_probe_accuracy(x, y, test_x, test_y, decays=[1e-2], block=block) == pytest.approx(expected)


def test_linear_probe_chooses_a_weight_decay_that_suits_features_without_signal() -> None:
    (x, y), (test_x, test_y) = blobs(200, 1.5), blobs(1000, 1.5, seed=1)
    x, test_x = (torch.cat([f, torch.randn(len(f), 200, generator=torch.Generator().manual_seed(i))], 1) for i, f in (
        (2, x), (3, test_x)))
    chosen = linear_probe_accuracy(x, y, test_x, test_y)
    assert chosen > linear_probe_accuracy(x, y, test_x, test_y, decays=[1e-4])


def test_constant_features_and_classes_without_test_images_are_no_error() -> None:
    x, y = torch.ones(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    assert 0 <= linear_probe_accuracy(x, y, x[:2], y[:2]) <= 100
    assert 0 <= knn_accuracy(torch.zeros(6, 3), y, x[:2], y[:2]) <= 100


def test_halves_of_a_labelled_set_have_every_class_and_share_no_image() -> None:
    labels = torch.tensor([2, 0, 0, 2, 1, 0, 1, 2, 5])
    fit, test = split_halves(labels)
    assert sorted([*fit.tolist(), *test.tolist()]) == list(range(9))
    assert fit.tolist() == [0, 1, 4, 5, 7, 8] and test.tolist() == [2, 3, 6]


def test_mean_cosine_is_one_for_a_linear_map_of_any_width_and_nothing_for_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(400, 6, generator=generator)
    student = teacher @ torch.randn(6, 24, generator=generator) + 5
    assert mean_cosine(student, teacher + 9) > 0.99
    noise = torch.randn(400, 24, generator=generator)
    assert abs(mean_cosine(noise, teacher + 9)) < 0.1
    assert mean_cosine(student[:20], teacher[:20]) > 0.9  # fewer images than features
