"""Running trained models: tables off the device."""

from engram.inference.offload import offload, offload_from, offloaded_tables, read_stats, warm_caches

__all__ = ["offload", "offload_from", "offloaded_tables", "read_stats", "warm_caches"]
