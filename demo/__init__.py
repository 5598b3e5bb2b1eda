"""The main job on a real denoiser: ``python -m demo`` (``--quick`` for a shorter run)."""
