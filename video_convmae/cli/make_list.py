from video_convmae.prepare.lists import main

__all__ = ["main"]
