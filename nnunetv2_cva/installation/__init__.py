"""This installation: how nnU-Net finds our trainers, which there are, whether everything fits. Nothing slow is imported."""
