"""Quiet peers, and threads as few as the machine allows: the subjects are tiny."""

import logging
import os

import torch

os.environ["CACHE_DIT_LOG_LEVEL"] = "error"
torch.set_num_threads(1)
logging.getLogger("diffusers").setLevel(logging.ERROR)
