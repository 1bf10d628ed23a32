"""The block backend: a layer step as a differentiable function that saves no neuron-wide activations for backward."""
