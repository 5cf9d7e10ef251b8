"""Conditional computation: a router picks a few of many small feed-forward maps for each token."""

from engram.experts.experts import Experts
from engram.experts.layer import MoE
from engram.experts.routing import Router, RoutingStats
from engram.experts.swiglu import SwiGLU

__all__ = ["Experts", "MoE", "Router", "RoutingStats", "SwiGLU"]
