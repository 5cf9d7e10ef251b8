"""Engram among others' models, weights and tools: each module is imported by its name, and asks for what it needs."""
