"""Features of every record of a list into one file, for retrieval, nearest neighbours or a classifier of your own.

    python tools/extract_features.py --weights runs/k400 --list val.txt --root /data/k400 --output features
    torchrun --nproc_per_node 8 tools/extract_features.py --weights base.pth --list val --kind tokens --output DIR

leaves features.npz in the folder, and bad_records.jsonl if a record could not be read:

    features  (R, D) pooled: the mean over tokens and views; or (R, N, D) tokens (t, h, w in order), float32
    labels    (R,) -1 where the list has none
    records   (R,) paths
    failed    (R,) the record could not be read: its features are zeros
    about     JSON: weights, where in the model the features were read, views

Any model will do that video_convmae.load takes. An interrupted extraction goes on with the same command, and the file
is the same for any number of processes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from video_convmae import predictor
from video_convmae.config import DataConfig, FinetuneConfig, plain, run_tool
from video_convmae.data.options import ListFormat, ReaderName
from video_convmae.data.records import Records, read_list
from video_convmae.engine import checkpoint, distributed, features
from video_convmae.engine.distributed import DistInfo
from video_convmae.engine.evaluation import ProtocolConfig, partial_folder, write_faults
from video_convmae.engine.tasks import Normalizer
from video_convmae.predictor import Predictor


@dataclass(frozen=True)
class FeaturesConfig:
    """Features of a list; what is none is as in the run that trained the model."""

    weights: str
    """Run folder, a checkpoint of one, or a published file."""
    list: str
    """The list, or a folder of class folders."""
    output: str
    """Folder for features.npz; after an interruption the same command goes on."""
    kind: features.Kind = "pooled"
    """pooled: one vector a record; tokens: all of them."""
    root: str | None = None
    """Folder that the list's relative paths are joined to."""
    format: ListFormat | None = None
    """What a line holds: video, frames or image."""
    segments: int = 1
    """Clips over the length of a video; pooled features are averaged over all views."""
    crops: int = 1
    """Windows along the longer side of a frame."""
    crop_pct: float | None = None
    """Side of a window over the largest one's."""
    batch_size: int | None = None
    """Records whose views go through the model together; features may depend on it in the last bits."""
    precision: Literal["bf16", "fp16", "fp32"] | None = None
    """Autocast type; none: that of the run's test or training. Of a published file: bf16."""
    workers: int | None = None
    """Loading processes of each device."""
    decoder: ReaderName | None = None
    """auto, torchcodec, pyav or decord."""
    ema: bool | None = None
    """Take the average of the weights; none: for a classifier, where the run kept one."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda."""


def run(config: FeaturesConfig) -> Path:
    """Carry out an extraction; returns the file."""
    path, folder = checkpoint.find(config.weights), Path(config.output)
    loaded = predictor.load(path, ema=config.ema, decoder=config.decoder)
    data, protocol = settings(config, loaded)
    file = folder / "features.npz"
    with distributed.init_distributed(config.device) as group:
        records = read_list(config.list, data.format, data.root)
        shape = features.shape_of(loaded.model, config.kind)
        about = _about(config, path, loaded, protocol)
        identity = about | {"ema": config.ema, "data": plain(data), "records": records.digest()}
        partial = partial_folder(folder, identity)
        if group.is_main:
            print(f"{path}: {len(records)} records, features {shape}: {about['source']}", flush=True)
        distributed.barrier()
        _extract(config, loaded, records, data, protocol, group, partial)
        if group.is_main:
            faults = features.write(partial, shape, records, file, about)
            write_faults(faults, folder)
            shutil.rmtree(folder / "partial")
            failed = f"{len(faults)} failed" + (f" ({folder / 'bad_records.jsonl'})" if faults else "")
            print(f"{file}: {len(records) - len(faults)} records read, {failed}", flush=True)
    return file


def settings(config: FeaturesConfig, loaded: Predictor) -> tuple[DataConfig, ProtocolConfig]:
    """The run's own data and, where it has one, test protocol, with what the command line says in its place."""
    values = {name: value for name, value in asdict(config).items() if value is not None}
    data = replace(
        loaded.config.data, **{name: values[name] for name in ("root", "format", "workers") if name in values}
    )
    usual = loaded.config.test if isinstance(loaded.config, FinetuneConfig) else ProtocolConfig()
    protocol = {name: values[name] for name in ProtocolConfig.__dataclass_fields__ if name in values}
    protocol.setdefault("precision", usual.precision or loaded.config.train.precision)
    return data, replace(usual, **protocol)


def _about(config: FeaturesConfig, path: Path, loaded: Predictor, protocol: ProtocolConfig) -> dict[str, Any]:
    """What the file says of itself."""
    return {
        "weights": str(path),
        "sha256": checkpoint.digest(path),
        "list": config.list,
        "kind": config.kind,
        "source": features.source(loaded.model, config.kind),
        "grid": loaded.model.encoder.config.grid,
        **asdict(protocol),
    }


def _extract(
    config: FeaturesConfig,
    loaded: Predictor,
    records: Records,
    data: DataConfig,
    protocol: ProtocolConfig,
    group: DistInfo,
    partial: Path,
) -> None:
    model = loaded.model.to(group.device)
    views = data.views(records, model.encoder.config, protocol)
    pixels = Normalizer(data.mean, data.std, group.device)
    features.extract(model, config.kind, views, pixels, protocol, group, data.workers, data.start_method, partial)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_tool(FeaturesConfig, run, arguments)
