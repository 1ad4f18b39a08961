"""dflash-mlx bench, as a user runs it."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import jsonschema
import mlx.core as mx
import pytest
from PIL import Image

from dflash_mlx.measure import comparison, sweep
from dflash_mlx.measure.prompts import demo_questions
from dflash_mlx.measure.run import Run, Settings
from dflash_mlx.metal import attention_class
from dflash_mlx.metal.selection import Selection
from dflash_mlx.metal.verdicts import Verdict, VerdictBook
from dflash_mlx.target import view
from tests.bench_schema import SCHEMA
from tests.command_line import complaint, run
from tests.metal.emulator import Emulator, need_compiler
from tests.tiny_pair import BLOCK

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": "Count.", "kind": "counting"},
        {"prompt": "Count again.", "kind": "counting"},
        {"messages": [{"role": "user", "content": "And you?"}], "kind": "asking"},
        {"prompt": "No kind."},
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return ["--prompts", str(file)]


@pytest.fixture
def one(tmp_path):
    file = tmp_path / "one.jsonl"
    file.write_text('{"prompt": "Count."}')
    return ["--prompts", str(file)]


def report(tmp_path: Path, *arguments: str) -> tuple[dict, str]:
    file = tmp_path / "report.json"
    result = run("bench", "--json", str(file), *arguments)
    assert result.exit_code == 0, result.output
    written = json.loads(file.read_text())
    jsonschema.validate(written, SCHEMA)
    return written, result.stdout


def lines_of(screen: str, title: str) -> str:
    """What stands behind a title, up to the end of its sentence, on one line."""
    (found,) = re.findall(f"^{title}(.*?\\.)$", screen, re.MULTILINE | re.DOTALL)
    return " ".join(found.split())


def shown(sides: dict[str, dict]) -> str:
    """The sides of a sweep as bench prints them."""
    each = (f"{n}: {f['speedup']:.2f}x at {f['acceptance_length']:.2f}" for n, f in sides.items())
    return f"{', '.join(each)} tokens per forward."


def test_report_of_a_prompts_file(tmp_path, prompts, reciting):
    written, screen = report(tmp_path, "--repeats", "3", *prompts, *reciting)
    assert [p["kind"] for p in written["prompts"]] == ["counting", "counting", "asking", "prompts"]
    assert list(written["kinds"]) == ["counting", "asking", "prompts"]
    assert written["kinds"]["counting"]["prompts"] == 2
    for entry in written["prompts"]:
        assert entry["identical"] is True and entry["difference"] is None
        assert len(entry["runs"]["plain"]) == len(entry["runs"]["dflash"]) == 3
        # Ten words and the stop token.
        assert entry["plain"]["tokens"] == entry["dflash"]["tokens"] == 11
    assert "identical, token for token" in screen
    assert "counting" in screen and "overall" in screen and "GFLOP/s" in screen
    assert "\x1b" not in screen


def test_figures_follow_from_the_runs(tmp_path, prompts, reciting):
    options = ["--repeats", "1", "--verify-length", str(BLOCK - 1)]
    written, _ = report(tmp_path, *options, *prompts, *reciting)
    seconds = {
        side: sum(p["runs"][side][0]["decode_seconds"] for p in written["prompts"])
        for side in ("plain", "dflash")
    }
    summary = written["summary"]
    assert summary["speedup"] == pytest.approx(seconds["plain"] / seconds["dflash"])
    assert summary["plain"]["generation_tps"] == pytest.approx(40 / seconds["plain"])
    assert summary["dflash"]["generation_tps"] == pytest.approx(40 / seconds["dflash"])
    assert summary["speedup_interval"] is None
    emitted = sum((n + 1) * count for n, count in enumerate(summary["histogram"]))
    assert emitted == 40
    assert summary["acceptance_length"] == pytest.approx(40 / sum(summary["histogram"]))
    assert len(summary["by_position"]) == BLOCK - 1 and summary["verify_length"] > BLOCK - 2


def test_builtin_prompts_for_other_models(tmp_path, reciting):
    written, _ = report(tmp_path, "--repeats", "1", *reciting)
    assert set(written["kinds"]) == {"mathematics", "code", "prose", "JSON", "editing"}
    assert all(p["counts"] for p in written["prompts"])


def test_profile_of_the_host(tmp_path, prompts, reciting):
    written, screen = report(tmp_path, "--repeats", "1", "--profile", *prompts, *reciting)
    found = written["profile"]
    assert found["tokens"] == 40 and found["cycles"] > 0
    assert sum(found["per_cycle"].values()) == pytest.approx(
        1000 * sum(found["seconds"].values()) / found["cycles"]
    )
    assert all(f"{name}: " in screen for name in found["seconds"])
    assert f"queuing and waiting: {found['host_share']:.1%}." in screen


def test_a_draft_window_leaves_the_text_as_it_is(tmp_path, prompts, reciting):
    options = ["--repeats", "1", "--draft-window", "16"]
    written, _ = report(tmp_path, *options, *prompts, *reciting)
    assert written["summary"]["identical"] is True
    assert "at least 16" in complaint(run("bench", "--draft-window", "3", *prompts, *reciting), 1)


def test_sweep_of_fixed_lengths(tmp_path, one, reciting):
    written, screen = report(tmp_path, "--repeats", "3", "--sweep", *one, *reciting)
    found = written["sweep"]
    assert list(found["lengths"]) == [str(n) for n in range(1, BLOCK)]
    for length, figures in found["lengths"].items():
        assert figures["identical"] is True
        assert len(figures["by_position"]) == int(length)
    best = found["lengths"][str(found["best"])]
    assert best["speedup"] == max(f["speedup"] for f in found["lengths"].values())
    dflash = written["summary"]["dflash"]["decode_seconds"]
    assert found["over_best"] == pytest.approx(best["dflash"]["decode_seconds"] / dflash)
    low, high = found["over_best_interval"]
    assert low <= high
    assert f"best fixed: {found['best']}" in screen
    fixed, trees = lines_of(screen, "Fixed verify lengths: "), lines_of(screen, "Trees: ")
    assert fixed == shown(found["lengths"]) and trees == shown(found["trees"])
    assert written["trees"] is None


def test_sweep_of_trees(tmp_path, one, reciting):
    options = ["--repeats", "1", "--sweep", "--verify-length", "2"]
    written, screen = report(tmp_path, *options, *one, *reciting)
    lengths, trees = written["sweep"]["lengths"], written["sweep"]["trees"]
    assert list(trees) == ["4", "8", "16", "32", "64"]
    widest = max(f["verify_length"] for f in lengths.values())
    for nodes, figures in trees.items():
        assert figures["identical"] is True and figures["by_position"] == []
        # As deep as the block, whatever was asked for the run beside it; at the answer's end less.
        assert widest < figures["verify_length"] <= int(nodes)
    # The largest tree has all of a line, and more.
    most = lengths[str(BLOCK - 1)]["acceptance_length"]
    assert trees["64"]["acceptance_length"] >= most
    tree, best = (max(s.values(), key=lambda f: f["speedup"]) for s in (trees, lengths))
    assert best == lengths[str(written["sweep"]["best"])]
    assert ("is faster than that" in screen) == (tree["speedup"] > best["speedup"])


@pytest.mark.parametrize("tree_is_faster", [True, False])
def test_a_tree_faster_than_every_length_is_named(
    tmp_path, one, reciting, monkeypatch, tree_is_faster
):
    honest = sweep.dflash_run

    def timed(model, tokenizer, prompt, settings):
        faster = settings.tree == 16 if tree_is_faster else settings.verify_length == 2
        seconds = 1.0 if faster else 2.0
        return replace(honest(model, tokenizer, prompt, settings), decode_seconds=seconds)

    monkeypatch.setattr(sweep, "dflash_run", timed)
    written, screen = report(tmp_path, "--repeats", "1", "--sweep", *one, *reciting)
    figures = written["sweep"]
    tree, best = figures["trees"]["16"]["speedup"], figures["lengths"][str(figures["best"])]
    said = f"A tree of 16 is faster than that: {tree:.2f}x against {best['speedup']:.2f}x."
    assert (said in " ".join(screen.split())) == tree_is_faster
    assert ("is faster than that" in screen) == tree_is_faster
    # The best length is one of lines, however fast a tree is.
    assert figures["best"] == (1 if tree_is_faster else 2)


def test_a_tree_beside_lines(tmp_path, one, rambling):
    options = ["--repeats", "3", "--max-tokens", "12", "--tree", "16", "--verify-length", "3"]
    written, screen = report(tmp_path, *options, *one, *rambling)
    summary, lines = written["summary"], written["trees"]["lines"]
    assert summary["identical"] and summary["by_position"] == []
    assert lines["identical"] and len(lines["by_position"]) == 3
    assert lines["verify_length"] <= 3 < summary["verify_length"] <= 16
    assert lines["plain"] == summary["plain"] and lines["dflash"] != summary["dflash"]
    seconds = [s["dflash"]["decode_seconds"] for s in (lines, summary)]
    assert written["trees"]["over_lines"] == pytest.approx(seconds[0] / seconds[1])
    low, high = written["trees"]["over_lines_interval"]
    assert low <= high
    at = [f"{s['dflash']['generation_tps']:.1f}" for s in (summary, lines)]
    assert lines_of(screen, "Trees of 16: ") == (
        f"{summary['acceptance_length']:.2f} tokens per target forward at {at[0]} tokens/s; "
        f"lines: {lines['acceptance_length']:.2f} at {at[1]}."
    )
    assert written["settings"]["tree"] == 16 and written["sweep"] is None


def test_trees_by_cost_beside_lines(tmp_path, one, reciting):
    written, screen = report(tmp_path, "--repeats", "1", "--tree", "auto", *one, *reciting)
    summary, lines = written["summary"], written["trees"]["lines"]
    assert summary["identical"] and lines["identical"]
    length = f"{summary['acceptance_length']:.2f} tokens per target forward"
    assert lines_of(screen, "Trees where they pay: ").startswith(length)
    assert written["settings"]["tree"] == "auto"


def test_a_target_that_takes_no_trees(tmp_path, one, reciting, monkeypatch):
    monkeypatch.setattr(view, "can_branch", lambda cache: False)
    options = ["--repeats", "1", "--tree", "16", "--sweep"]
    written, screen = report(tmp_path, *options, *one, *reciting)
    assert written["trees"] is None and written["sweep"]["trees"] == {}
    assert list(written["sweep"]["lengths"]) == [str(n) for n in range(1, BLOCK)]
    assert "No trees can be verified here: --tree 16 put lines to the target." in screen
    assert "Trees: " not in screen
    assert "No trees" not in run("bench", "--repeats", "1", *one, *reciting).stdout


def test_each_prompt_can_be_shown(prompts, reciting):
    options = ["--repeats", "1", *prompts, *reciting]
    assert "Count again." not in run("bench", *options).stdout
    assert "Count again." in run("bench", "--each", *options).stdout


def test_low_acceptance_speaks_up(prompts, rambling, reciting):
    options = ["--repeats", "1", "--max-tokens", "30", *prompts, *rambling, "--verify-length"]
    assert "proposals were accepted" in run("bench", *options, str(BLOCK - 1)).stdout
    assert "proposals were accepted" not in run("bench", *options, "off").stdout


def test_plain_decoding_accepts_nothing(tmp_path, prompts, rambling):
    options = ["--repeats", "1", "--max-tokens", "8", "--verify-length", "off"]
    written, _ = report(tmp_path, *options, *prompts, *rambling)
    assert written["summary"]["acceptance_length"] == 1.0
    assert written["summary"]["plain_share"] == 1.0
    assert written["summary"]["by_position"] == []


def test_sampled_texts_are_compared_too(tmp_path, prompts, rambling):
    options = ["--repeats", "2", "--max-tokens", "20", "--temp", "1.2", "--seed", "5"]
    written, screen = report(tmp_path, *options, *prompts, *rambling)
    assert written["summary"]["identical"] is True
    assert written["settings"]["seed"] == 5
    assert "identical, token for token" in screen


def test_a_difference_is_shown_with_its_margin(tmp_path, prompts, reciting, monkeypatch):
    honest = comparison.dflash_run

    def wrong_at_the_third(*arguments):
        r = honest(*arguments)
        tokens = [*r.tokens[:2], r.tokens[0], *r.tokens[3:]]
        return Run(tokens, r.first_seconds, r.decode_seconds, r.peak_memory, r.forwards)

    monkeypatch.setattr(comparison, "dflash_run", wrong_at_the_third)
    written, screen = report(tmp_path, "--repeats", "1", *prompts, *reciting)
    assert written["summary"]["identical"] is False
    difference = written["prompts"][0]["difference"]
    assert difference["position"] == 2
    assert difference["plain"] == " three" and difference["dflash"] == "One"
    assert difference["margin"] > 0
    assert "differs from token 3 on" in screen
    assert "identical, token for token" not in screen


def test_unequal_lengths_are_a_difference(tmp_path, prompts, reciting, monkeypatch):
    honest = comparison.dflash_run

    def cut(*arguments):
        r = honest(*arguments)
        return Run(r.tokens[:4], r.first_seconds, r.decode_seconds, r.peak_memory, r.forwards)

    monkeypatch.setattr(comparison, "dflash_run", cut)
    written, screen = report(tmp_path, "--repeats", "1", *prompts, *reciting)
    difference = written["prompts"][0]["difference"]
    assert difference["position"] == 4
    assert difference["plain"] == " five" and difference["dflash"] is None
    assert "DFlash had ended" in screen


def test_context_lengths(tmp_path, reciting):
    written, screen = report(tmp_path, "--repeats", "1", "--context", "600,1k", *reciting)
    assert list(written["kinds"]) == ["600", "1k"]
    assert written["settings"]["context"] == [600, 1024]
    short, long = (p["prompt_tokens"] for p in written["prompts"])
    # A turn of the built-in questions and the recited answer has some two hundred tokens.
    assert 300 < short <= 600 and 700 < long <= 1024
    assert "1k" in screen


def test_a_context_beyond_the_positions_is_refused(reciting):
    said = complaint(run("bench", "--context", "1k,2k", *reciting), 1)
    assert "2304 positions, and this model has 2048" in said


def test_a_context_too_short_for_talk_is_refused(reciting):
    assert "too short" in complaint(run("bench", "--context", "20", *reciting), 1)


@pytest.mark.parametrize("options", [[], ["--context", "500,1k"]])
def test_chart_as_svg(tmp_path, prompts, reciting, options):
    file = tmp_path / "chart.svg"
    result = run("bench", "--repeats", "1", "--plot", str(file), *prompts, *options, *reciting)
    assert result.exit_code == 0, result.output
    root = ElementTree.fromstring(file.read_text())
    texts = [element.text or "" for element in root.iter(f"{SVG}text")]
    rows = ["500", "1k"] if options else ["counting", "asking", "prompts", "overall"]
    assert [t for t in texts if t in rows] == rows
    assert len([t for t in texts if t.endswith("x")]) == len(rows)
    # The paper, the legend, and two bars a row, none of them wider than the paper.
    bars = list(root.iter(f"{SVG}rect"))
    assert len(bars) == 3 + 2 * len(rows)
    for bar in bars[1:]:
        assert float(bar.attrib["x"]) + float(bar.attrib["width"]) < float(root.attrib["width"])


@pytest.mark.parametrize(
    ("asked", "last"),
    [
        (["--verify-length", "auto"], "auto"),
        (["--verify-length", "2", "--tree", "auto"], "2, as run"),
        (["--tree", "auto"], "tree auto"),
    ],
)
def test_chart_of_a_sweep(tmp_path, one, reciting, asked, last):
    file, json_file = tmp_path / "chart.svg", tmp_path / "bench.json"
    options = ["--sweep", *asked, "--plot", str(file), "--json", str(json_file)]
    result = run("bench", "--repeats", "1", *options, *one, *reciting)
    assert result.exit_code == 0, result.output
    root, found = ElementTree.fromstring(file.read_text()), json.loads(json_file.read_text())
    assert (found["trees"] is not None) == last.startswith("tree")
    labels = [e.text for e in root.iter(f"{SVG}text") if e.attrib["text-anchor"] == "end"]
    lengths, trees = found["sweep"]["lengths"], found["sweep"]["trees"]
    assert labels == ["plain mlx_lm", *lengths, *(f"tree {n}" for n in trees), last]
    # A bar for each, as long as it was fast; the first rectangle is the paper.
    widths = [float(bar.attrib["width"]) for bar in list(root.iter(f"{SVG}rect"))[1:]]
    sides = [s["dflash"] for s in [*lengths.values(), *trees.values(), found["summary"]]]
    speeds = [s["generation_tps"] for s in [found["summary"]["plain"], *sides]]
    for width, speed in zip(widths, speeds, strict=True):
        assert width / max(widths) == pytest.approx(speed / max(speeds), abs=0.01)


def test_chart_as_png(tmp_path, prompts, reciting):
    file = tmp_path / "chart.png"
    assert run("bench", "--repeats", "1", "--plot", str(file), *prompts, *reciting).exit_code == 0
    with Image.open(file) as image:
        assert image.format == "PNG" and image.width > 1000
        # Two colours of bars and the paper, and many between ink and paper where text is.
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 10


def test_png_without_pillow_is_said_before_the_work(tmp_path, prompts, reciting, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    options = ["--plot", str(tmp_path / "chart.png"), *prompts, *reciting]
    assert "dflash-mlx[png]" in complaint(run("bench", *options), 1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "There is no file"),
        ("", "holds no text"),
        ("\n \n", "holds no text"),
        ("nonsense", "Line 1 of"),
        ('{"prompt": "a"}\n[1]', "no JSON object"),
        ('{"kind": "a"}', "asks nothing"),
        ('{"prompt": "a", "messages": []}', "no list of messages"),
        ('{"prompt": ""}', "asks nothing"),
        ('{"prompt": 3}', "no list of messages"),
        ('{"messages": []}', "no list of messages"),
        ('{"messages": [{"role": "user"}]}', "a message 1 without content"),
        ('{"prompt": "a", "kind": 3}', '"kind"'),
        (b"\xff\xfe", "UTF-16"),
        (b'{"prompt": "caf\xe9"}', "not UTF-8: line 1 has the byte 0xE9 at byte 15"),
        ('{"prompt": "a \\ud83d"}', "half of a character (U+D83D) behind 'a '"),
    ],
)
def test_bad_prompts_files(tmp_path, reciting, content, said):
    file = tmp_path / "prompts.jsonl"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in complaint(run("bench", "--prompts", str(file), *reciting), 1)


def test_a_directory_is_no_prompts_file(tmp_path, reciting):
    assert "cannot be read" in complaint(run("bench", "--prompts", str(tmp_path), *reciting), 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--repeats", "0"], "--repeats"),
        (["--cooldown", "-1"], "--cooldown"),
        (["--json", "/nowhere/at/all.json"], "no directory"),
        (["--json", "."], "cannot be written"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--plot", "chart.pdf"], ".svg or .png"),
        (["--plot", "/nowhere/at/all.svg"], "no directory"),
        (["--context", "long"], "no length like 4k"),
        (["--context", "1k,0"], "no length like 4k"),
        (["--context", ""], "no length like 4k"),
    ],
)
def test_usage_errors(options, said, reciting):
    assert said in complaint(run("bench", *options, *reciting), 2)


def test_plain_and_dflash_alternate_after_a_warm_up(prompts, reciting, monkeypatch):
    order: list[str] = []
    for side in ("plain_run", "dflash_run"):
        honest = getattr(comparison, side)

        def noted(*arguments, side=side, honest=honest):
            order.append(side.removesuffix("_run"))
            return honest(*arguments)

        monkeypatch.setattr(comparison, side, noted)
    assert run("bench", "--repeats", "2", *prompts, *reciting).exit_code == 0
    assert len(order) == 2 + 2 * 2 * 4
    pairs = [tuple(order[i : i + 2]) for i in range(0, len(order), 2)]
    assert all(set(pair) == {"plain", "dflash"} for pair in pairs)
    assert pairs[0::2] != pairs[1::2]
    assert set(pairs[0::2]) == {("plain", "dflash")} and set(pairs[1::2]) == {("dflash", "plain")}


def test_without_a_model_it_is_the_demo_pair(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "What is 465 - 155?", "kind": "arithmetic"}))
    written, _ = report(tmp_path, "--repeats", "1", "--prompts", str(file), "--verify-length", "7")
    assert written["settings"]["model"] == "demo target"
    assert written["summary"]["identical"] is True
    assert written["summary"]["acceptance_length"] > 3


def test_what_the_demo_pair_never_learnt_is_kept_apart():
    counted = {q.kind for q in demo_questions() if q.counts}
    apart = {q.kind for q in demo_questions() if not q.counts}
    assert counted and apart and not counted & apart
    assert len(demo_questions(["held-out", "novel", "bad"])) > len(demo_questions())


class AtOnce:
    """A prover that finds every class faster at once; `rounds` times something is still open."""

    def __init__(self, rounds=0):
        self.rounds, self.asked, self.waited = rounds, [], 0

    @property
    def busy(self):
        return self.waited < self.rounds

    def settle(self, seconds):
        self.waited += 1
        return True

    def request(self, shape, done):
        self.asked.append(shape)
        done(shape, Verdict("faster"))


def test_gain_of_each_kernel(tmp_path, reciting, monkeypatch):
    need_compiler()
    (tmp_path / "one.jsonl").write_text('{"prompt": "Go."}')
    options = ["--repeats", "1", "--max-tokens", "6", "--verify-length", "3"]
    options += ["--prompts", str(tmp_path / "one.jsonl")]
    monkeypatch.setattr(attention_class, "CONTEXTS", (2, 512))
    emulator, prover = Emulator(orders=("forward",)), AtOnce()
    book = VerdictBook(tmp_path / "book.json")
    ready = Selection("off", lambda: True, emulator.metal_kernel, book, prover)
    with ready.used():
        written, screen = report(tmp_path, *options, "--kernels", "off,auto", *reciting)
    found = written["kernels"]
    names = ["off", "auto, draft", "auto, verify", "auto, rows", "auto"]
    assert list(found["sides"]) == list(found["gains"]) == names
    assert found["gains"]["off"] == 1 and all(gain > 0 for gain in found["gains"].values())
    assert all(side["identical"] for side in found["sides"].values())
    assert {shape.use for shape in prover.asked} == {"draft", "verify"}  # its matrices are small
    assert emulator.calls["block_attention"]
    lines = [line for line in screen.splitlines() if line.startswith(("off", "auto"))]
    assert len(lines) == 5 and lines[2].startswith("auto, verify's attention alone")


@pytest.mark.skipif(mx.metal.is_available(), reason="this machine has Metal")
def test_kernels_without_metal(tmp_path, prompts, reciting):
    written, screen = report(
        tmp_path,
        "--repeats",
        "1",
        "--max-tokens",
        "4",
        "--kernels",
        "off,auto",
        *prompts,
        *reciting,
    )
    assert written["kernels"] is None and "There is no Metal here" in screen


def test_an_unknown_mode_of_kernels():
    assert "'maybe' is no mode of kernels" in complaint(run("bench", "--kernels", "off,maybe"), 2)


def test_a_warm_up_waits_for_the_proofs_that_it_asks_for(tmp_path, monkeypatch):
    prover, runs = AtOnce(rounds=2), []

    def side(name):
        return lambda *_: runs.append(name) or Run([1, 2], 0.1, 0.1, 0.0, [])

    monkeypatch.setattr(comparison, "plain_run", side("plain"))
    monkeypatch.setattr(comparison, "dflash_run", side("dflash"))
    model, prompts = SimpleNamespace(ranks=None), [comparison.BenchPrompt((1,), "any")]
    with Selection("off", prover=prover, book=VerdictBook(tmp_path / "book.json")).used():
        comparison.compare(model, None, prompts, Settings(), repeats=1)
    assert runs == ["plain"] * 3 + ["dflash"] + ["dflash", "plain"] and prover.waited == 2
