"""Make a data list from a data set's own annotation and the folder that holds its files.

    video-convmae make-list kinetics400 --annotation train.csv --root videos --out k400_train.txt
    video-convmae make-list ssv2 --annotation train.json --root 20bn-something-something-v2 --out ssv2_train.txt
    video-convmae make-list ucf101 --splits ucfTrainTestlist --part train --root UCF-101 --out ucf_train.txt
    video-convmae make-list hmdb51 --splits testTrainMulti_7030_splits --part train --root hmdb51 --out hmdb_train.txt
    video-convmae make-list folders --root my_videos --out mine.txt
    video-convmae make-list webdataset --root shards --out train.txt
    video-convmae make-list folders --root clips --part train --validation-fraction 0.2 --group '(.*)_c' --out train.txt

Writes the list (`path label`, paths relative to --root), its class names (train.txt -> train.labels.txt) and, if there
are any, the names of annotated files that are not on the disk (train.missing.txt). Files are found by name anywhere
under --root, so flat folders and class folders both work; links are followed. With --format frames each folder that
holds pictures is a record (`folder count label`). No video is opened: check-videos does that.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from video_convmae.atomic import refuse_overwriting
from video_convmae.cli.parser import SEED, CommandLine, within
from video_convmae.data.folders import SUFFIXES, Tree, scan_folder
from video_convmae.data.labels import labels_file
from video_convmae.prepare import lists
from video_convmae.prepare.annotations import read_hmdb51, read_kinetics400, read_ssv2, read_ucf101


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    args = _build_parser().parse_args(arguments)
    if args.dataset == "webdataset":
        return _list_shards(args)
    tree = scan_folder(args.root, args.kind)
    match args.dataset:
        case "kinetics400":
            listing = lists.match_files(read_kinetics400(args.annotation, args.labels), tree)
        case "ssv2":
            listing = lists.match_files(read_ssv2(args.annotation, args.labels), tree)
        case "ucf101":
            listing = lists.match_files(read_ucf101(args.splits, args.part, args.fold), tree)
        case "hmdb51":
            listing = lists.match_files(read_hmdb51(args.splits, args.part, args.fold), tree)
        case _:
            listing = lists.list_folders(tree, args.part, args.validation_fraction, args.seed, args.group)
    lists.write_listing(args.out, listing, tree, _annotation_files(args), getattr(args, "labels", None))
    print(_report(args.out, listing, tree))
    return 0


def _list_shards(args: argparse.Namespace) -> int:
    listing = lists.list_shards(args.root, args.kind, args.labels)
    refuse_overwriting([args.out, labels_file(args.out)], [] if args.labels is None else [args.labels])
    lists.write_list(args.out, listing.rows, listing.labels, args.kind, root=args.root)
    used = {label for _, label in listing.rows if label is not None}
    names = f", of {len(used)} classes" if used else ", without labels (no .cls beside them)"
    names += f" (names: {labels_file(args.out)})" if listing.labels else ""
    print(f"{len(listing.rows):,} listed in {args.out}{names}")
    print(f"{listing.unlisted:,} other files in the shards were not listed")
    return 0


def _annotation_files(args: argparse.Namespace) -> list[Path]:
    """Return the files that the command reads, besides a file of class names."""
    match args.dataset:
        case "kinetics400" | "ssv2":
            return [args.annotation]
        case "ucf101" | "hmdb51":
            return list(args.splits.iterdir())
    return []


def _build_parser() -> CommandLine:
    parser = CommandLine("make-list", __doc__)
    datasets = parser.add_subparsers(dest="dataset", required=True, metavar="DATASET")

    def add(name: str, text: str) -> CommandLine:
        dataset = datasets.add_parser(name, help=text, description=text)
        root = str if name == "webdataset" else Path  # shards may lie at a URL
        dataset.add_argument("--root", type=root, required=True, help="folder that holds the files, at any depth")
        dataset.add_argument("--out", type=Path, required=True, help="list to write")
        dataset.add_argument(
            "--format", dest="kind", choices=tuple(SUFFIXES), default="video", help="data.format (default video)"
        )
        return dataset

    for name, files, names in (
        ("kinetics400", "CSV file of the split (train.csv, val.csv)", "one class a line"),
        (
            "ssv2",
            "JSON file of the split (train.json, validation.json)",
            "the official labels.json, or one class a line",
        ),
    ):
        dataset = add(name, f"from the {files}")
        dataset.add_argument("--annotation", type=Path, required=True, help=files)
        dataset.add_argument("--labels", type=Path, help=f"class names: {names} (default: those shipped)")
    for name, folder in (("ucf101", "ucfTrainTestlist"), ("hmdb51", "testTrainMulti_7030_splits")):
        dataset = add(name, f"from the folder {folder}")
        dataset.add_argument("--splits", type=Path, required=True, help=f"folder {folder}")
        dataset.add_argument("--part", choices=("train", "test"), required=True, help="part to list")
        dataset.add_argument("--fold", type=int, choices=(1, 2, 3), default=1, help="official split (default 1)")
    dataset = add("webdataset", "from webdataset's shards (*.tar), whose .cls files hold the classes")
    dataset.add_argument("--labels", type=Path, help="names of numbered classes, one a line")
    dataset = add("folders", "from any tree with one folder a class")
    dataset.add_argument(
        "--part", choices=("all", "train", "validation"), default="all", help="part to list (default all)"
    )
    dataset.add_argument(
        "--validation-fraction",
        type=within(float, least=0, below=1),
        default=0.0,
        help="share of each class that is not in train (default 0)",
    )
    dataset.add_argument("--seed", type=SEED, default=0, help="seed of the split (default 0)")
    dataset.add_argument(
        "--group",
        metavar="PATTERN",
        help="regular expression: files in whose paths it finds the same text, or the same text in its brackets, come "
        "from one recording and stay in one part, as '(.*)_c' for take2_c01.mp4 and take2_c02.mp4",
    )
    return parser


def _report(out: Path, listing: lists.Listing, tree: Tree) -> str:
    """Return a message: the files that were listed, and those that were not."""
    used = {label for _, label in listing.rows if label is not None}
    lines = [f"{len(listing.rows):,} listed in {out}, of {len(used)} classes (names: {labels_file(out)})"]
    if used and len(used) < len(listing.labels):
        lines.append(f"{len(listing.labels) - len(used)} of the {len(listing.labels)} classes have no record here")
    if listing.missing:
        names = f"their names: {lists.missing_file(out)}"
        lines.append(f"{len(listing.missing):,} in the annotation are missing under {tree.root} ({names})")
    else:
        lines.append("0 missing")
    lines.append(f"{listing.unlisted:,} files under {tree.root} were not listed")
    if listing.repeated:
        quoted = lists.quote_names(listing.repeated)
        lines.append(f"{len(listing.repeated):,} exist more than once, the first was taken: {quoted}")
    if tree.others:
        others = ", ".join(f"{suffix} {count:,}" for suffix, count in tree.others.most_common(8))
        lines.append(f"{sum(tree.others.values()):,} files of other kinds were skipped ({others})")
    lines += listing.notes
    return "\n".join(lines)
