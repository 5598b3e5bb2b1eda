"""Agreement with other people's code on the same weights, sampler and seed: ``make agreement``, never part of CI."""
