"""The encoder and the models built on it: autoencoder, classifier, probe. sizes.py has their options, without torch."""
