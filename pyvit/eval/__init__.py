"""Evaluation: nearest neighbours, linear probes, zero-shot classification, retrieval, visualisation."""
