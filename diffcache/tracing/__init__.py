"""Capture: one real forward of a denoiser, recorded as a torch.fx graph that is bit-exact or refused."""
