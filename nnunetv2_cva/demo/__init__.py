"""The demo: a small synthetic dataset, and what the package's users do with theirs, in a few minutes on a CPU."""
