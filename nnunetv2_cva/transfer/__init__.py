"""Weights from anywhere, made to fit any network that nnU-Net builds."""
