"""t-SNE: against loops, autograd, and clusters that are known."""

import math

import pytest
import torch

from retina.figures import tsne


def test_affinities_by_loops():
    """Each point's own distribution has the entropy that was asked for; found here by trying ever finer precisions."""
    torch.manual_seed(0)
    x, perplexity = 5 * torch.randn(9, 4, dtype=torch.float64), 3.5
    own = torch.zeros(9, 9, dtype=torch.float64)
    for i in range(9):
        gaps = {j: float((x[i] - x[j]).square().sum()) for j in range(9) if j != i}

        def row(precision, gaps=gaps):
            least = min(gaps.values())
            weights = {j: math.exp(-precision * (gap - least)) for j, gap in gaps.items()}
            return {j: w / sum(weights.values()) for j, w in weights.items()}

        def spread(precision, row=row):
            return 2 ** -sum(p * math.log2(p) for p in row(precision).values() if p > 0)

        precision = min((10 ** (k / 2000) for k in range(-10000, 6000)), key=lambda p: abs(spread(p) - perplexity))
        for j, p in row(precision).items():
            own[i, j] = p
    found = tsne.affinities(x, perplexity)
    torch.testing.assert_close(found, (own + own.T) / 18, rtol=0.01, atol=1e-6)
    assert float(found.sum()) == pytest.approx(1) and found.diag().eq(0).all() and torch.equal(found, found.T)


def test_affinities_do_not_depend_on_the_unit_and_bear_copies():
    x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(tsne.affinities(1e6 * x, 5), tsne.affinities(x, 5))
    x[1:8] = x[0]  # eight photographs that are one
    assert tsne.affinities(x, 5).isfinite().all() and tsne.tsne(torch.zeros(6, 3), 2, steps=20).isfinite().all()


def test_gradient_is_that_of_the_divergence():
    torch.manual_seed(2)
    p = tsne.affinities(torch.randn(30, 6), 8)
    y = torch.randn(30, 2, dtype=torch.float64, requires_grad=True)
    by_autograd, = torch.autograd.grad(tsne.divergence(p, y), y)
    torch.testing.assert_close(tsne.gradient(p, y.detach()), by_autograd, rtol=1e-9, atol=1e-14)


def test_divergence_by_loops():
    torch.manual_seed(3)
    p, y = tsne.affinities(torch.randn(7, 2), 3), torch.randn(7, 2, dtype=torch.float64)
    kernel = {(i, j): 1 / (1 + float((y[i] - y[j]).square().sum())) for i in range(7) for j in range(7) if i != j}
    q = {pair: k / sum(kernel.values()) for pair, k in kernel.items()}
    assert float(tsne.divergence(p, y)) == pytest.approx(sum(float(p[c]) * math.log(float(p[c]) / q[c]) for c in q))


def test_neighbours_of_known_clusters_stay_together():
    """Eight clusters that overlap in no dimension alone: all neighbours in the map are of one cluster; the start's are

    not, so that the test can fail; and the descent went down.
    """
    generator = torch.Generator().manual_seed(4)
    cluster = torch.arange(8).repeat_interleave(25)
    x = 0.9 * torch.randn(8, 40, generator=generator)[cluster] + 0.5 * torch.randn(200, 40, generator=generator)

    def pure(y):
        near = tsne.squared_distances(y.double()).fill_diagonal_(math.inf).topk(5, largest=False).indices
        return float((cluster[near] == cluster[:, None]).double().mean())

    start, end = (tsne.tsne(x, 15, 0, steps) for steps in (0, 500))
    p = tsne.affinities(x, 15)
    assert pure(end) > 0.98 and pure(start) < 0.3
    assert tsne.divergence(p, end) < 0.5 * tsne.divergence(p, start)
    assert end.mean(0).abs().max() < 1e-3


def test_the_seed_decides():
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(5))
    first, again, other = (tsne.tsne(x, 5, seed, 60) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=0.1)


@pytest.mark.parametrize("perplexity", [0.5, 9, 30])
def test_a_perplexity_that_cannot_be(perplexity):
    with pytest.raises(ValueError, match=f"a perplexity of {perplexity:g} for 10 points; expected at least 1 and less "
                                         "than 9"):
        tsne.affinities(torch.randn(10, 3), perplexity)
