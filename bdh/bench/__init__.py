"""Measurements: each checks agreement first, then times, next to baselines that anyone can install."""
