"""A small text-conditional denoiser of handwritten digits: trained here, shipped here, runs anywhere."""
