"""Shared set-up: one thread, for the tensors are tiny."""

import torch

torch.set_num_threads(1)
