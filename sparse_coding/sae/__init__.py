"""The sparse autoencoder, the ensemble that trains many at once, and its engines."""
