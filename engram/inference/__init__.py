"""Using a trained model: generation from token ids and from text, and its memory tables off the device."""

from engram.inference.generate import generate, stream
from engram.inference.offload import offload, offload_from, offloaded_tables, read_stats, warm_caches
from engram.inference.sampling import Sampling

__all__ = [
    "Sampling",
    "generate",
    "offload",
    "offload_from",
    "offloaded_tables",
    "read_stats",
    "stream",
    "warm_caches",
]
