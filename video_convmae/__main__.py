"""`python -m video_convmae COMMAND ...`."""

import sys

from video_convmae.cli import main

if __name__ == "__main__":
    sys.exit(main())
