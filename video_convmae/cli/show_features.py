from video_convmae.visualize.features import main

__all__ = ["main"]
