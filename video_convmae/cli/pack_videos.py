from video_convmae.prepare.pack import main

__all__ = ["main"]
