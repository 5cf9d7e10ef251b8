"""The parts of benchmarks/offloaded_tables.py, each by itself: what is served, from where, and how it is timed."""
