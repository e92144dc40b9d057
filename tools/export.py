"""`video-convmae export`, from a clone."""

import sys

from video_convmae.cli import main

if __name__ == "__main__":  # loading processes started by spawn import this file
    sys.exit(main("export"))
