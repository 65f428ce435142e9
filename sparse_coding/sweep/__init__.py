"""A grid of autoencoders on one stream of batches: cells, run folder, the loop, metrics."""
