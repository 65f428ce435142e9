"""Steps autoencoders of all sizes and families on a GPU: library GEMMs, kernels around them."""
