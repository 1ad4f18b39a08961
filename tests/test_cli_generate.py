"""dflash-mlx generate, as a user runs it."""

import json
import re
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest
from mlx_lm import load as load_plain
from mlx_lm import stream_generate as plain_stream_generate

from tests.command_line import complaint, run, spawn
from tests.tiny_pair import BLOCK, SENTENCE, write_pair, write_target


def plain_text(target: str, prompt: str, count: int, **template: object) -> str:
    model, tokenizer = load_plain(target)[:2]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, **template
    )
    return "".join(r.text for r in plain_stream_generate(model, tokenizer, ids, count))


def test_stdout_is_the_text_alone_and_stderr_has_the_figures(reciting):
    result = run("generate", "-p", "Count.", *reciting)
    assert result.exit_code == 0
    assert result.stdout == SENTENCE + "\n"
    # Behind them may stand why it drafts nothing, which depends on the machine.
    figures = next(line for line in result.stderr.splitlines() if "tokens/s" in line)
    for part in ("acceptance length", "tokens/s", "11 tokens", "first token"):
        assert part in figures


@pytest.mark.parametrize("length", [None, "auto", "0", "off", "1", str(BLOCK - 1)])
def test_text_is_plain_decodings(rambling, length):
    choice = [] if length is None else ["--verify-length", length]
    result = run("generate", "-p", "hello", "--max-tokens", "40", *choice, *rambling)
    assert result.stdout == plain_text(rambling[1], "hello", 40) + "\n"
    if length in ("0", "off"):
        assert "acceptance length 1.00 (verify 0.0, 100% plain)" in result.stderr


@pytest.mark.parametrize("tree", ["off", "1", "16", "64"])
def test_a_tree_changes_no_text(rambling, tree):
    result = run("generate", "-p", "hello", "--max-tokens", "40", "--tree", tree, *rambling)
    assert result.stdout == plain_text(rambling[1], "hello", 40) + "\n"
    if tree != "off":
        verified = re.search(r"\(verify ([\d.]+),", result.stderr)
        assert verified and int(tree) - 2 <= float(verified[1]) <= int(tree)


def test_prompt_from_stdin(rambling):
    piped = run("generate", "--max-tokens", "20", *rambling, stdin="hello")
    dash = run("generate", "-p", "-", "--max-tokens", "20", *rambling, stdin="hello")
    given = run("generate", "-p", "hello", "--max-tokens", "20", *rambling)
    assert piped.stdout == dash.stdout == given.stdout != ""


def test_raw_prompt_and_template_options_change_the_prompt(rambling):
    def text(*options: str) -> str:
        result = run("generate", "-p", "hello", "--max-tokens", "20", *options, *rambling)
        assert result.exit_code == 0, result.output
        return result.stdout

    templated = text()
    assert text("--ignore-chat-template") != templated
    assert text("--system-prompt", "Be brief.") != templated
    assert text("--no-think") != templated
    assert text("--chat-template-config", '{"enable_thinking": false}') == text("--no-think")
    assert text("--think") == templated


def test_prefilled_response_is_continued(reciting):
    result = run("generate", "-p", "Count.", "--prefill-response", "One two", *reciting)
    assert result.stdout == " three four five six seven eight nine ten.\n"


def test_extra_end_token_ends_the_text(reciting):
    result = run("generate", "-p", "Count.", "--extra-eos-token", " four", *reciting)
    assert result.stdout == "One two three\n"


def test_seed_repeats_the_text_whatever_the_verify_length(rambling):
    def text(seed: str, length: str) -> str:
        sampling = ["--temp", "1.5", "--top-p", "0.95", "--min-p", "0.01", "--top-k", "50"]
        sampling += ["--seed", seed, "--verify-length", length]
        return run("generate", "-p", "hi", "--max-tokens", "30", *sampling, *rambling).stdout

    plain = text("1", "off")
    assert text("1", "auto") == text("1", "2") == plain != text("2", "auto")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-p", ""], "prompt is empty"),
        (["-p", "  "], "prompt is empty"),
        (["-p", "x", "--temp", "-1"], "--temp"),
        (["-p", "x", "--temp", "warm"], "--temp"),
        (["-p", "x", "--top-p", "1.5"], "--top-p"),
        (["-p", "x", "--min-p", "2"], "--min-p"),
        (["-p", "x", "--top-k", "-3"], "--top-k"),
        (["-p", "x", "--seed", "-1"], "--seed"),
        (["-p", "x", "--max-tokens", "0"], "neither -1 nor at least 1"),
        (["-p", "x", "--max-tokens", "many"], "--max-tokens"),
        (["-p", "x", "--verify-length", "-2"], "auto, off or a number"),
        (["-p", "x", "--verify-length", "lots"], "auto, off or a number"),
        (["-p", "x", "--tree", "65"], "auto, off or a number from 0 to 64"),
        (["-p", "x", "--tree", "on"], "auto, off or a number from 0 to 64"),
        (["-p", "x", "--copies", "lots"], "auto or off"),
        (["-p", "x", "--kv-bits", "7"], "--kv-bits"),
        (["-p", "x", "--prefill-step-size", "0"], "--prefill-step-size"),
        (["-p", "x", "--chat-template-config", "{"], "not JSON"),
        (["-p", "x", "--chat-template-config", "[1]"], "not a JSON object"),
        (["-p", "x", "--no-such-option"], "--no-such-option"),
        (["-p", "x", "surplus"], "surplus"),
    ],
)
def test_usage_errors_are_one_sentence_and_exit_2(options, said):
    assert said in complaint(run("generate", *options), 2)


def test_stdin_must_be_text():
    assert "empty" in complaint(run("generate", stdin=""), 2)
    assert "not UTF-8" in complaint(run("generate", stdin=b"\xff\xfe\x00"), 2)


def test_unknown_command_exits_2():
    assert "juggle" in complaint(run("juggle"), 2)


@pytest.fixture
def broken(tmp_path):
    """A pair in a folder of its own, to be damaged."""
    return write_pair(tmp_path, SENTENCE)


def fails(target: Path | str, draft: Path | str, *options: str) -> str:
    arguments = ["-m", str(target), "--draft", str(draft), *options]
    return complaint(run("generate", "-p", "hi", *arguments), 1)


def test_wrong_paths(broken, tmp_path):
    target, draft = broken
    assert "no directory" in fails("./nowhere", draft)
    assert "no directory" in fails(target, tmp_path / "nowhere")
    assert "is a file" in fails(target / "config.json", draft)
    (tmp_path / "empty").mkdir()
    assert "config.json" in fails(tmp_path / "empty", draft)
    assert "adapter" in fails(target, draft, "--adapter-path", str(tmp_path / "nowhere"))


def test_no_draft_known_names_the_option(broken):
    assert "--draft" in complaint(run("generate", "-p", "hi", "-m", str(broken[0])), 1)


def test_target_and_draft_swapped(broken):
    target, draft = broken
    assert "is a DFlash draft" in fails(draft, draft)
    assert "not a DFlash draft" in fails(target, target)


def test_wrong_pair(broken, tmp_path):
    write_target(tmp_path / "wider", SENTENCE, hidden_size=32)
    assert "not a pair" in fails(tmp_path / "wider", broken[1])


def test_damaged_weights(broken):
    target, draft = broken
    weights = draft / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "cut short" in fails(target, draft)
    weights.write_bytes(struct.pack("<Q", 2**40) + whole[8:])
    assert "damaged" in fails(target, draft)
    weights.unlink()
    assert "no safetensors" in fails(target, draft)


def test_damaged_configs(broken):
    target, draft = broken
    config = draft / "config.json"
    whole = json.loads(config.read_text())
    config.write_text("{")
    assert "cannot be read as JSON" in fails(target, draft)
    del whole["hidden_size"]
    config.write_text(json.dumps(whole))
    assert "lacks hidden_size" in fails(target, draft)


def test_missing_tokenizer(broken):
    target, draft = broken
    for file in target.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer" in fails(target, draft)


def test_unreadable_directory(broken, monkeypatch):
    target, draft = broken

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    # As root every mode can be read, so the refusal is the file system's answer, not a mode.
    monkeypatch.setattr(Path, "read_bytes", denied)
    assert "Permission denied" in fails(target, draft)


def test_values_that_only_the_model_can_judge(reciting, broken):
    assert f"0 (plain decoding) to {BLOCK - 1}" in fails(*broken, "--verify-length", "4")
    assert "'nine ten' is no token" in fails(*broken, "--extra-eos-token", "nine ten")


def test_prompt_longer_than_the_positions(tmp_path):
    target, draft = write_pair(tmp_path, SENTENCE, max_position_embeddings=64)
    said = complaint(run("generate", "-p", "x" * 80, "-m", str(target), "--draft", str(draft)), 1)
    assert "only 64 positions" in said


def test_cache_that_cannot_be_quantized(reciting):
    options = ["--kv-bits", "4", "--quantized-kv-start", "0"]
    for command in (["generate", "-p", "hi"], ["bench", "--repeats", "1"]):
        result = run(*command, *options, *reciting)
        assert result.exit_code == 1
        assert "--kv-group-size" in result.stderr and "Unexpected" not in result.stderr
    quantized = run("generate", "-p", "hi", *options, "--kv-group-size", "32", *reciting)
    assert quantized.exit_code == 0 and quantized.stdout.startswith("One")


def test_drafts_trained_without_thinking_turn_it_off(tmp_path):
    target, draft = write_pair(tmp_path / "pair", SENTENCE)
    named = target.rename(tmp_path / "Qwen3-4B-4bit")
    arguments = ["generate", "-p", "hi", "-m", str(named), "--draft", str(draft)]
    assert "was trained without thinking, so it is off" in run(*arguments).stderr
    assert "without thinking" not in run(*arguments, "--think").stderr


def test_templates_without_thinking_say_so(broken, tmp_path):
    target, draft = broken
    file = target / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    file.write_text(json.dumps(settings))
    arguments = ["generate", "-p", "hi", "-m", str(target), "--draft", str(draft)]
    assert "says nothing of thinking" in run(*arguments, "--no-think").stderr
    assert "says nothing of thinking" not in run(*arguments).stderr


def test_template_that_refuses(broken):
    target, draft = broken
    file = target / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["chat_template"] = "{{ raise_exception('no system messages here') }}"
    file.write_text(json.dumps(settings))
    assert "no system messages here" in fails(target, draft)


def test_no_network_is_said(tmp_path):
    process = spawn(
        ["generate", "-p", "x", "-m", "nobody/nothing", "--draft", "nobody/none"],
        env={"HF_HUB_CACHE": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, said = process.communicate(timeout=60)
    assert process.returncode == 1 and out == ""
    assert "nobody/nothing" in said and str(tmp_path) in said and "Traceback" not in said
    assert said.splitlines()[0].startswith("Fetching nobody/nothing from the hub to ")
    assert said.splitlines()[-1].startswith("dflash-mlx: There is no directory nobody/nothing")


def test_low_acceptance_speaks_up(rambling, reciting):
    block = ["--verify-length", str(BLOCK - 1)]
    result = run("generate", "-p", "x", "--max-tokens", "60", *block, *rambling)
    assert "Only 0 of" in result.stderr and "another target or another thinking" in result.stderr
    plainly = ["--verify-length", "off", *rambling]
    for options in (plainly, reciting):
        result = run("generate", "-p", "x", "--max-tokens", "60", *options)
        assert "proposals were accepted" not in result.stderr


def test_shell_completion(monkeypatch):
    monkeypatch.setenv("_DFLASH_MLX_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "dflash-mlx ge")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert run().stdout.split() == ["generate"]
    monkeypatch.setenv("COMP_WORDS", "dflash-mlx bench --re")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert {"--repeats", "--revision"} <= set(run().stdout.split())


def test_debug_shows_the_traceback(broken):
    shutil.rmtree(broken[1])
    arguments = ["generate", "-p", "x", "-m", str(broken[0]), "--draft", str(broken[1])]
    assert "Traceback" not in run(*arguments).stderr
    assert "Traceback" in run("--debug", *arguments).stderr
    assert "Traceback" in run(*arguments, "--debug").stderr


def test_reader_that_leaves_is_no_error(rambling):
    process = spawn(
        ["generate", "-p", "x", "--max-tokens", "-1", *rambling],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(5)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(60) == 1
    assert "Traceback" not in said and "Exception" not in said


def test_interrupt_ends_with_the_figures(rambling):
    process = spawn(
        ["generate", "-p", "x", "--max-tokens", "-1", *rambling],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.read(5)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "tokens/s" in said and "Traceback" not in said


def test_version_and_help():
    assert run("--version").stdout.startswith("dflash-mlx 0.")
    for command in ([], ["generate"], ["bench"]):
        result = run(*command, "--help")
        assert result.exit_code == 0 and "Usage" in result.stdout


def test_without_a_model_it_is_the_demo_pair():
    result = run("generate", "-p", "What is 465 - 155?")
    assert result.exit_code == 0
    assert "310" in result.stdout
    assert "demo pair" in result.stderr.splitlines()[0]


def test_without_a_draft_it_decodes_plainly_when_asked_to(tmp_path):
    target = str(tmp_path / "model-nobody-knows")
    write_target(Path(target))
    said = complaint(run("generate", "-p", "hello", "-m", target), 1)
    assert "No published draft is known" in said
    assert "train one with dflash-mlx train" in said
    options = ["-m", target, "--max-tokens", "40", "--verify-length", "off"]
    result = run("generate", "-p", "hello", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout == plain_text(target, "hello", 40) + "\n"
    assert "No draft is known for" in result.stderr
    assert "dflash-mlx train makes one" in result.stderr
    assert "acceptance length 1.00 (verify 0.0, 100% plain)" in result.stderr
