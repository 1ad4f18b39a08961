"""dflash-mlx chat: in a pseudo-terminal, and through pipes."""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pytest

from dflash_mlx.cli.line_input import Typed, unfinished, without_fences
from tests.command_line import PROGRAM, complaint, run
from tests.tiny_pair import SENTENCE, write_pair, write_target

THOUGHT = "<think> I wonder </think> Yes indeed."


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    target, draft = write_pair(tmp_path_factory.mktemp("thinking"), THOUGHT)
    return ["-m", str(target), "--draft", str(draft)]


class Terminal:
    """A chat in a pseudo-terminal; `screen` collects what it wrote, escape codes removed."""

    def __init__(self, child: pexpect.spawn):
        self.child = child

    def type(self, text: str) -> None:
        self.child.send(text)

    def say(self, text: str) -> None:
        self.prompt()
        self.child.send(text + "\r")

    def see(self, pattern: str) -> str:
        """Wait for a pattern; what was written up to its end, with escape codes."""
        self.child.expect(pattern)
        return self.child.before + self.child.after

    def prompt(self) -> None:
        # The editor asks for bracketed paste whenever it begins to read a message.
        self.see(r"\x1b\[\?2004h")

    def gone(self) -> int:
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus


@contextmanager
def terminal(data: Path, *arguments: str, **env: str) -> Iterator[Terminal]:
    child = pexpect.spawn(
        PROGRAM[0],
        [*PROGRAM[1:], "chat", *arguments],
        env={
            "PATH": "/usr/bin:/bin",
            "TERM": "xterm-256color",
            "LANG": "C.UTF-8",
            "PYTHONPATH": ":".join(p for p in sys.path if p),
            "XDG_DATA_HOME": str(data),
            # A pseudo-terminal with no screen behind it answers no questions about the cursor.
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "HF_HUB_OFFLINE": "1",
            **env,
        },
        encoding="utf-8",
        timeout=30,
        dimensions=(40, 120),
    )
    try:
        yield Terminal(child)
    finally:
        child.close(force=True)


def test_several_turns_a_fence_and_ctrl_d(tmp_path, reciting):
    with terminal(tmp_path, *reciting) as t:
        t.say("Count.")
        t.see(SENTENCE)
        first = t.see(r"first token [^\r\n]*")
        assert "acceptance length" in first and "tokens/s" in first and "cached" not in first
        t.say("Count again.")
        t.see(SENTENCE)
        t.see(r"[1-9]\d*/\d+ cached")
        t.say('"""two')
        t.type('lines"""\r')
        t.see(SENTENCE)
        t.say("/stats")
        t.see("3 answers, 33 tokens")
        t.prompt()
        t.type("\x04")
        assert t.gone() == 0


def test_a_pasted_text_is_one_message(tmp_path, reciting):
    saved = tmp_path / "c.json"
    with terminal(tmp_path, *reciting) as t:
        t.prompt()
        t.type("\x1b[200~first line\nsecond line\nthird\x1b[201~")
        t.type("\r")
        t.see(SENTENCE)
        t.say(f"/save {saved}")
        t.see("Saved 2 messages")
        t.say("/bye")
        assert t.gone() == 0
    messages = json.loads(saved.read_text())["messages"]
    assert messages[0]["content"] == "first line\nsecond line\nthird"


def test_ctrl_c_stops_the_answer_and_keeps_the_session(tmp_path, rambling):
    saved = tmp_path / "c.json"
    with terminal(tmp_path, "--max-tokens", "-1", *rambling) as t:
        t.say("Ramble.")
        t.see(r"[^\x1b\s]{20}")
        t.child.sendintr()
        t.see("tokens/s")
        t.see("Stopped.")
        t.say("/set max_tokens 5")
        t.see("max_tokens is 5")
        t.say("Go on.")
        t.see(r"[1-9]\d*/\d+ cached")
        t.see("stopped at 5 tokens")
        t.say(f"/save {saved}")
        t.see("Saved 4 messages")
        t.prompt()
        t.child.sendintr()
        t.see("Ctrl-D or /quit leaves")
        t.prompt()
        t.type("\x04")
        assert t.gone() == 0
    assert json.loads(saved.read_text())["messages"][1]["content"]


def test_save_and_resume(tmp_path, reciting):
    saved = tmp_path / "c.json"
    with terminal(tmp_path, *reciting, "--system-prompt", "Be exact.") as t:
        t.say("Count.")
        t.see("first token")
        t.say(f"/save {saved}")
        t.see("Saved 2 messages")
        t.say("/quit")
        assert t.gone() == 0
    for arguments, line in ((["--resume", str(saved)], None), ([], f"/load {saved}")):
        with terminal(tmp_path, *reciting, *arguments) as t:
            if line:
                t.say(line)
            t.see("Loaded 2 messages")
            t.say("/system")
            t.see("System message: Be exact.")
            t.say("Again.")
            t.see(SENTENCE)
            t.say("/exit")
            assert t.gone() == 0


def test_lines_are_remembered_between_runs(tmp_path, reciting):
    with terminal(tmp_path, *reciting) as t:
        t.say("Something memorable.")
        t.see("first token")
        t.say("/quit")
        assert t.gone() == 0
    with terminal(tmp_path, *reciting) as t:
        t.prompt()
        t.type("\x1b[A\x1b[A")
        t.see("Something memorable.")
        t.type("\r")
        t.see(SENTENCE)


def test_a_history_that_cannot_be_kept_is_no_error(tmp_path, reciting):
    (tmp_path / "dflash-mlx").write_text("in the way")
    with terminal(tmp_path, *reciting) as t:
        t.see("Lines are not remembered")
        t.say("Count.")
        t.see(SENTENCE)


def test_thinking_is_dimmed_and_left_out_of_the_next_turn(tmp_path, thinking):
    saved = tmp_path / "c.json"
    with terminal(tmp_path, *thinking) as t:
        t.say("Well?")
        shown = t.see("Yes")
        assert "\x1b[2m I\x1b[0m" in shown and "\x1b[2m wonder\x1b[0m" in shown
        assert "\x1b[2m Yes" not in shown and "think>" not in shown
        t.see("indeed.")
        t.say(f"/save {saved}")
        t.see("Saved")
        t.say("/think off")
        t.see("Thinking is off")
        t.say("Well?")
        assert "wonder" not in t.see("indeed.")
    answer = json.loads(saved.read_text())["messages"][1]
    assert answer["content"].strip() == "Yes indeed."
    assert answer["reasoning_content"].strip() == "I wonder"


def test_no_color_means_no_colors(tmp_path, thinking):
    with terminal(tmp_path, *thinking, NO_COLOR="1") as t:
        t.say("Well?")
        shown = t.see("first token")
    assert not re.search(r"\x1b\[[1-9][0-9;]*m", shown)


def test_markdown_is_rendered_block_by_block(tmp_path):
    target, draft = write_pair(tmp_path, "Some **bold** text.")
    with terminal(tmp_path, "-m", str(target), "--draft", str(draft), "--markdown") as t:
        t.say("Well?")
        shown = t.see("first token")
    assert "\x1b[1mbold\x1b[0m" in shown and "**" not in shown


def test_pipes_work_plainly(thinking, reciting, tmp_path):
    result = run("chat", *thinking, stdin='Well?\n"""\nseveral\nlines\n"""\n')
    assert result.exit_code == 0
    assert result.stdout == " I wonder\n Yes indeed.\n" * 2
    assert "\x1b" not in result.output
    assert result.stderr.count("tokens/s") == 2
    marked = run("chat", "--markdown", *reciting, stdin="Count.\n")
    assert marked.stdout.strip() == SENTENCE and "\x1b" not in marked.output


def test_commands(reciting, tmp_path):
    lines = [
        "/help",
        "/set",
        "/set temp 0.5",
        "/set temp warm",
        "/set verify-length off",
        "/set verify_length 1.5",
        "/set tree 9",
        "/set max_tokens 0",
        "/set colour red",
        "/set seed 3",
        "/system",
        "/system Be brief.",
        '/system ""',
        "/think maybe",
        "/think on",
        "/think auto",
        "/stats",
        "/save",
        f"/load {tmp_path / 'nowhere.json'}",
        "/reset",
        "/clear",
        "/quit",
        "never reached",
    ]
    result = run("chat", *reciting, stdin="\n".join(lines))
    assert result.exit_code == 0 and result.stdout == ""
    expected = [
        "/help  ",
        "temp 0.0",
        "temp is 0.5.",
        "temp cannot be 'warm': it takes a number from 0 to 1e+06.",
        "verify_length is 0.",
        "verify_length cannot be '1.5': '1.5' is not auto, off or a number from 0.",
        "tree is 9.",
        "max_tokens cannot be '0': 0 is neither -1 nor at least 1.",
        "Say /set NAME VALUE",
        "seed is 3.",
        "No system message.",
        "System message: Be brief.",
        "No system message.",
        "Say /think on, /think off or /think auto.",
        "Thinking is on.",
        "Thinking is as the chat template has it.",
        "No answer yet.",
        "Say /save FILE.",
        "There is no file",
        "The conversation is forgotten.",
    ]
    at = 0
    for said in expected:
        at = result.stderr.index(said, at) + len(said)


def test_resuming_a_file_that_is_no_conversation(reciting, tmp_path):
    file = tmp_path / "c.json"
    file.write_text("{}")
    assert "no saved conversation" in complaint(run("chat", "--resume", str(file), *reciting), 1)


def test_a_prompt_beyond_the_positions_is_refused_and_the_chat_goes_on(tmp_path):
    target, draft = write_pair(tmp_path, SENTENCE, max_position_embeddings=64)
    arguments = ["-m", str(target), "--draft", str(draft)]
    result = run("chat", *arguments, stdin="x" * 100 + "\nCount.\n")
    assert "only 64 positions" in result.stderr
    assert result.stdout == SENTENCE + "\n"


@pytest.mark.parametrize(
    ("text", "open_", "message"),
    [
        ("plain", False, "plain"),
        ('"""one line"""', False, "one line"),
        ('"""', True, None),
        ('"""a\nb', True, None),
        ('"""a\nb"""', False, "a\nb"),
        ('"""\na\n"""', False, "a"),
        ('""""""', False, ""),
        ('say """this""" now', False, 'say """this""" now'),
    ],
)
def test_fences(text, open_, message):
    assert unfinished(text) is open_
    if message is not None:
        assert without_fences(text) == Typed(message, fenced=text.startswith('"""'))


@pytest.mark.parametrize(
    "message",
    [
        "/etc/hosts is what?",
        "/usr",
        "/",
        "/ help",
        "//reset",
        "/reset everything in the drawer",
        "/quit smoking, how?",
        "/help me with my homework",
        "/juggle",
        " /reset",
        "/resetting",
        "/reset/",
        "Say /reset",
        '"""/reset"""',
        '"""\n/quit\n"""',
        '"""\n/reset everything\nis what the note says\n"""',
    ],
)
def test_only_known_commands_at_the_start_are_commands(reciting, message, tmp_path):
    saved = tmp_path / "c.json"
    result = run("chat", *reciting, stdin=f"Count.\n{message}\n/save {saved}\n")
    assert result.exit_code == 0 and result.stdout == f"{SENTENCE}\n" * 2
    said = json.loads(saved.read_text())["messages"][2]["content"]
    assert said == without_fences(message).text
    assert ("There is no command" in result.stderr) == (
        message in ("/usr", "/juggle", "/resetting")
    )


@pytest.mark.parametrize("message", ["/QUIT", "/quit ", "/bye", "/exit\t"])
def test_commands_in_capitals_and_with_spaces_behind(reciting, message):
    result = run("chat", *reciting, stdin=f"{message}\nnever reached\n")
    assert result.exit_code == 0 and result.stdout == ""


def test_a_target_without_a_draft_can_be_talked_with(tmp_path):
    target = str(tmp_path / "model-nobody-knows")
    write_target(Path(target))
    assert "train one with dflash-mlx train" in complaint(run("chat", "-m", target), 1)
    options = ["-m", target, "--max-tokens", "8", "--verify-length", "off"]
    typed = "Hi\n/set verify_length 3\nHi\n/set verify_length off\nAgain\n"
    result = run("chat", *options, stdin=typed)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("acceptance length 1.00 (verify 0.0, 100% plain)") == 2
    assert "There is no draft, so nothing can be drafted" in result.stderr
