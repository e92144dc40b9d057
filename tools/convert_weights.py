"""`video-convmae convert`, from a clone."""

import sys

from video_convmae.cli import main

sys.exit(main("convert"))
