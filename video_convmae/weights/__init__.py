"""Files of weights: published layouts into ours and back, image weights into video."""
