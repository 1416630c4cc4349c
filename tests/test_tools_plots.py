"""The scripts that draw our pictures, and the figures of compressors that they are held against."""

import gzip
import importlib.util
import itertools
import json
import lzma
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from conftest import ROOT

PLOT_RUN = ROOT / "tools" / "plot_run.py"
PLOT_EVALUATION = ROOT / "tools" / "plot_evaluation.py"
DRAW_LONG_PREFIX = ROOT / "tools" / "draw_long_prefix.py"
DRAW_LEARNING = ROOT / "tools" / "draw_learning.py"
CHAR_WIDTH = 0.54  # of the font size, on average, in a wide font


def run(*command) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=120
    )


def write_metrics(workdir, lines) -> None:
    workdir.mkdir(exist_ok=True)
    text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
    (workdir / "metrics.jsonl").write_text(text)


def plot(workdir, *arguments) -> ElementTree.Element:
    result = run(PLOT_RUN, workdir, *arguments)
    assert result.returncode == 0, result.stderr
    return ElementTree.parse(workdir / "loss.svg").getroot()


def elements(svg, tag):
    return [element for element in svg if element.tag.endswith("}" + tag)]


def texts(svg) -> list[str]:
    return [element.text for element in elements(svg, "text")]


def text_box(element) -> tuple[float, float, float, float]:
    """Left, top, right, bottom, as a wide font sets it."""
    size, x, y = (float(element.get(name)) for name in ("font-size", "x", "y"))
    width = CHAR_WIDTH * size * len(element.text)
    x -= {"middle": width / 2, "end": width}.get(element.get("text-anchor"), 0)
    return x, y - 0.75 * size, x + width, y + 0.2 * size


def assert_texts_are_apart(svg) -> None:
    width, height = (float(svg.get(name)) for name in ("width", "height"))
    boxes = [(element.text, text_box(element)) for element in elements(svg, "text")]
    for text, (left, top, right, bottom) in boxes:
        assert left >= 0 and top >= 0 and right <= width and bottom <= height, text
    for (text1, a), (text2, b) in itertools.combinations(boxes, 2):
        overlap = a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
        assert not overlap, f"{text1!r} overlaps {text2!r}"


@pytest.mark.parametrize("name", ["architecture", "decoding"])
def test_a_committed_picture_is_what_its_script_draws(name, tmp_path):
    output = tmp_path / "picture.svg"
    result = run(ROOT / "tools" / f"draw_{name}.py", f"--output={output}")
    assert result.returncode == 0, result.stderr
    committed = ROOT / "docs" / f"{name}.svg"
    assert output.read_text() == committed.read_text(), f"run tools/draw_{name}.py"
    assert_texts_are_apart(ElementTree.parse(committed).getroot())


def test_a_run_is_drawn_with_its_last_values_and_baselines_that_do_not_overlap(tmp_path):
    lines = [{"step": 0, "eval/loss": 8.3, "eval/bits_per_byte": 4.1}]
    lines += [{"step": step, "train/loss": 8 - step / 200} for step in range(100, 1001, 100)]
    lines += [{"step": 1000, "eval/loss": 3.02, "eval/bits_per_byte": 1.98}]
    write_metrics(tmp_path, lines)
    svg = plot(tmp_path, "--baseline", "gzip -9=2.01", "xz -9e=2.00", "--baseline", "a=b=2")
    labels = {"train: 3.00", "eval: 3.02", "this model: 1.98", "gzip -9: 2.01", "xz -9e: 2.00"}
    assert labels | {"a=b: 2.00", "1,000"} <= set(texts(svg))
    assert_texts_are_apart(svg)
    dashed = [line for line in elements(svg, "line") if line.get("stroke-dasharray")]
    assert len(dashed) == 3


def test_the_curves_of_a_run_begin_after_the_first_window(tmp_path):
    lines = [{"step": 0, "eval/loss": 90.0, "eval/bits_per_byte": 40.0}]
    lines += [{"step": 10, "train/loss": 80.0}]
    lines += [{"step": 10 * i, "train/loss": 4.0 - i / 10, "eval/loss": 3.0} for i in range(2, 9)]
    write_metrics(tmp_path, lines)
    ticks = [float(text) for text in texts(plot(tmp_path)) if re.fullmatch(r"\d(\.\d+)?", text)]
    assert 0 < max(ticks) <= 4  # 90 and 80 are not drawn
    write_metrics(tmp_path, lines[:3])
    assert "80" in texts(plot(tmp_path))  # of a run so short, everything


def test_lines_written_after_a_run_was_resumed_replace_earlier_ones(tmp_path):
    def loss(step, value):
        return {"step": step, "train/loss": value}

    write_metrics(tmp_path, [loss(10, 5.0), loss(20, 4.0), loss(30, 9.0), loss(20, 3.5)])
    assert "train: 3.50" in texts(plot(tmp_path))
    write_metrics(tmp_path, [loss(10, 5.0), loss(20, 4.0), loss(20, 3.0)])
    assert "train: 3.00" in texts(plot(tmp_path))


def test_a_cut_off_line_and_values_that_are_no_numbers_are_left_out(tmp_path):
    cut_off = '{"step": 30, "train/l'
    bad = [{"step": 20, "train/loss": "nan"}, '{"step": 25, "train/loss": NaN}', cut_off, "[1]"]
    write_metrics(tmp_path, [{"step": 10, "train/loss": 5.0}, *bad])
    labels = texts(plot(tmp_path))
    assert {"train: 5.00", "no values yet"} <= set(labels)
    assert not [label for label in labels if "nan" in label]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "no {workdir}/metrics.jsonl, which train.py writes to its --workdir"),
        ([], "{workdir}/metrics.jsonl has no train/loss and no eval/loss"),
        ([{"step": 1, "perf/step_ms": 2}], "{workdir}/metrics.jsonl has no train/loss and no"),
    ],
)
def test_a_folder_without_curves_gets_one_line(tmp_path, lines, message):
    if lines is not None:
        write_metrics(tmp_path, lines)
    result = run(PLOT_RUN, tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("plot_run.py: " + message.format(workdir=tmp_path))
    assert result.stderr.count("\n") == 1


def test_a_baseline_without_a_number_is_refused(tmp_path):
    result = run(PLOT_RUN, tmp_path, "--baseline", "gzip=much")
    assert result.returncode == 2
    assert "'gzip=much' is no NAME=BITS_PER_BYTE" in result.stderr


def test_an_evaluation_is_drawn_with_a_panel_for_each_table(tmp_path):
    def table(*ranges):
        return [
            {"from": low, "to": high, "tokens": 5, "nats_per_token": 3 + 1 / (1 + low)}
            for low, high in ranges
        ]

    result = {
        "model": "runs/x",
        "by_position": table((0, 0), (1, 1), (2, 3), (1024, 2047)),
        "by_context": table((257, 288), (481, 512)),
        "by_prefix": table((256, 271)),
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    done = run(PLOT_EVALUATION, tmp_path / "result.json")
    assert done.returncode == 0, done.stderr
    svg = ElementTree.parse(tmp_path / "result.svg").getroot()
    assert_texts_are_apart(svg)
    assert len(elements(svg, "circle")) == 4 + 2 + 1
    assert {"nats: 3.00", "tokens of the document before it"} <= set(texts(svg))


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"by_context": [{"from": 1}]}', "{'by_context'"]
)
def test_what_is_no_evaluation_gets_one_line(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    done = run(PLOT_EVALUATION, tmp_path / "result.json")
    assert done.returncode == 2
    assert done.stderr.startswith(f"plot_evaluation.py: {tmp_path / 'result.json'}: ")
    assert done.stderr.count("\n") == 1


def test_memory_by_prefix_ends_where_a_model_did_not_fit(tmp_path):
    entries = [
        {"model": model, "prefix": prefix, "peak_mib": 1024 * gib}
        for model, prefix, gib in [("streamed", 2048, 1), ("streamed", 8192, 1), ("dense", 2048, 4)]
    ]
    entries.append({"model": "dense", "prefix": 8192, "failed": "out of memory"})
    (tmp_path / "result.json").write_text(json.dumps({"entries": entries}))
    done = run(DRAW_LONG_PREFIX, tmp_path / "result.json", "--output", tmp_path / "result.svg")
    assert done.returncode == 0, done.stderr
    svg = ElementTree.parse(tmp_path / "result.svg").getroot()
    assert_texts_are_apart(svg)
    assert len(elements(svg, "circle")) == 3
    assert {"dense decoder: 4.00", "2,048", "8,192"} <= set(texts(svg))


def test_learning_is_drawn_by_step_and_by_time(tmp_path):
    losses = {"ours": [3.0] * 20 + [2.0] * 25, "perceiver-io": [3.0] * 20 + [2.5] * 25}
    seconds = {"ours": [6.0] * 45, "perceiver-io": [12.0] * 45}
    result = {"losses": losses, "seconds": seconds}
    (tmp_path / "result.json").write_text(json.dumps(result))
    done = run(DRAW_LEARNING, tmp_path / "result.json", "--output", tmp_path / "result.svg")
    assert done.returncode == 0, done.stderr
    svg = ElementTree.parse(tmp_path / "result.svg").getroot()
    assert_texts_are_apart(svg)
    assert texts(svg).count("ours: 2.00") == texts(svg).count("perceiver-io: 2.50") == 2
    assert len(elements(svg, "path")) == 4


@pytest.mark.parametrize("tool", [DRAW_LONG_PREFIX, DRAW_LEARNING])
@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_what_is_not_a_result_of_the_benchmark_gets_one_line(tmp_path, tool, text):
    (tmp_path / "result.json").write_text(text)
    done = run(tool, tmp_path / "result.json")
    assert done.returncode == 2
    assert done.stderr.startswith(f"{tool.name}: ") and done.stderr.count("\n") == 1


def test_compression_baselines_are_what_gzip_and_xz_make_of_the_text(tmp_path):
    path = ROOT / "tools" / "compression_baseline.py"
    spec = importlib.util.spec_from_file_location("compression_baseline", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    documents = ["Ein süßer Brei. " * 20, "The same words, the same words. " * 30]
    lines = [json.dumps({"text": text}) for text in documents]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    result = tool.compression_baselines(str(tmp_path / "text.jsonl"), "train")
    joined = "".join(text + "\0" for text in documents).encode()
    assert result["documents"] == 2
    assert result["bytes"] == len(joined) - 2
    assert result["bits_per_byte"] == {
        "gzip -9": round(8 * len(gzip.compress(joined, 9)) / (len(joined) - 2), 4),
        "xz -9e": round(8 * len(lzma.compress(joined, preset=9 | 1 << 31)) / (len(joined) - 2), 4),
    }
    with pytest.raises(ValueError, match="no data at"):
        tool.compression_baselines(str(tmp_path / "nothing"), "validation")
