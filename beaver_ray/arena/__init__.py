"""Policies beside one another: the same prompts, the same seeds, the same judges, and what can be said of it.

Everything but `options` takes arrays and knows no model. Axes: N prompts, K answers to each, M comparisons, G clusters
(prompts), P policies.
"""
