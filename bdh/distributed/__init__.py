"""Distributed training: the process group, and the parallel strategies for a model."""
