"""The wide part of a layer step as one differentiable function that keeps nothing wide for the backward pass."""
