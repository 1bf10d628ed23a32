"""The wide part of a pass as one differentiable function that keeps nothing wide for the backward pass."""
