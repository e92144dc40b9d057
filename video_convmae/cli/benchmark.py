from video_convmae.benchmark.main import main

__all__ = ["main"]
