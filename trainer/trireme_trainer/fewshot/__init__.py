"""Few-shot sequence learning by alternating minimisation (TAM, arXiv 2012.09543): a task is an input token whose
embedding is optimised on the fly, the weights are what all tasks share.

A reconstruction from the paper's abstract and a secondary summary: the authors' code, task generators, sizes and
learning rates are not public or were not read. What is ours is said where it stands.
"""
