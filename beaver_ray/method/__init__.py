"""The method in plain torch and NumPy: losses, advantages, multipliers, calibration, signs of divergence.

Here and everywhere in the project a tensor or array has its axes as suffix of its name, a letter for each: `values_TH`
is [T, H].

    B  sequences (responses) of a batch, or pairs of them
    T  tokens, of all B sequences laid end to end without padding; mostly those of the responses
    U  such tokens of the second of two sets of sequences
    L  positions of a packed row; after B, of padded rows
    Q  positions of pairs laid end to end, each as long as its longer sequence; P those of them that are compared
    H  heads of a score model or critic
    V  words of the vocabulary
    N  samples
    G  groups: the prompts that the answers of a step are to
    E  episodes, as a multiplier counts them: answers, or all answers to a prompt together
    K  bins; 2 two columns

Names without a suffix (`offsets`, B + 1 integers) have their shape told where they are made.
"""
