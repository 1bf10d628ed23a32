import networkx as nx
import pytest
import torch

from bdh.inspect import graphs, neuron_graph

from .conftest import H, N


@pytest.mark.parametrize("max_scores", [2**24, 3 * N])
def test_edges_are_the_strongest_pairs(model, monkeypatch, max_scores):
    monkeypatch.setattr(graphs, "_MAX_SCORES", max_scores)
    found = neuron_graph(model, 1, mean_degree=4)
    given = model.decoder.weight.detach().T.unflatten(0, (H, N))[1]
    driven = model.encoder.weight.detach().unflatten(0, (H, N))[1]
    centred = given - given.mean(1, keepdim=True)  # as the layer norm does it
    product = centred @ driven.T
    pairs = sorted(((max(product[i, j], product[j, i]).item(), i, j) for i in range(N) for j in range(i)), reverse=True)
    assert len(found.edges) == 2 * N
    assert [set(edge) for edge in found.edges.tolist()] == [{i, j} for _, i, j in pairs[: 2 * N]]
    assert found.weights.tolist() == pytest.approx([weight for weight, _, _ in pairs[: 2 * N]])


def test_modularity_is_newmans_and_depends_on_the_seeds_alone(model):
    found = neuron_graph(model, 2, mean_degree=5, num_random=3, seed=4)
    assert sorted(neuron for each in found.communities for neuron in each) == list(range(N))
    place = {neuron: number for number, each in enumerate(found.communities) for neuron in each}
    edges, num_edges = found.edges.tolist(), len(found.edges)
    within = sum(place[i] == place[j] for i, j in edges) / num_edges
    degrees = [0] * len(found.communities)
    for neuron in (end for edge in edges for end in edge):
        degrees[place[neuron]] += 1
    assert found.modularity == pytest.approx(within - sum((each / (2 * num_edges)) ** 2 for each in degrees))
    again = neuron_graph(model, 2, mean_degree=5, num_random=3, seed=4)
    assert (again.modularity, again.random_modularities) == (found.modularity, found.random_modularities)
    assert again.communities == found.communities
    mean, spread = torch.tensor(found.random_modularities).double().mean(), found.random_spread
    assert spread == pytest.approx(torch.tensor(found.random_modularities).double().std().item())
    assert found.z_score == pytest.approx((found.modularity - mean.item()) / spread)


def test_random_graphs_have_the_same_degrees(model, monkeypatch):
    seen = []
    divided = graphs._divided
    monkeypatch.setattr(graphs, "_divided", lambda graph, seed: seen.append(graph) or divided(graph, seed))
    neuron_graph(model, 0, num_random=3)
    first, *others = seen
    assert len(others) == 3
    for other in others:
        assert dict(other.degree) == dict(first.degree)
        assert len({*map(frozenset, other.edges)} & {*map(frozenset, first.edges)}) < 0.5 * len(first.edges)
    assert not nx.utils.graphs_equal(others[0], others[1])


def test_communities_that_the_weights_make_are_found(model):
    """A model whose neurons excite those of their own third."""
    with torch.no_grad():
        group = torch.arange(N) % 3
        directions = torch.zeros(N, model.config.n_embd, dtype=torch.float64)
        directions[torch.arange(N), 1 + group] = 1
        model.encoder.weight[:N] = directions + 0.1 * model.encoder.weight[:N]
        model.decoder.weight[:, :N] = directions.T + 0.1 * model.decoder.weight[:, :N]
    found = neuron_graph(model, 0, mean_degree=6)
    groups = {neuron: number for number, each in enumerate(found.communities) for neuron in each}
    assert all(group[i] == group[j] for i, j in found.edges.tolist())
    assert len({(groups[i], int(group[i])) for edge in found.edges.tolist() for i in edge}) >= 3
    assert found.modularity > 0.6
    assert found.z_score > 5


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"head": 3}, r"head is 3: must be within -3 to 2"),
        ({"mean_degree": 0.01}, r"mean_degree is 0.01: must be within 0.0455 and 43"),
        ({"mean_degree": 44}, r"must be within 0.0455 and 43, for 44 neurons"),
        ({"mean_degree": 43}, r"must be at most \d+.*, since no other weights are above 0"),
        (
            {"mean_degree": 0.0455},
            r"no random graph with the same degrees \(1 edge\) was found: .* Give another mean_degree",
        ),
        ({"num_random": 1}, r"num_random is 1: must be at least 2"),
    ],
)
def test_what_is_wrong_is_said(model, choice, message):
    with pytest.raises(ValueError, match=message):
        neuron_graph(model, **{"head": 0, **choice})


def test_a_layer_that_is_more_than_its_weights_is_refused(model):
    model.encoder.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="do not determine what the layer computes: a layer has hooks"):
        neuron_graph(model, 0)
