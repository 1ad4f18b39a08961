"""What is around a command when it runs: closed and full streams, encodings, missing places."""

import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dflash_mlx.cli import failures
from dflash_mlx.errors import DFlashError
from dflash_mlx.files import check_writable, write_result
from tests.command_line import PROGRAM, complaint, run
from tests.tiny_pair import SENTENCE, write_pair

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /dev/full")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name a pair, and let it answer fast."""
    target, draft = write_pair(tmp_path_factory.mktemp("pair"), SENTENCE)
    return ["-m", str(target), "--draft", str(draft), "--verify-length", "3"]


def process(
    *arguments: str,
    shell: str = "",
    cwd: Path | None = None,
    before: Callable[[], None] | None = None,
    **env: str,
) -> tuple[int, str]:
    """A command in a process of its own, redirected by a shell: its exit code and stderr."""
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {shell}', "sh", *PROGRAM, *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **env},
        cwd=cwd,
        capture_output=True,
        text=True,
        errors="replace",
        preexec_fn=before,
        timeout=60,
    )
    assert "Traceback" not in done.stderr and "Unexpected" not in done.stderr, done.stderr
    return done.returncode, done.stderr


@linux
@pytest.mark.parametrize(
    "shell,said",
    [
        (">/dev/full", "The output cannot be written: No space left on device."),
        pytest.param(">&-", "stdout cannot be used: it is closed.", marks=pytest.mark.slow),
    ],
)
def test_a_stdout_that_takes_nothing(pair: list[str], shell: str, said: str) -> None:
    code, stderr = process("generate", "-p", "hi", *pair, shell=shell)
    assert code == 1 and f"dflash-mlx: {said}" in stderr.splitlines()


@linux
def test_closed_streams_beside_it(pair: list[str]) -> None:
    # The sentence cannot be said, and the exit code has to do.
    assert process("generate", "-m", "/none", "-p", "hi", shell="<&- 2>&-")[0] == 1


@linux
@pytest.mark.slow
def test_a_stdin_that_is_closed(pair: list[str]) -> None:
    assert process("generate", "-p", "hi", *pair, shell="<&-")[0] == 0
    code, stderr = process("generate", *pair, shell="<&-")
    assert code == 2 and "The prompt is empty" in stderr
    assert process("chat", *pair, shell="<&-")[0] == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_encoding_cannot_write_is_a_question_mark(
    pair: list[str], monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    narrow = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", narrow)
    failures.ready_streams()
    narrow.write("größer 語 \ud800")
    narrow.flush()
    written = narrow.buffer.getvalue()  # type: ignore[attr-defined]
    assert written == "größer ? ?".encode(encoding, "replace")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}])
def test_tables_in_a_narrow_locale(pair: list[str], env: dict[str, str]) -> None:
    env = {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", **env}
    assert process("models", **env)[0] == 0
    assert process("models", "--inspect", pair[1], **env)[0] == 0


@linux
def test_bytes_of_a_command_line_are_utf_8_in_a_locale_of_ascii(pair: list[str]) -> None:
    narrow = {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "LC_ALL": "C"}
    texts = ["--system-prompt", "Grüß dich", "--stop", "ü"]
    for env in ({}, narrow):
        assert process("generate", "-p", "Grüß", *texts, *pair, "--max-tokens", "2", **env)[0] == 0
    code, stderr = process("generate", "-p", b"Gr\xfc", *pair, **narrow)  # type: ignore[arg-type]
    assert code == 2 and "a byte that is no UTF-8 (0xFC)" in stderr


@pytest.mark.slow
def test_a_working_directory_that_was_removed(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("dflash-mlx")
    command = f'cd "{tmp_path}/gone" && rmdir ../gone && exec "$@"'
    (tmp_path / "gone").mkdir()
    done = subprocess.run(
        ["sh", "-c", command, "sh", str(program), "models"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == (
        "dflash-mlx: The working directory has been removed; change to one that is there.\n"
    )


@pytest.mark.slow
def test_places_that_are_not_there(pair: list[str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for env in ({"XDG_CACHE_HOME": str(file)}, {"HF_HUB_CACHE": str(file)}):
        assert process("models", **env)[0] == 0
    assert process("generate", "-p", "hi", *pair[:4], XDG_CACHE_HOME=str(file))[0] == 0
    code, stderr = process("generate", "-p", "hi", *pair, TMPDIR="/nowhere")
    assert code == 0 or "no directory for temporary files at /nowhere" in stderr


def test_a_mode_of_the_kernels_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFLASH_MLX_KERNELS", "foo")
    assert "DFLASH_MLX_KERNELS is 'foo'" in complaint(run("models"), 2)


def _no_room() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))


@linux
@pytest.mark.slow
def test_a_full_disk_leaves_nothing_behind(pair: list[str], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    asked, told = {"role": "user", "content": "hi"}, {"role": "assistant", "content": SENTENCE}
    rows.write_text((json.dumps({"messages": [asked, told]}) + "\n") * 20)
    (tmp_path / "old.json").write_text("old")
    bench = ["bench", *pair, "--prompts", str(tmp_path / "prompts.jsonl"), "--repeats", "1"]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hi"}\n')
    train = [
        "train",
        "-m",
        pair[1],
        "--data",
        str(rows),
        "--steps",
        "1",
        "--draft-layers",
        "1",
        "--block-size",
        "4",
        "--seq-length",
        "32",
    ]
    before = sorted(tmp_path.iterdir())
    for command in (
        ["convert", pair[3], "-o", str(tmp_path / "out"), "--bits", "8"],
        [*bench, "--json", str(tmp_path / "old.json")],
        [*bench, "--plot", str(tmp_path / "new.svg")],
    ):
        code, stderr = process(*command, before=_no_room)
        assert code == 1 and "written" in stderr, stderr
        assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "old.json").read_text() == "old"
    for count in (0, 20):
        made = tmp_path / f"made-{count}"
        more = ["-o", str(made), "--regenerate", str(count)]
        code, stderr = process(*train, *more, before=_no_room)
        assert code == 1 and "written" in stderr, stderr
        assert not (made / "config.json").exists()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_result(file, "one")
    assert file.stat().st_mode & 0o777 == 0o666 & ~_umask()
    file.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(file)
    write_result(link, '"\ud800"')
    assert link.is_symlink() and file.read_bytes() == b'"\\ud800"'
    assert file.stat().st_mode & 0o777 == 0o600
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "link"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@linux
def test_devices_are_written_into_and_never_replaced() -> None:
    write_result(Path("/dev/null"), "x")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(DFlashError, match="/dev/full cannot be written: No space left on device"):
        write_result(Path("/dev/full"), "x")


def test_places_for_a_result_are_looked_at_before_the_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "new")
    for place, said in (
        (tmp_path / "none" / "new", "there is no directory"),
        (tmp_path, "it is a directory"),
        (Path("a\0b"), "cannot be written"),
        (tmp_path / ("x" * 300), "cannot be written"),
    ):
        with pytest.raises(DFlashError, match=said):
            check_writable(place)
