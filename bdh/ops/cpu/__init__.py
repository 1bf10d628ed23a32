"""Kernels for the CPU that touch only the neurons that fire."""
