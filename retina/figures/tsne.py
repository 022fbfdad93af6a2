"""t-SNE: points in many dimensions -> a map in two, in which near neighbours stay near. Exact, all pairs at once.

    affinities    how likely each point would pick each other one as its neighbour, at a given perplexity
    divergence    how badly a map keeps that: the Kullback-Leibler divergence that t-SNE descends
    gradient      of it with regard to the map
    tsne          gradient descent from a random start

van der Maaten & Hinton 2008, "Visualizing data using t-SNE", Journal of Machine Learning Research 9:2579. Read section
3 beside this file. Sizes of clusters and distances between them mean nothing in such a map; who is beside whom does.
"""

import math

import torch
from torch import Tensor


# n points, C dimensions


def squared_distances(x: Tensor) -> Tensor:
    """(n, C) -> (n, n), between all pairs."""
    square = x.square().sum(1)
    return (square[:, None] + square - 2 * x @ x.T).clamp(min=0)


def affinities(x: Tensor, perplexity: float) -> Tensor:
    """(n, C) -> joint probabilities P (n, n) that sum to 1, symmetric, 0 on the diagonal.

    ValueError: the perplexity, the effective number of a point's neighbours, is not between 1 and n - 1.
    """
    n = len(x)
    if not 1 <= perplexity < n - 1:
        raise ValueError(f"a perplexity of {perplexity:g} for {n} points; expected at least 1 and less than {n - 1}")
    distances = squared_distances(x.double())
    distances = distances / distances.mean().clamp(min=1e-300)  # the map does not depend on the unit of x
    distances.fill_diagonal_(math.inf)  # no point is its own neighbour
    # p_j|i = exp(-|x_i - x_j|^2 / 2 sigma_i^2) / sum_k ... , precision_i = 1 / 2 sigma_i^2                      (eq. 1)
    # found by halving, so that 2^entropy = perplexity for each i; the entropy falls with the precision   (section 2)
    low, high = torch.full((n, 1), -60.0, dtype=torch.float64), torch.full((n, 1), 60.0, dtype=torch.float64)
    for _ in range(64):
        middle = (low + high) / 2  # log2 of the precision
        p = (-distances * middle.exp2()).softmax(1)  # (n, n)
        flat = torch.special.entr(p).sum(1, keepdim=True) > math.log(perplexity)
        low, high = torch.where(flat, middle, low), torch.where(flat, high, middle)
    # P_ij = (p_j|i + p_i|j) / 2n                                                                         (section 3.1)
    return (p + p.T) / (2 * n)


def similarities(y: Tensor) -> tuple[Tensor, Tensor]:
    """Map (n, 2) -> kernel 1 / (1 + |y_i - y_j|^2), 0 on the diagonal, and Q, the kernel over its sum (eq. 4)."""
    kernel = (1 / (1 + squared_distances(y))).fill_diagonal_(0)
    return kernel, kernel / kernel.sum()


def divergence(p: Tensor, y: Tensor) -> Tensor:
    """KL(P || Q) = sum_ij P_ij log(P_ij / Q_ij), in nats (eq. 2, with the joint probabilities of section 3.1)."""
    _, q = similarities(y)
    return torch.where(p > 0, p * (p.clamp(min=1e-300) / q.clamp(min=1e-300)).log(), 0.0).sum()


def gradient(p: Tensor, y: Tensor) -> Tensor:
    """dKL / dy_i = 4 sum_j (P_ij - Q_ij) (y_i - y_j) / (1 + |y_i - y_j|^2): (n, n), (n, 2) -> (n, 2)   (eq. 5)."""
    kernel, q = similarities(y)
    pull = (p - q) * kernel  # (n, n), symmetric; negative: push
    return 4 * (pull.sum(1, keepdim=True) * y - pull @ y)


@torch.no_grad()
def tsne(x: Tensor, perplexity: float = 30.0, seed: int = 0, steps: int = 1000) -> Tensor:
    """(n, C) -> map (n, 2), centred. ValueError: see `affinities`.

    Algorithm 1 with the settings of section 3.4: momentum 0.5, from step 250 on 0.8; learning rate 100, adapted for
    each coordinate (Jacobs 1988, Neural Networks 1:295); for the first 50 steps P is four times too large ("early
    exaggeration"), which leaves clusters room to move past each other.
    """
    p = affinities(x, perplexity).float()
    y = 1e-2 * torch.randn(len(x), 2, generator=torch.Generator().manual_seed(seed))
    velocity, gains = torch.zeros_like(y), torch.ones_like(y)
    for step in range(steps):
        slope = gradient(4 * p if step < 50 else p, y)
        # a coordinate that keeps its direction goes faster, one that turns back slower
        gains = torch.where(slope.sign() == velocity.sign(), 0.8 * gains, gains + 0.2).clamp(min=0.01)
        velocity = (0.5 if step < 250 else 0.8) * velocity - 100 * gains * slope
        y = y + velocity
    return y - y.mean(0)
