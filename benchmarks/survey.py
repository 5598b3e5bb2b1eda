"""The 99 methods of the survey and its follow-ups, each with the recipes that it is, or why it is none.

``SURVEY`` is keyed by the number of the row in the list of methods that this project started from. A row whose recipes
leave something out says what. A row without a recipe says what it would need that a rewritten denoiser does not have,
and what comes nearest here. ``recipes`` may name some that are still to come: the page shows those that exist.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One published method: the recipes that it is, what they leave out (or why there is none), what is nearest."""

    title: str
    recipes: tuple[str, ...] = ()
    reason: str = ""
    nearest: str = ""


_TRAINING = "its weights come from training, for each model anew; calibration here only measures"
_SCHEDULER = "it changes the sampler's time grid or step size, which no rewrite of the denoiser can do"
_REQUESTS = "it reuses results of other requests by the likeness of their prompts: a server's cache, not a denoiser's"
_CHUNKS = "its state belongs to chunks of an autoregressive video and their keys and values, not to steps"
_SPARSE = "it needs attention kernels for sparse or windowed patterns; a recipe chooses values, not kernels"

SURVEY: dict[int, Row] = {
    1: Row("DeepCache", ("deepcache",)),
    2: Row(
        "FasterDiffusion",
        ("faster_diffusion",),
        "decoding several steps in one batch and the injected noise: both are the sampler's",
    ),
    3: Row("FORA", ("fora",)),
    4: Row("Delta-DiT", ("delta_dit",)),
    5: Row("PAB", ("pab",), "its broadcast over several GPUs, and the hand-made lists for feed-forwards"),
    6: Row("T-GATE", ("t_gate",)),
    7: Row("TeaCache", ("teacache",)),
    8: Row(
        "LazyDiT",
        ("lazydit",),
        "its gates are trained with the model; here they are fitted by least squares in calibration",
        "learning_to_cache",
    ),
    9: Row("MagCache", ("magcache",)),
    10: Row("EasyCache", ("easycache",)),
    11: Row("Block Caching", ("block_caching",), "the scale and shift that it learns afterwards"),
    12: Row("AdaCache", ("adacache",), "motion regularisation"),
    13: Row("FBCache", ("fbcache",)),
    14: Row("DBCache, DBPrune", ("dbcache", "dbprune")),
    15: Row("Foresight", ("foresight",)),
    16: Row("TaylorSeer", ("taylorseer", "taylorseer_lite", "newton")),
    17: Row("AB-Cache", ("ab_cache",)),
    18: Row("HiCache", ("hicache",)),
    19: Row("FoCa", ("foca",), "the paper does not fix its equations: two of its readings are options"),
    20: Row("ToCa", ("toca",), "sums over attention maps, which fused attention does not show"),
    21: Row("DuCa", ("duca",)),
    22: Row("ClusCa", ("clusca",)),
    23: Row("SpeCa", ("speca",)),
    24: Row("OmniCache", ("omnicache",), "its noise filter, whose equations are not published"),
    25: Row("HyCa", ("hyca",)),
    26: Row(
        "ProfilingDiT", ("profiling_dit",), "telling blocks apart by attention masks; here by how much they change"
    ),
    27: Row("FreqCa", ("freqca",)),
    28: Row("SmoothCache", ("smoothcache",)),
    29: Row("FasterCache", ("fastercache", "fastercache_guided")),
    30: Row("Learning-to-Cache", ("learning_to_cache",), "training routers; the mask follows from calibration"),
    31: Row("HarmoniCa", ("harmonica",), "training routers; the mask follows from calibration and sensitivities"),
    32: Row("FRDiff", ("frdiff",), "mixing of scores, which is the sampler's"),
    33: Row("BlockDance", ("blockdance",), "the learned choice of steps for each prompt (BlockDance-Ada)"),
    34: Row(
        "UniCP",
        (),
        "published as an abstract: the rule of its error-aware window is not given, and its attention "
        "sliced by principal components needs a kernel of its own",
        "pab, and smoothcache for its window",
    ),
    35: Row("GOC", ("goc",), "the set of inflection steps"),
    36: Row(
        "EOC",
        (),
        "its code was never published and the paper gives no equations that fix the correction",
        "goc, scalingcache",
    ),
    37: Row(
        "ICC",
        (),
        "it corrects a cached layer by a low-rank product of that layer's weights with the change of its "
        "input: another operation for each layer instead of a weighted sum of history",
        "rfc follows the change of the input by its length",
    ),
    38: Row(
        "FEB-Cache",
        (),
        "its tables are given for one model alone, and its noise scaling against exposure bias is the sampler's",
        "smoothcache makes such tables for attention and feed-forward apart; steps takes any",
    ),
    39: Row("CacheQuant", ("cachequant",), "the part about quantisation, and its affine correction for each channel"),
    40: Row(
        "QuantCache",
        (),
        "caching, quantisation and pruning are chosen together; the code is not published",
        "any recipe on a quantised model, or history_dtype='int8'",
    ),
    41: Row("RAS", ("ras",), "keys and values of left-out tokens as old as the tokens themselves in every layer"),
    42: Row(
        "DaTo",
        (),
        "it drops tokens before attention and copies the rest back from the likest kept one: the "
        "sequence changes its length inside the block",
        "deepcache for its schedule, clusca for one token standing for a cluster, ecad for its search",
    ),
    43: Row("TokenCache", (), _TRAINING + " (which tokens to recompute is a network's)", "toca, duca, clusca"),
    44: Row("FastCache", ("fastcache", "fastcache_tokens"), "the learned linear map in place of reuse"),
    45: Row("AdaptiveDiffusion", ("adaptive_diffusion",)),
    46: Row(
        "SADA",
        (),
        "it extrapolates the clean image inside the sampler and needs the sampler's derivative to judge "
        "stability; " + _SCHEDULER,
        "adaptive_diffusion judges by the latent, vde and ab_cache forecast the output",
    ),
    47: Row(
        "Skip-DiT",
        (),
        "it is another architecture: long skips are added and the model trained again",
        "deepcache runs on the trained Skip-DiT as on any denoiser with skips",
    ),
    48: Row("TaoCache", ("taocache",), "known from its abstract: the direction that is left over is our reading"),
    49: Row(
        "MixCache",
        (),
        "the rule by which it chooses between step, guidance and block caches is not published",
        "fbcache, fastercache and the guidance recipes, each alone",
    ),
    50: Row(
        "PromptTea",
        ("dyncfgcache",),
        "how its threshold follows the prompt's complexity is not published",
        "teacache, whose polynomial is fitted to your prompts",
    ),
    51: Row("Chipmunk", (), _SPARSE, "fora and toca on the same layers"),
    52: Row("DiTFastAttn", (), _SPARSE + "; its sharing over steps is a recipe", "pab, smoothcache"),
    53: Row("ECAD", ("ecad",), "tables over layers; here over steps of one site"),
    54: Row(
        "InvarDiff", ("invardiff",), "quantiles over layers as well; sampled again where caches follow one another"
    ),
    55: Row(
        "X-Slim",
        (),
        "published as an abstract: its error indicators are not given",
        "dbcache with two thresholds is not one of its levels; toca refreshes tokens between full steps",
    ),
    56: Row("LeMiCa", ("lemica",), "a generation for every gap; here errors weighed by measured sensitivities"),
    57: Row("DiCache", ("dicache",)),
    58: Row("ERTACache", ("ertacache",), "its correction of the step size and of the output"),
    59: Row("BWCache", ("bwcache",)),
    60: Row("RFC", ("rfc",)),
    61: Row("ScalingCache", ("scalingcache",)),
    62: Row(
        "SortBlock",
        ("sortblock",),
        "its ranking needs all blocks' residuals at the step that it decides about; "
        "what is published does not say at which earlier one they are read",
        "foresight and dbprune decide for each block, profiling_dit ranks blocks in calibration",
    ),
    63: Row("ProCache", ("procache", "procache_tokens")),
    64: Row("Diffusion on Demand", (), _TRAINING, "learning_to_cache, lazydit"),
    65: Row(
        "Z-Cache",
        (),
        "it computes a later step first and goes back to redo those in between: the sampler has to be rewound",
        "ab_cache and taylorseer forecast without looking back",
    ),
    66: Row(
        "PreciseCache",
        (),
        "it runs the whole denoiser at a lower resolution to decide: another program, at sizes "
        "that the denoiser may not take",
        "fbcache and dicache decide from the first blocks, profiling_dit keeps calm blocks",
    ),
    67: Row("CEM", ("cem",)),
    68: Row("MeanCache", ("meancache",), "it works on the velocity after guidance; here each branch by itself"),
    69: Row("DPCache", ("dpcache",)),
    70: Row("Spectrum", ("spectrum",)),
    71: Row(
        "SenCache", ("sencache",), "its table needs the change of the output with the latent and with time", "teacache"
    ),
    72: Row("SeaCache", ("seacache",)),
    73: Row("SVD-Cache", ("svdcache",), "a basis found offline; here from the first computed value"),
    74: Row(
        "ResCa",
        ("resca",),
        "it mixes each order of the series with what freshly computed medoid tokens show, by "
        "the angle between both: weights for each cluster and order from values made at this very step",
        "clusca blends with fresh tokens of a cluster, tap chooses by token",
    ),
    75: Row("TAP", ("tap",)),
    76: Row(
        "TC-Padé",
        ("tcpade", "tc_pade"),
        "a quotient of two values element by element: no weighted sum of history, "
        "and unbounded where its denominator passes zero",
        "hicache_modes and resilphase for few steps",
    ),
    77: Row(
        "D2Cache",
        ("d2cache",),
        "its step sizes come from sums of TeaCache's polynomial at run time",
        "teacache decides by the same sums; taylorseer_lite forecasts by the same differences",
    ),
    78: Row("L2P", ("l2p",)),
    79: Row("VDE", ("vde",)),
    80: Row(
        "LESA", (), _TRAINING + " (a Kolmogorov-Arnold network for each stage)", "l2p fits its weights in closed form"
    ),
    81: Row(
        "DisCa",
        (),
        _TRAINING + " (two transformer blocks that predict features, with distillation)",
        "l2p, scalingcache",
    ),
    82: Row(
        "HetCache",
        (),
        "it needs the mask of an edit to tell tokens that are made from those that are context",
        "ras and toca choose tokens by what they do",
    ),
    83: Row("ARCache", (), _CHUNKS, "dicache has the same gate and predictor for one whole video"),
    84: Row("FlowCache", (), _CHUNKS, "teacache"),
    85: Row(
        "Astraea",
        (),
        "its budget of tokens for each step is found by evolution with their scores read from "
        "attention's log-sum-exp, which fused attention does not show",
        "toca with a share, duca, ecad",
    ),
    86: Row("RAPID3", (), _TRAINING + " (three policies by reinforcement)", "teacache, budcache"),
    87: Row("WorldCache", ("worldcache",)),
    88: Row("BudCache", ("budcache",), "its second stage, which learns the time grid"),
    89: Row(
        "NaviCache",
        ("navicache",),
        "the gains and the noise of its filter are not published",
        "easycache measures the same ratio at run time",
    ),
    90: Row("HiCache++", ("hicache_modes",)),
    91: Row("ResilPhase", ("resilphase",)),
    92: Row("OTCache", ("otcache",), "known from its abstract: how both ends are searched is our reading"),
    93: Row(
        "ReCache",
        (),
        "its policy over steps is learned by policy gradient from a reward",
        "budcache and ecad search the same tables by trying them out",
    ),
    94: Row(
        "TACache",
        ("tacache",),
        "known from its abstract alone: its thresholds and directions are not given",
        "vde takes the output apart in the same way",
    ),
    95: Row(
        "HSA",
        (),
        "each token has its own number of steps, so that the sampler holds tokens at different times; " + _SCHEDULER,
        "ras",
    ),
    96: Row(
        "SpectralCache",
        (),
        "published as an abstract: how the threshold follows the step and the bands is not given",
        "seacache for its gate, freqca for its bands",
    ),
    97: Row(
        "AdaCorrection",
        (),
        "it blends a reused value with the fresh one, which has to be computed for that: no "
        "work is saved at such sites",
        "foresight recomputes a block whose drift is large",
    ),
    98: Row(
        "RegionE",
        (),
        "it splits the picture by what an edit touches and lets both parts take different steps; " + _SCHEDULER,
        "ras",
    ),
    99: Row("Golden path (GPH)", ("golden_path", "published_table")),
}

# Methods that the survey's list of papers holds and the table above does not.
BEYOND: tuple[Row, ...] = (
    Row("Adaptive Guidance", ("adaptive_guidance",)),
    Row("FISEdit, Nirvana, FlexCache, MoDM", (), _REQUESTS, "none"),
    Row("Ca2-VDM", (), _CHUNKS, "none"),
    Row("ParaStep, LightningCP, PipeFusion", (), "they spread one generation over several devices", "none"),
    Row("RainFusion", (), _SPARSE, "pab"),
    Row("HERO", (), "it merges tokens inside the block, so that the sequence changes its length", "clusca"),
)
