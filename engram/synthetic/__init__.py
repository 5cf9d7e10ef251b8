"""Synthetic tasks: texts whose answers are known, to train on and to be asked for. No torch, no files."""
