"""Write the features of every record of a list into one file, for retrieval, nearest neighbours or a classifier.

    video-convmae features --weights runs/k400 --list val.txt --root /data/k400 --output features
    torchrun --nproc_per_node 8 -m video_convmae features --weights base.pth --list val --kind tokens --output DIR

writes features.npz into the folder, and bad_records.jsonl if a record could not be read:

    features  (R, D) pooled: the mean over tokens and views; or (R, N, D) tokens (t, h, w in order), float32
    labels    (R,) -1 where the list has none
    records   (R,) paths
    failed    (R,) the record could not be read: its features are zeros
    about     JSON: weights, the place in the model where the features were read, views

The weights may be anything that video_convmae.load takes. An interrupted extraction resumes with the same command, and
the file is the same for any number of processes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from video_convmae.cli.evaluate import load_model, merge_options, output_folder
from video_convmae.cli.parser import run_command
from video_convmae.config import FeaturesConfig, to_plain


def extract_features(config: FeaturesConfig) -> Path:
    """Extract features; return the path of their file."""
    from video_convmae import build
    from video_convmae.data.records import read_list
    from video_convmae.engine.distributed import barrier, init_distributed
    from video_convmae.engine.evaluation import write_bad_records
    from video_convmae.engine.features import extract_rows, feature_shape, feature_source, write_features
    from video_convmae.engine.inference import chunk_folder
    from video_convmae.models.pytorchvideo import LibraryClassifier

    folder = output_folder(config)
    file = folder / "features.npz"
    config = replace(config, segments=config.segments or 1, crops=config.crops or 1)
    with init_distributed(config.device) as info:
        loaded, path, digest = load_model(config, info)
        data, protocol = merge_options(config, loaded, info)
        records = read_list(config.list, data.format, data.root)
        shape, source = feature_shape(loaded.model, config.kind), feature_source(loaded.model, config.kind)
        about = {
            "weights": str(path),
            "sha256": digest,
            "list": config.list,
            "kind": config.kind,
            "source": source,
            "grid": None if isinstance(loaded.model, LibraryClassifier) else loaded.model.encoder.config.grid,
            **asdict(protocol),
        }
        settings = about | {"ema": config.ema, "data": to_plain(data), "records": records.digest()}
        chunks = chunk_folder(folder, settings)
        if info.is_main:
            print(f"{path}: {len(records)} records, features {shape}: {source}", flush=True)
        barrier()
        extract_rows(build.build_inference(loaded.model, data, records, protocol, info), config.kind, chunks)
        if info.is_main:
            bad_records = write_features(chunks, shape, records, file, about)
            write_bad_records(bad_records, folder)
            shutil.rmtree(folder / "partial")
            failed = f"{len(bad_records)} failed" + (f" ({folder / 'bad_records.jsonl'})" if bad_records else "")
            print(f"{file}: {len(records) - len(bad_records)} records read, {failed}", flush=True)
    return file


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    return run_command(FeaturesConfig, extract_features, arguments)
