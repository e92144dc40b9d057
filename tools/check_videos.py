"""`video-convmae check-videos`, from a clone."""

import sys

from video_convmae.cli import main

sys.exit(main("check-videos"))
