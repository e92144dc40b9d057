"""Make one page of a run: what it is, whether it learned, its curves, clips, mistakes and configuration.

    video-convmae report runs/k400 --output report.html

The page is one file without scripts that needs no network. A run that is still going, or was interrupted, will do. Of a
pretraining it shows reconstructions; of a classifier the newest evaluation in the run folder (evaluate --output
RUN/test), or, without one, some records of the validation list.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from video_convmae.cli.parser import CommandLine, within


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    parser = CommandLine("report", __doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--output", type=Path, help="the page (default RUN/report.html)")
    parser.add_argument("--records", type=within(int, least=0), default=400, help="validation records of a classifier "
                        "without an evaluation that are classified; 0: none (default %(default)s)")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto (CUDA if available), cpu, cuda")
    args = parser.parse_args(arguments)

    from video_convmae.atomic import refuse_overwriting, write_text
    from video_convmae.engine.distributed import init_distributed
    from video_convmae.visualize.report import make_report
    from video_convmae.visualize.run_facts import files_read, read_run

    output = args.output or args.run / "report.html"
    run = read_run(args.run)
    refuse_overwriting([output], files_read(run))
    with init_distributed(args.device) as info:
        report = make_report(run, info, args.records)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, report.html, errors="xmlcharrefreplace")
    for title, reason in report.missing:
        print(f"not shown: {title}: {reason}")
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")
    return 0
