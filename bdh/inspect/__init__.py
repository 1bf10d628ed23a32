"""Interpretability: traces of what a model computes while it reads a text, and measurements of activations and weights.

Each measurement is a function that returns a frozen dataclass. The result includes its baseline: the same figure for an
untrained model, a random graph, or the text in random order.
"""

from bdh.inspect.firing import Concentration, Density, FiringShares, MassShares, concentration, density
from bdh.inspect.graphs import NeuronGraph, neuron_graph
from bdh.inspect.synapses import SynapseTrace, synapse_trace
from bdh.inspect.tracing import Trace, trace
from bdh.inspect.untrained import untrained_twin

__all__ = [
    "Concentration",
    "Density",
    "FiringShares",
    "MassShares",
    "NeuronGraph",
    "SynapseTrace",
    "Trace",
    "concentration",
    "density",
    "neuron_graph",
    "synapse_trace",
    "trace",
    "untrained_twin",
]
