"""Autoencoders for others: a folder as the Hugging Face Hub and SAELens want it, its upload."""
