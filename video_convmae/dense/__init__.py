"""Detection and segmentation: models on the encoder's stages."""
