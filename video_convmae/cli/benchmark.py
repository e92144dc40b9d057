"""Measure speed: `video-convmae benchmark`. Its files lie in tools/benchmark/ in a clone, in the package in a wheel."""

from video_convmae.benchmark.main import main

__all__ = ["main"]
