from video_convmae.visualize.reconstruct import main

__all__ = ["main"]
