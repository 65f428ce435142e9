"""Synthetic data whose features are known, and the post's figures."""
