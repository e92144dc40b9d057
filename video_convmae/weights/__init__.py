"""Weights in files: published formats to ours and back, image weights to video weights, loading into models."""
