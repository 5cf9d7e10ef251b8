"""Using a trained model: generation from token ids and from text."""

from engram.inference.generate import generate, stream
from engram.inference.sampling import Sampling

__all__ = ["Sampling", "generate", "stream"]
