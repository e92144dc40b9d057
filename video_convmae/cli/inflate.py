"""Turn image weights into video weights."""

from collections.abc import Sequence

from video_convmae.cli import convert


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    convert.main(["inflate", *arguments])
