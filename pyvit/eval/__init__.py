"""Measuring what a network has learned: nearest neighbours, linear probes, zero-shot, retrieval; and looking at it."""
