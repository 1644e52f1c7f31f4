"""Text to batches: tokenizers, sources, the corpus on disk, packing, objectives and the input pipeline."""
