"""What package registries carry: a language model, and the documentation of Python."""
