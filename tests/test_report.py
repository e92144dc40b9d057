"""`report`: one page of any run, whole in itself, that a browser shows without complaint."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from clips import encode

from video_convmae.cli import run as run_cli
from video_convmae.cli.evaluate import evaluate
from video_convmae.cli.finetune import finetune
from video_convmae.cli.parser import parse
from video_convmae.cli.pretrain import pretrain
from video_convmae.config import EvaluateConfig, FinetuneConfig, PretrainConfig
from video_convmae.visualize import page

TINY = ("--model.size=tiny", "--model.num_frames=4", "--model.image_size=32", "--model.strides=[2,2,2]")
SHORT = ("--data.workers=0", "--device=cpu", "--train.precision=fp32", "--train.batch_size=2", "--data.reader=pyav")
SHORT += ("--train.max_steps=2", "--train.log_every=1", "--data.stride=1")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
REASON = "Chromium is not installed"


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(6):
        encode(folder / f"{number} & <b>.mp4", 8, seed=number)
    (folder / "list.txt").write_text("".join(f"{number} & <b>.mp4 {number % 2}\n" for number in range(6)))
    (folder / "list.labels.txt").write_text("up & <down>\nleft\n")
    return folder


def arguments(lists: Path, output: Path, *edits: str) -> list[str]:
    return [f"--data.train={lists / 'list.txt'}", f"--data.root={lists}", f"--output={output}", *TINY, *SHORT, *edits]


@pytest.fixture(scope="module")
def pretrained(lists: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "pretrain"
    edits = ("--optim.warmup_epochs=0", f"--probe.list={lists / 'list.txt'}")
    pretrain(parse(PretrainConfig, arguments(lists, output, *edits)))
    return output


@pytest.fixture(scope="module")
def finetuned(lists: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "finetune"
    edits = ("--optim.warmup_epochs=0", f"--data.validation={lists / 'list.txt'}", "--mixing.mixup=0")
    finetune(parse(FinetuneConfig, arguments(lists, output, *edits, "--mixing.cutmix=0")))
    return output


def make(run: Path, output: Path, *options: str) -> str:
    """Return the page; nothing in it may be fetched from elsewhere."""
    assert run_cli("report", [str(run), f"--output={output}", "--device=cpu", *options]) == 0
    text = output.read_text("utf-8")
    for place in re.findall(r"(?:src|srcset|href)=\"([^\"]*)\"|url\(([^)]*)\)", text):
        assert max(place).startswith("data:")
    assert "<script" not in text
    assert "@import" not in text
    return text


def titles(text: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", text)


def test_a_page_of_a_pretraining(pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = make(pretrained, tmp_path / "a.html")
    assert "not shown" not in capsys.readouterr().out
    expected = ["Curves", "Reconstructions", "Course of the training", "Last values", "Configuration"]
    assert titles(text) == expected
    metrics = json.loads((pretrained / "metrics.json").read_text())
    assert f"<b>{page.show(metrics['loss'])}</b>" in text  # beside the curve
    assert metrics["verdict"].rstrip(".") in text
    assert text.count("data:image/webp") == 2 * 6  # moving and still
    assert "0 &amp; &lt;b&gt;.mp4: original, masked" in text
    command = json.loads((pretrained / "logs" / "rank_0000.jsonl").read_text().splitlines()[0])["command"]
    assert f"<pre>{command.split()[0]}" in text
    again = make(pretrained, tmp_path / "b.html")
    assert text.split("<footer>")[0] == again.split("<footer>")[0]


def test_a_page_of_a_classifier_has_its_evaluation_or_makes_one(finetuned: Path, lists: Path, tmp_path: Path) -> None:
    text = make(finetuned, tmp_path / "a.html", "--records=4")
    assert titles(text)[:5] == ["Curves", "Accuracy", "Confusion", "Classes", "Most confident mistakes"]
    assert "4 of the 6 records of the validation list" in text
    assert "up &amp; &lt;down&gt;" in text
    for index in range(6):  # a bad file is named, and the others are shown
        (lists / "moved").mkdir(exist_ok=True)
        shutil.copy(lists / f"{index} & <b>.mp4", lists / "moved")
    options = [f"--weights={finetuned}", f"--list={lists / 'list.txt'}", f"--root={lists / 'moved'}", "--device=cpu"]
    metrics = evaluate(parse(EvaluateConfig, [*options, f"--output={finetuned / 'test'}", "--workers=0"]))
    wrong = round(6 * (1 - metrics["top1"]))
    assert wrong
    text = make(finetuned, tmp_path / "b.html")
    assert "Evaluation in test/ of" in text
    assert f"{wrong} of {wrong} mistakes" in text
    assert text.count("data:image/webp") == 2 * wrong
    shutil.rmtree(lists / "moved")
    text = make(finetuned, tmp_path / "c.html")
    assert "Could not be read: " in text
    shutil.rmtree(finetuned / "test")


def test_a_run_that_goes_on_says_so_and_one_without_anything_says_what_is_missing(
    pretrained: Path, finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    going = shutil.copytree(pretrained, tmp_path / "going")
    (going / "metrics.json").unlink()
    lines = [line for line in (going / "log.jsonl").read_text().splitlines() if json.loads(line)["step"] < 2]
    (going / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 2, "lo')
    text = make(going, tmp_path / "a.html")
    assert "Not finished: step 1 of 2 is the last that is logged" in text
    assert "It has not learned so far" in text

    for name in ("log.jsonl", "model.safetensors"):
        (going / name).unlink()
    shutil.rmtree(going / "checkpoints")
    capsys.readouterr()
    text = make(going, tmp_path / "b.html")
    assert "no step is logged yet" in text
    said = capsys.readouterr().out
    assert "not shown: Curves: nothing is logged yet" in said
    assert "not shown: Reconstructions: " in said

    alone = shutil.copytree(finetuned, tmp_path / "alone")
    config = (alone / "config.yaml").read_text()
    (alone / "config.yaml").write_text(re.sub(r"  validation: .*", "  validation: null", config))
    text = make(alone, tmp_path / "c.html")
    assert "Not shown: the run has no data.validation and no evaluation; video-convmae evaluate" in text
    assert titles(text) == ["Curves", "Accuracy", "Course of the training", "Last values", "Configuration"]


@pytest.mark.parametrize("name", ["config.yaml", "log.jsonl", "checkpoints/*/*", "LIST"])
def test_a_page_replaces_no_file_that_it_is_made_of(
    name: str, pretrained: Path, lists: Path, capsys: pytest.CaptureFixture
) -> None:
    output = lists / "list.txt" if name == "LIST" else next(pretrained.glob(name))
    before = output.read_bytes()
    assert run_cli("report", [str(pretrained), f"--output={output}", "--device=cpu"]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{output} is read by this command" in error
    assert output.read_bytes() == before


def test_what_is_no_run_is_an_error_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run_cli("report", [str(tmp_path)]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert "is no run folder: it has no config.yaml" in error
    (tmp_path / "config.yaml").write_text("a: 1\n")
    assert run_cli("report", [str(tmp_path)]) == 1
    assert "not the configuration of a run" in capsys.readouterr().err


def browse(tmp_path: Path, *options: str) -> subprocess.CompletedProcess:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--allow-file-access-from-files", "--hide-scrollbars"]
    return subprocess.run([*command, *options], capture_output=True, text=True, check=True, timeout=100)


@pytest.mark.skipif(CHROMIUM is None, reason=REASON)
@pytest.mark.parametrize("kind", ["pretrained", pytest.param("finetuned", marks=pytest.mark.slow)])
def test_a_browser_shows_it_without_complaint(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """No message in the console, every picture decoded, nothing wider than a phone; a screenshot and a print."""
    make(request.getfixturevalue(kind), tmp_path / "page.html")
    place = (tmp_path / "page.html").as_uri()
    shot = browse(tmp_path, "--window-size=1280,2000", f"--screenshot={tmp_path / 'page.png'}", place)
    assert "CONSOLE" not in shot.stderr
    assert (tmp_path / "page.png").stat().st_size > 20_000
    # A window is never as narrow as a phone; a frame is.
    (tmp_path / "frame.html").write_text(
        f"<iframe id=f src='{place}' style='width:390px;height:800px;border:0'></iframe><script>f.onload = () => {{"
        "const d = f.contentDocument, bad = [...d.images].filter(i => !i.complete || !i.naturalWidth).length;"
        "document.title = `${d.images.length} ${bad} ${d.documentElement.scrollWidth}` }</script>"
    )
    dom = browse(tmp_path, "--dump-dom", (tmp_path / "frame.html").as_uri())
    (found,) = re.findall(r"<title>(\d+) (\d+) (\d+)</title>", dom.stdout)
    assert int(found[0]) > 0
    assert found[1:] == ("0", "390")
    browse(tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}", place)
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


# The page's parts


@pytest.mark.parametrize("low", [0, 0.003, -12.5, 1e6])
@pytest.mark.parametrize("width", [0, 1e-6, 0.97, 41, 12_345])
def test_ticks_are_round_and_cover_the_range(low: float, width: float) -> None:
    ticks = page.nice_ticks(low, low + width, 4)
    assert 2 <= len(ticks) <= 7
    assert ticks[0] <= low + 1e-9 * abs(low)
    assert ticks[-1] >= low + width - 1e-9 * abs(low + width)


def test_a_long_curve_becomes_means_and_keeps_its_last_value() -> None:
    points: list[page.Point] = [(step, float(step % 2)) for step in range(10_000)]
    thinned = page.thin(points)
    assert len(thinned) <= page.MOST_POINTS
    assert thinned[-1] == points[-1]
    assert np.mean([value for _, value in thinned[:-1]]) == pytest.approx(0.5, abs=0.01)


def test_values_that_are_not_finite_cut_a_curve() -> None:
    curve = page.Curve("loss", [(1, 0.5), (2, 0.4), (3, None), (4, 0.3), (5, None)])
    figure = page.draw_plot(page.Plot("Loss & <more>", [curve]))
    assert figure.count("<polyline") == 1
    assert figure.count("<circle") == 1
    assert "Loss &amp; &lt;more&gt;" in figure
    assert "<b>0.3</b> (last finite)" in figure


def test_many_classes_are_a_picture() -> None:
    assert page.draw_heat_map(np.eye(400), "400 classes").startswith('<img class="map" src="data:image/png;base64,')
