"""Activations of a language model in chunks of rows: harvested onto the disk or into memory, or
computed when asked for."""
