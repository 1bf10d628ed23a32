"""Kernels for the processor that touch only the neurons that fire."""
