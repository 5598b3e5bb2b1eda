"""The main job on a real denoiser: ``python -m demo`` (``--quick`` for a shorter run)."""

import os

# Importing diffusers' pipelines makes transformers ask for torchvision, which nothing here uses.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
