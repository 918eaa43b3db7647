"""Benchmarks of the system: each measures two sides in one run and gives every figure as a ratio too.

One file a benchmark; `measure` holds what they share, `registry` names them without importing anything heavy.
"""
