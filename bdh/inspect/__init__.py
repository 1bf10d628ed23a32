"""Looking inside a model: what it computes while it reads a text, and measurements of that and of the weights.

A measurement is a function, whose result is a frozen dataclass that holds its baseline: what the same figure is for an untrained
model, a random graph, or a text in random order.
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
