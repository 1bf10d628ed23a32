"""The mathematics, on plain tensors. ``naive`` is the ground truth of every faster form."""
