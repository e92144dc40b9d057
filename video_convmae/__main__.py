"""`python -m video_convmae COMMAND ...`."""

import sys

from video_convmae.cli import main

sys.exit(main())
