"""COCO's evaluation of detections, by faster-coco-eval: average precision and recall of boxes and masks.

The ground truth is made from the records, so that it holds what was read: pictures that could not be read are left out,
as their detections are, and so are, from the evaluation of masks, objects that have none. All else counts as
pycocotools counts it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from operator import itemgetter
from typing import Any

from video_convmae.data.coco import CocoRecords
from video_convmae.data.masks import mask_api

from .distributed import broadcast_object, gather_object

# COCO's twelve: precision (over IoU .5 to .95, at .5, at .75, by area), recall (by detections a picture, by area).
NUMBERS = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)


def evaluate_everywhere(
    own: Sequence[dict[str, Any]], records: CocoRecords, failed: Collection[int] = (), masks: bool = True
) -> tuple[dict[str, float | None], list[dict[str, Any]] | None]:
    """Evaluate what all processes detected; the numbers do not depend on how many they are.

    Args:
        own: this process's results, as `image_results` makes them; each picture on one process alone.
        records: the data set.
        failed: records that could not be read, the same on every process.
        masks: evaluate masks too.

    Returns:
        The numbers, on every process, and all results in the order of their pictures' ids, on rank 0 alone.
    """
    mask_api()  # says what to install, on every process
    gathered = gather_object(list(own))
    if gathered is None:
        return broadcast_object(None), None
    results = sorted((result for each in gathered for result in each), key=itemgetter("image_id"))
    metrics = evaluate_coco(results, records, failed, masks)
    return broadcast_object(metrics), results


def evaluate_coco(
    results: Iterable[dict[str, Any]], records: CocoRecords, failed: Collection[int] = (), masks: bool = True
) -> dict[str, float | None]:
    """Return COCO's numbers: `box_ap`, `box_ap50` ..., and with masks `mask_ap` ..., as fractions.

    A number is None where nothing counts for it: no object is small, for example.

    Args:
        results: detections in COCO's format; not changed.
        records: the data set.
        failed: records that could not be read; they do not count.
        masks: evaluate masks too.

    Raises:
        ListError: faster-coco-eval is not installed.
    """
    mask_api()
    results = list(results)
    metrics = _numbers("box", "bbox", ground_truth(records, failed), results)
    if masks:
        metrics |= _numbers("mask", "segm", ground_truth(records, failed, masks=True), results)
    return metrics


def ground_truth(records: CocoRecords, failed: Collection[int] = (), masks: bool = False) -> dict[str, Any]:
    """Return records as the contents of a COCO file.

    Args:
        records: the data set.
        failed: records to leave out.
        masks: leave out objects without a mask, which the evaluation of masks cannot take.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    skipped = set(failed)
    for index, record in enumerate(records):
        if index in skipped:
            continue
        images.append({"id": record.image_id, "height": record.height, "width": record.width})
        for each in record.objects:
            if masks and each.segmentation is None:
                continue
            annotation = {
                "id": len(annotations) + 1,  # an id of 0 would count as no match
                "image_id": record.image_id,
                "category_id": records.categories[each.label - 1][0],
                "bbox": list(each.box),
                "area": each.area,
                "iscrowd": int(each.crowd),
            }
            annotations.append(annotation | ({"segmentation": each.segmentation} if masks else {}))
    categories = [{"id": id_, "name": name} for id_, name in records.categories]
    return {"images": images, "annotations": annotations, "categories": categories}


def _numbers(
    prefix: str, kind: str, truth: dict[str, Any], results: Sequence[dict[str, Any]]
) -> dict[str, float | None]:
    """Evaluate one kind of overlap; the names begin with a prefix."""
    from faster_coco_eval import COCO, COCOeval_faster

    known = {image["id"] for image in truth["images"]}
    kept = [dict(result) for result in results if result["image_id"] in known]
    if kind == "segm":
        for result in kept:  # or the area, by which detections are small or large, would be that of the box
            del result["bbox"]
    coco = COCO(truth)
    evaluation = COCOeval_faster(coco, coco.loadRes(kept), iouType=kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    values = [float(value) for value in evaluation.stats]
    return {f"{prefix}_{name}": None if value < 0 else value for name, value in zip(NUMBERS, values, strict=True)}
