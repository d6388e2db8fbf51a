"""From text to batches.

documents → tokenizer → prepare writes shards (manifest, shards) → Mixture decides which block is sample N (order) →
Batches gives each rank its share of a step. Only `batches` needs torch.
"""
