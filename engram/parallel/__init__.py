"""Parallelism for a finished model, applied from outside: data, experts and memory tables over many processes."""
