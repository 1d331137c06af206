"""What every test gets: an environment without nnU-Net's variables, and the same random numbers every time."""

import os
import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def no_nnunet_variables(monkeypatch):
    """Tests depend on no ``nnUNet_*`` of the shell (or of an installed hook), and leave none behind."""
    for name in [n for n in os.environ if n.startswith("nnUNet_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """A test that fails fails again, whichever tests ran before it. ``CVA_TEST_SEED`` looks for unlucky numbers."""
    seed = int(os.environ.get("CVA_TEST_SEED", 0))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
