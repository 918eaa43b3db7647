"""Pairs of answers for people to label, and back: export, guideline and page, agreement, import.

Four labels for each pair, named as in PKU-SafeRLHF: which answer is better, which is safer, and whether each is safe.
"""
