"""Anytime learning at macro scale (ALMA, arXiv 2106.09563): data arrives in large mega-batches, the learner is asked
for its best model after each one, and may wait, replay, or grow.

Setting, learners and metrics follow the released vision code (facebookresearch/alma) as described in its sources. The
paper's language-model experiment was never released: what serves it here is a reconstruction. What is ours is said
where it stands.
"""
