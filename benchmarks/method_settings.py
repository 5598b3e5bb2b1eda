"""Settings at which every recipe is measured over 28 steps: the first is the middle one, others are faster or slower.

A recipe that is not listed is measured at its published defaults.
"""

from __future__ import annotations

from typing import Any

Settings = dict[str, Any]

SETTINGS: dict[str, list[Settings]] = {
    "uniform": [{"interval": 2}, {"interval": 3}, {"interval": 2, "predictor": "taylor", "order": 2}],
    "evenly": [{"computed": 11, "predictor": "newton", "order": 2}, {"computed": 8}, {"computed": 11}],
    "steps": [{"computed": (0, 1, 2, 3, 5, 7, 10, 13, 16, 19, 22, 25, 27)}],
    # timestep-adaptive
    "teacache": [{"threshold": 0.2}, {"threshold": 0.1}, {"threshold": 0.4}],
    "magcache": [{"threshold": 0.12}, {"threshold": 0.06}, {"threshold": 0.24}],
    "easycache": [{"threshold": 0.1}, {"threshold": 0.05}, {"threshold": 0.2}],
    "seacache": [{"threshold": 0.3}, {"threshold": 0.6}, {"threshold": 0.15}],
    "sencache": [{"main": 0.3}, {"main": 0.6}, {"main": 0.15}],
    "adaptive_diffusion": [{"theta": 0.1}, {"theta": 0.01}, {"theta": 0.3}],
    "dicache": [{"threshold": 0.4}, {"threshold": 0.2}, {"threshold": 0.8}],
    "fastcache": [{"scale": 0.01}, {"scale": 0.003}, {"scale": 0.03}],
    # layer-adaptive
    "block_caching": [{"threshold": 0.3}, {"threshold": 0.15}, {"threshold": 0.6}],
    "fbcache": [{"threshold": 0.12}, {"threshold": 0.06}, {"threshold": 0.25}],
    "dbcache": [
        {"front": 2, "back": 1, "warm_up": 4, "threshold": 0.12},
        {"front": 2, "back": 1, "warm_up": 4, "threshold": 0.25, "order": 1},
        {"front": 1, "back": 0, "warm_up": 4, "threshold": 0.12, "order": 2},
    ],
    "dbprune": [{"threshold": 0.1}, {"threshold": 0.05}, {"threshold": 0.2}],
    "foresight": [{"gamma": 1.0}, {"gamma": 0.5}, {"gamma": 4.0}],
    "bwcache": [{"threshold": 0.3}, {"threshold": 0.15}, {"threshold": 0.6}],
    "learning_to_cache": [{"share": 0.5}, {"share": 0.8}],
    "harmonica": [{"share": 0.5}, {"share": 0.8}],
    "lazydit": [{}, {"laziness": 0.8}],
    # static
    "deepcache": [{"interval": 3}, {"interval": 2}, {"interval": 5}],
    "fora": [{"interval": 3}, {"interval": 2}, {"interval": 5}],
    "delta_dit": [{"interval": 2}, {"interval": 3}],
    "smoothcache": [{"threshold": 0.15}, {"threshold": 0.08}, {"threshold": 0.3}],
    "blockdance": [{"interval": 2}, {"interval": 4, "start": 0.2}],
    "step_mask": [{"speed": "medium"}, {"speed": "slow"}, {"speed": "ultra", "order": 1}],
    "published_table": [{"name": "meancache-flux-13"}, {"name": "goldenpath-flux-9"}],
    "ertacache": [{"limit": 0.1}, {"limit": 0.2}],
    # predictive
    "taylorseer": [{"interval": 3, "order": 2}, {"interval": 5, "order": 1}, {"interval": 2, "order": 2}],
    "taylorseer_lite": [{"interval": 3, "order": 2}, {"interval": 5, "order": 1}, {"interval": 2, "order": 2}],
    "newton": [{"interval": 3, "order": 2}, {"interval": 5, "order": 1}],
    "ab_cache": [{"interval": 3}, {"interval": 6}],
    "hicache": [{"interval": 3}, {"interval": 6}],
    "hicache_modes": [{"interval": 2}, {"interval": 3}],
    "foca": [{"interval": 3}, {"interval": 5}],
    "spectrum": [{"growth": 0.75}, {"growth": 3.0}],
    "resilphase": [{"interval": 3}, {"interval": 6}],
    "l2p": [{"interval": 3}, {"interval": 5}],
    "scalingcache": [{"warm_up": 6}, {"warm_up": 3, "interval": 3}],
    "rfc": [{"threshold": 0.3}, {"threshold": 0.1}],
    "vde": [{"stable": 6, "interval": 3}, {"stable": 6, "interval": 5}],
    "freqca": [{"interval": 3}, {"interval": 6}],
    "svdcache": [{"interval": 3}, {"interval": 5}],
    "hyca": [{"interval": 3}, {"interval": 5}],
    # planned; trials are real generations
    "cem": [{"share": 0.4}, {"share": 0.3}],
    "dpcache": [{"share": 0.4}, {"share": 0.3}],
    "lemica": [{"share": 0.4}, {"share": 0.3}],
    "meancache": [{"share": 0.4}, {"share": 0.3}],
    "budcache": [{"share": 0.4, "max_trials": 40}],
    "golden_path": [{"share": 0.4, "max_trials": 40}],
    # guidance
    "t_gate": [{}, {"gate": 0.6}, {"gate": 0.25}],
    "fastercache_guided": [{"bands": False}, {}],
    "dyncfgcache": [{"threshold": 0.5}, {"threshold": 1.0}, {"threshold": 0.1}],
    "adaptive_guidance": [{"similarity": 0.9}, {"similarity": 0.97}, {"similarity": 0.8}],
    "ecad": [{"share": 0.4, "population": 6, "generations": 4}],
    "procache": [{"share": 0.4}],
}
