"""Prompts that elicit harm: how attacks are made of seeds, and which of those that were tried are kept."""
