"""Pretraining of nnU-Net's networks without labels by Consistent View Alignment (arXiv 2509.13846)."""

__version__ = "0.1.0"
