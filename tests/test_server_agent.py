"""A coding agent, started by `dflash-mlx launch`, does a task of two steps."""

import json
import os
import shutil
import subprocess

import pytest

from tests.command_line import PROGRAM
from tests.test_server_clients import served
from tests.tool_pair import ANSWER, write_tool_pair

CALL = '<tool_call>{"name": "exec_command", "arguments": {"cmd": "cat secret.txt"}}</tool_call>'


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("codex") is None, reason="Codex is not installed here")
def test_codex_reads_a_file_and_answers(tmp_path) -> None:
    """The call gets to Codex, its result comes back, and most of the second prompt is cached."""
    target, draft = write_tool_pair(tmp_path, call=CALL, agents=True)
    folder, home = tmp_path / "work", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    (folder / "secret.txt").write_text("the word is plover\n")
    task = ["exec", "--json", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
    with served(target, draft) as address:
        command = [*PROGRAM, "launch", "codex", "--url", address, "--", *task, "Read secret.txt."]
        run = subprocess.run(
            command,
            env={**os.environ, "HOME": str(home), "CODEX_HOME": str(home)},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=170,
        )
    assert run.returncode == 0, run.stderr
    events = [json.loads(line) for line in run.stdout.splitlines()]
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    (step,) = [item for item in items if item["type"] == "command_execution"]
    assert step["aggregated_output"] == "the word is plover\n"
    assert [i["text"] for i in items if i["type"] == "agent_message"] == [ANSWER]
    usage = next(event["usage"] for event in events if event["type"] == "turn.completed")
    assert usage["cached_input_tokens"] > 0.4 * usage["input_tokens"]
