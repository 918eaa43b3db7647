"""Functions that score answers by rules, ready to be named in a configuration: see docs/scores.md.

    model: "python:beaver_ray/rules/text.py:over_length(budget=200)"

Each takes the prompts, the answers and what its keywords name, and returns a number for each answer. Light to import:
no torch.
"""
