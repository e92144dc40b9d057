"""Write the features of every record of a list into one file, for retrieval, nearest neighbours or a classifier.

    video-convmae features --weights runs/k400 --list val.txt --root /data/k400 --output features
    torchrun --nproc_per_node 8 -m video_convmae features --weights base.pth --list val --kind tokens --output DIR

writes features.npz into the folder, and bad_records.jsonl if a record could not be read:

    features  (R, K) pooled, --pool says how, the mean over views; or (R, N, D) tokens (t, h, w in order), float32
    labels    (R,) -1 where the list has none
    records   (R,) paths
    failed    (R,) the record could not be read: its features are zeros
    about     JSON: weights, the place in the model where the features were read, views

    video-convmae features --weights runs/k400 --list videos.txt --window 16 --stride 4 --hop 8 --output features

reads videos of any length in windows, each video once and with a few frames in memory: a row of features.npz is a
window, windows.csv says where it lies (row, record, start_frame, end_frame, start_seconds, end_seconds), and windows/
has an array for each video, as ActionFormer and OpenTAD read them (docs/evaluation.md, Long videos). --list may name a
single video, or its URL.

The weights may be anything that video_convmae.load takes. An interrupted extraction resumes with the same command, and
the file is the same for any number of processes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from video_convmae.cli.evaluate import load_model, merge_options, nothing_was_read, output_folder
from video_convmae.cli.parser import run_command
from video_convmae.config import FeaturesConfig, to_plain
from video_convmae.data.options import VIDEO_SUFFIXES


def extract_features(config: FeaturesConfig) -> Path:
    """Extract features; return the path of their file.

    Raises:
        UserError: an option does not fit, or no record could be read; the files that say so are written.
    """
    from video_convmae import build
    from video_convmae.data.records import Record, Records, read_list
    from video_convmae.engine.distributed import barrier, init_distributed
    from video_convmae.engine.evaluation import write_bad_records
    from video_convmae.engine.features import (
        check_views,
        extract_rows,
        feature_function,
        feature_shape,
        feature_source,
        write_features,
    )
    from video_convmae.engine.inference import chunk_folder
    from video_convmae.engine.windows import WindowStore, extract_windows, forget_finished, write_windows
    from video_convmae.models.pytorchvideo import LibraryClassifier

    folder = output_folder(config)
    file = folder / "features.npz"
    config = replace(config, segments=config.segments or 1, crops=config.crops or 1)
    if config.window is not None and (config.stride or config.fps):
        config = replace(config, sampling=config.sampling or "dense")  # windows are parts of a video
    with init_distributed(config.device) as info:
        loaded, path, digest = load_model(config, info)
        single = is_video(config.list)
        if single:
            config = replace(config, format="video")
        data, protocol = merge_options(config, loaded, info)
        records = Records([Record(config.list)]) if single else read_list(config.list, data.format, data.root)
        how = (loaded.model, config.kind, config.pool)
        plan = None
        if config.window is not None:
            plan = build.plan_windows(data, loaded.model.config, config.window, config.hop)
            check_views(config.kind, protocol)
        shape, source = feature_shape(*how), feature_source(*how)
        about = {
            "weights": str(path),
            "sha256": digest,
            "list": config.list,
            "kind": config.kind,
            "pool": config.pool,
            "source": source,
            "grid": None if isinstance(loaded.model, LibraryClassifier) else loaded.model.encoder.config.grid,
            **asdict(protocol),
        }
        if plan is not None:
            about |= {"window": config.window, "stride": data.stride, "fps": data.fps, "hop": plan.hop}
        settings = about | {"ema": config.ema, "data": to_plain(data), "records": records.digest()}
        chunks = chunk_folder(folder, settings)
        if info.is_main:
            print(f"{path}: {len(records)} records, features {shape}: {source}", flush=True)
        inference = build.build_inference(loaded.model, data, records, protocol, info)
        if plan is None:
            barrier()
            extract_rows(inference, config.kind, chunks, config.pool)
        else:
            forget_finished(chunks, info)
            extract_windows(inference, feature_function(*how), shape, plan.hop, chunks)
        if info.is_main:
            if plan is None:
                bad_records = write_features(chunks, shape, records, file, about)
                is_empty = len(bad_records) == len(records)
            else:
                store = WindowStore(chunks, shape, info.rank)
                bad_records = write_windows(store, records, data.root, plan, folder, about)
                is_empty = not len(store.places())
            write_bad_records(bad_records, folder)
            shutil.rmtree(folder / "partial")
            failed = f"{len(bad_records)} failed" + (f" ({folder / 'bad_records.jsonl'})" if bad_records else "")
            print(f"{file}: {len(records) - len(bad_records)} records read, {failed}", flush=True)
            if is_empty:
                raise nothing_was_read(len(records), folder)
    return file


def is_video(path: str) -> bool:
    """Return whether a path, or a URL, is that of a single video, in place of a list.

    Raises:
        UserError: the library that opens this URL is not installed.
    """
    from video_convmae.data.remote import check_url, is_url

    if not path.lower().endswith(VIDEO_SUFFIXES):
        return False
    if not is_url(path):
        return Path(path).is_file()
    check_url(path)
    return True


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    return run_command(FeaturesConfig, extract_features, arguments)
