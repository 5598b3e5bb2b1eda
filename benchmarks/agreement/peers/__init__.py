"""Generations under the peers' own code, observed from outside.

One module per library; each function makes a new denoiser of a subject, lets the library change it, runs the sampler
and returns a ``Run``. What the library does, exactly, stands in the docstring of its function; where the library errs,
it says so, and ``test_faults.py`` shows it.
"""
