from video_convmae.prepare.check import main

__all__ = ["main"]
