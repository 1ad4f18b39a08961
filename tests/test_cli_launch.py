"""`dflash-mlx launch`: programs are told where the server is, and nothing of theirs is changed."""

import json
import tomllib
from pathlib import Path

import pytest

from dflash_mlx.server.protection import Protection
from tests.command_line import complaint, run
from tests.serving import saying, tool_tokenizer

PROGRAMS = ["claude", "codex", "opencode", "pi"]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    tokenizer = tool_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    with saying(tokenizer, "Fine.", Protection(keys=["secret"]), positions=1000) as (address, _):
        yield address


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """Stand-ins that write down how they were started."""
    home = tmp_path / "home"
    home.mkdir()
    for name in PROGRAMS:
        file = tmp_path / name
        lines = ["#!/bin/sh", f'env > "{tmp_path}/env"', f'printf "%s\\n" "$@" > "{tmp_path}/args"']
        lines += [f'for a in "$@"; do case $a in *.mjs) cp "$a" "{tmp_path}/read";; esac; done']
        file.write_text("\n".join([*lines, "exit 7"]))
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(home))
    return tmp_path


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_get_what_they_need(programs, address, program) -> None:
    options = ["--url", address, "--api-key", "secret"]
    result = run("launch", program, *options, "--", "-p", "Hello you")
    assert result.exit_code == 7
    lines = (programs / "env").read_text().splitlines()
    env = dict(line.split("=", 1) for line in lines if "=" in line)
    arguments = (programs / "args").read_text().splitlines()
    assert arguments[-2:] == ["-p", "Hello you"]
    assert "secret" not in result.stderr
    assert list((programs / "home").iterdir()) == []
    if program == "claude":
        assert env["ANTHROPIC_BASE_URL"] == address
        assert env["ANTHROPIC_AUTH_TOKEN"] == "secret"
        assert env["ANTHROPIC_MODEL"] == env["ANTHROPIC_DEFAULT_HAIKU_MODEL"] == "tiny"
    elif program == "codex":
        given = [arguments[i + 1] for i, a in enumerate(arguments) if a == "-c"]
        config = tomllib.loads("\n".join(given))
        provider = config["model_providers"][config["model_provider"]]
        assert provider["base_url"] == f"{address}/v1" and provider["wire_api"] == "responses"
        assert env[provider["env_key"]] == "secret"
        assert config["model"] == "tiny"
    elif program == "opencode":
        config = json.loads(env["OPENCODE_CONFIG_CONTENT"])
        provider, model = config["model"].split("/")
        options_given = config["provider"][provider]["options"]
        assert options_given == {"baseURL": f"{address}/v1", "apiKey": "secret"}
        assert config["provider"][provider]["models"][model]["limit"]["context"] == 1000
    else:
        assert env["DFLASH_MLX_API_KEY"] == "secret"
        read = (programs / "read").read_text()
        assert f'"baseUrl": "{address}/v1"' in read and '"contextWindow": 1000' in read
        extension = arguments[arguments.index("--extension") + 1]
        assert not Path(extension).exists()


def test_what_can_go_wrong(programs, address) -> None:
    options = ["--url", address, "--api-key", "secret"]
    assert "not one of claude" in complaint(run("launch", "emacs", *options), 2)
    assert "wants a key" in complaint(run("launch", "pi", "--url", address), 1)
    nobody = complaint(run("launch", "pi", "--url", "http://127.0.0.1:9"), 1)
    assert "dflash-mlx serve" in nobody
    (programs / "pi").unlink()
    assert "not installed" in complaint(run("launch", "pi", *options), 1)
    assert run("launch", "pi", *options, "--dry-run").exit_code == 0
