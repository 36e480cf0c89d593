"""Asymmetric Patch Sampling (arXiv 2306.02854): pretraining, evaluation and transfer as one pipeline."""

__version__ = "0.2.0"
