"""Measures the modularity of the graph that the weights define between the neurons of a head.

The paper (arXiv 2509.26507) treats the product of decoder and encoder as a graph between neurons, and finds it modular.
Modularity is that of Newman (Newman and Girvan, Physical Review E 69, 026113, 2004): the fraction of edges within
communities, minus the fraction expected for random edges between nodes of the same degrees. The best partition of a
random graph also has a modularity far above 0, so that the figure is meaningless by itself. It is therefore compared
with that of graphs whose edges are randomly swapped, with the same degrees (Maslov and Sneppen, Science 296, 910,
2002), and which are partitioned in the same way.
"""

import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch

from bdh.inspect.tracing import chosen
from bdh.model.weights import checked_layer_weights
from bdh.ops.attention import sum_dtype
from bdh.ops.backends import LayerWeights
from bdh.words import counted

_MAX_SCORES = 2**24  # the most pairs of neurons whose scores are computed at once
_SWAPS_PER_EDGE = 10


@dataclass(frozen=True, eq=False)
class NeuronGraph:
    """The result of :func:`neuron_graph`."""

    head: int
    num_neurons: int
    edges: torch.Tensor
    """Int64 (E, 2): the two neurons of each edge, the strongest edge first."""
    weights: torch.Tensor
    """(E,): the weights of the edges."""
    communities: tuple[tuple[int, ...], ...]
    """The neurons of each community, the largest first. A neuron without edges is a community of its own."""
    modularity: float
    random_modularities: tuple[float, ...]
    """The modularities of random graphs with the same degrees."""

    @property
    def random_mean(self) -> float:
        return statistics.fmean(self.random_modularities)

    @property
    def random_spread(self) -> float:
        """The standard deviation of the modularities of the random graphs."""
        return statistics.stdev(self.random_modularities)

    @property
    def z_score(self) -> float:
        """The modularity's distance from the mean of the random graphs, in standard deviations; NaN if these are 0."""
        return (self.modularity - self.random_mean) / self.random_spread if self.random_spread else math.nan


def neuron_graph(
    model: Any, head: int, *, mean_degree: float = 8.0, num_random: int = 10, seed: int = 0
) -> NeuronGraph:
    """Builds the graph of the strongest connections between the neurons of a head, and measures its modularity.

    When neuron j fires, it adds row j of Dec to the residual stream. In the next layer step, neuron i is driven by the
    product of this row and row i of E, whose mean is subtracted as the layer norm would. Two neurons share an edge if
    the stronger of their two directions is among the strongest overall; only excitatory (positive) connections count.

    Args:
        model: a model whose layer consists of plain weights (no hooks or other modules).
        head: the head.
        mean_degree: the mean number of edges of a neuron, which determines how many of the strongest edges are kept.
        num_random: the number of random graphs to compare with.
        seed: the seed of the random graphs and of the search for communities (Louvain's method).

    Raises:
        ValueError: a number is out of range, the layer computes more than products with its weights, or there are too
            few edges to swap.
    """
    import networkx as nx

    (head,) = chosen("head", head, model.config.n_head, "head")
    of_layer = checked_layer_weights(model, sum_dtype(model.dtype))
    if num_random < 2:
        raise ValueError(f"num_random is {num_random}: must be at least 2, to estimate their spread")
    N = model.config.neurons_per_head
    num_edges = round(N * mean_degree / 2)
    if not 1 <= num_edges <= N * (N - 1) // 2:
        raise ValueError(f"mean_degree is {mean_degree}: must be within {2 / N:.3g} and {N - 1}, for {N} neurons")
    weights, edges = _strongest_edges(of_layer, slice(head * N, (head + 1) * N), num_edges)
    if weights[-1] <= 0:
        num_positive = int((weights > 0).sum())
        raise ValueError(
            f"mean_degree is {mean_degree}: must be at most {2 * num_positive / N:.3g}, since no other weights "
            "are above 0"
        )
    graph: Any = nx.Graph()
    graph.add_nodes_from(range(N))
    graph.add_edges_from(edges.tolist())
    communities, modularity = _divided(graph, seed)
    random_modularities = tuple(_divided(_swapped(graph, each), each)[1] for each in range(seed, seed + num_random))
    return NeuronGraph(head, N, edges, weights, communities, modularity, random_modularities)


def _swapped(graph: Any, seed: int) -> Any:
    """Returns a random graph with the same degrees."""
    import networkx as nx

    swapped, swaps = graph.copy(), _SWAPS_PER_EDGE * graph.number_of_edges()
    try:
        return nx.double_edge_swap(swapped, nswap=swaps, max_tries=100 * swaps, seed=seed)
    except nx.NetworkXException as error:
        edges = counted(graph.number_of_edges(), "edge")
        raise ValueError(
            f"no random graph with the same degrees ({edges}) was found: {error} Give another mean_degree"
        ) from error


def _divided(graph: Any, seed: int) -> tuple[tuple[tuple[int, ...], ...], float]:
    """Returns the communities of a graph, and their modularity."""
    from networkx.algorithms import community

    found = community.louvain_communities(graph, seed=seed)
    ordered = sorted((tuple(sorted(each)) for each in found), key=lambda each: (-len(each), each))
    return tuple(ordered), community.modularity(graph, found)


def _strongest_edges(weights: LayerWeights, neurons: slice, num_edges: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the weights (E,) and pairs of neurons (E, 2) of the strongest edges, on the CPU, the strongest first.

    The pairs are computed in blocks, to save memory.
    """
    given, driven = weights.decoder[neurons], weights.encoder[neurons]  # (N, D) each
    N = len(given)
    driven = driven - driven.mean(-1, keepdim=True)
    strongest, places = given.new_empty(0), torch.empty(0, dtype=torch.int64, device=given.device)
    columns = torch.arange(N, device=given.device)
    for rows in columns.split(max(1, _MAX_SCORES // N)):
        scores = torch.maximum(given[rows] @ driven.T, driven[rows] @ given.T)
        scores = scores.masked_fill(columns <= rows[:, None], -torch.inf).flatten()  # each pair once
        best, found = scores.topk(min(num_edges, len(scores)))
        strongest, order = torch.cat([strongest, best]).sort(descending=True)
        places = torch.cat([places, found + rows[0] * N])[order]
        strongest, places = strongest[:num_edges], places[:num_edges]
    return strongest.cpu(), torch.stack([places // N, places % N], 1).cpu()
