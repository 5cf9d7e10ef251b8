"""Everything a language model needs that is not memory or experts."""

from engram.backbone.context import extend_context
from engram.backbone.decoding import DecodingState
from engram.backbone.loss import mean_loss, token_losses
from engram.backbone.model import EngramLM, ModelOutput

__all__ = ["DecodingState", "EngramLM", "ModelOutput", "extend_context", "mean_loss", "token_losses"]
