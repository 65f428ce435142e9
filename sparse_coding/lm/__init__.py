"""Language models: their texts, activations and the features found in them."""
