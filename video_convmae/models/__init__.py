"""The encoder, and the two models that stand on it: the autoencoder and the classifier."""
