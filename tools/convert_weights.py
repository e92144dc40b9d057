"""`video-convmae convert`, or `inflate` if that is the first argument, from a clone."""

import sys

from video_convmae.cli import main

sys.exit(main() if sys.argv[1:2] == ["inflate"] else main("convert"))
