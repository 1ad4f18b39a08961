"""Chat data as people have it: every form reads as the same conversation, bad rows are named."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlx_lm import stream_generate
from mlx_lm.tokenizer_utils import load as load_tokenizer

from dflash_mlx.conversation import Template
from dflash_mlx.conversation.rows import messages_of, tools_of
from dflash_mlx.errors import DFlashError
from dflash_mlx.measure.prompts import read_questions, rendered
from dflash_mlx.texts import check_text
from dflash_mlx.training import answers
from dflash_mlx.training.answers import Author
from dflash_mlx.training.data import BadRows, encode_rows, read_rows
from tests import tiny_pair
from tests.command_line import complaint, run

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
SYSTEM = {"role": "system", "content": "Be kind."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": TALK}, TALK),
        ({"conversations": TALK}, TALK),
        ({"conversation": TALK}, TALK),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]},
            TALK,
        ),
        (
            {"system": "Be kind.", "conversations": [{"from": "human", "value": "Hi"}]},
            [SYSTEM, TALK[0]],
        ),
        ({"system": "Other.", "messages": [SYSTEM, *TALK]}, [SYSTEM, *TALK]),
        ({"prompt": "Hi", "completion": "Yes."}, TALK),
        ({"prompt": "Hi", "response": "Yes."}, TALK),
        ({"prompt": [SYSTEM, TALK[0]], "completion": TALK[1:]}, [SYSTEM, *TALK]),
        ({"prompt": "Hi"}, TALK[:1]),
        ({"prompt": "Hi", "completion": None}, TALK[:1]),
        ({"instruction": "Hi", "input": "", "output": "Yes."}, TALK),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}],
        ),
        ({"messages": [TALK[0], {"role": "assistant", "content": None}]}, [TALK[0], None]),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "H"}, {"text": "i"}]},
                    {"role": "assistant", "content": ["Ye", "s."]},
                ]
            },
            TALK,
        ),
        ({"messages": None, "prompt": "Hi"}, TALK[:1]),
        ({"text": "free text"}, None),
        ({}, None),
    ],
)
def test_the_same_conversation_in_every_form(row: dict[str, Any], messages: Any) -> None:
    if messages and messages[-1] is None:
        messages = [*messages[:-1], {"role": "assistant", "content": ""}]
    assert messages_of(row) == messages


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL]},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "tool_calls": [
                {
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
                }
            ],
        },
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
    ],
)
def test_calls_have_their_arguments_as_an_object(message: dict[str, Any]) -> None:
    assert messages_of({"messages": [message]}) == [CALLED]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": []}, 'has "messages" that are no list'),
        ({"messages": "Hi"}, 'has "messages" that are no list'),
        ({"conversations": {"from": "human"}}, 'has "conversations" that are no list'),
        ({"messages": ["Hi"]}, "a message 1 that is no object"),
        ({"messages": [TALK[0], {"content": "x"}]}, "a message 2 without a role"),
        ({"messages": [{"role": 3, "content": "x"}]}, "a message 1 without a role"),
        ({"messages": [{"role": "user"}]}, "a message 1 without content"),
        ({"messages": [{"role": "user", "content": 3}]}, "part of type int in message 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "part of type image_url in message 1",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "a tool call without a name"),
        ({"messages": [{"from": "function_call", "value": "no"}]}, "no JSON"),
        ({"prompt": 3}, "no list of messages"),
        ({"instruction": 3}, "no text"),
    ],
)
def test_what_is_no_conversation_says_why(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DFlashError, match=said):
        messages_of(row)


def test_tools_as_a_list_or_as_its_json() -> None:
    assert tools_of({"tools": [CALL]}) == tools_of({"tools": json.dumps([CALL])}) == [CALL]
    assert tools_of({}) is tools_of({"tools": None}) is tools_of({"tools": ""}) is None
    for tools in ({"a": 1}, "nonsense", 3):
        with pytest.raises(DFlashError, match="tools"):
            tools_of({"tools": tools})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hello \ud83d", "half of a character .U.D83D. behind 'hello ', at character 7"),
        ("\udc80x", "a byte that is no UTF-8 .0x80. at its start, at character 1"),
        ("caf\udce9", "a byte that is no UTF-8 .0xE9. behind 'caf', at character 4"),
    ],
)
def test_text_that_is_none_is_named_with_its_place(text: str, said: str) -> None:
    with pytest.raises(DFlashError, match=said):
        check_text(text)
    assert check_text("a whole 🦊") == "a whole 🦊"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pair.write_pair(tmp_path_factory.mktemp("pair"), says=tiny_pair.SENTENCE)[0]


TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|start|>{{ m.role }}\n"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}{% endfor %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def test_tools_reach_the_template(target: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(target)
    tokenizer.chat_template = TOOL_TEMPLATE
    row = {
        "tools": [{"type": "function", "function": {"name": "weather"}}],
        "messages": [TALK[0], {**CALLED, "content": None}, {"role": "tool", "content": "sun"}],
    }
    row["messages"].append({"role": "assistant", "content": "Sun in Rome."})  # type: ignore[attr-defined]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    (sample,) = encode_rows(read_rows(file), Template(tokenizer), 500).samples
    text = tokenizer.decode(sample.tokens.tolist())
    assert text.startswith('[{"type": "function"') and "Rome<|end|>" in text
    learnt = tokenizer.decode(sample.tokens[sample.learn].tolist())
    assert learnt == "Rome<|end|>Sun in Rome.<|end|>"
    # bench asks the same question, tools and all, and not for the answer that is there.
    (prompt,) = rendered(read_questions(file), Template(tokenizer))
    asked = tokenizer.decode(list(prompt.tokens))
    assert asked.startswith('[{"type": "function"') and asked.endswith(
        "sun<|end|>\n<|start|>assistant\n"
    )


FORMS = [
    {"messages": TALK},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]},
    {"prompt": "Hi", "completion": "Yes."},
    {"messages": [TALK[0], {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}]},
]


def test_every_form_teaches_the_same(target: Path, tmp_path: Path) -> None:
    template = Template(load_tokenizer(target))
    lines, listed = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    # With a byte order mark, Windows line ends, and a line separator inside of a text.
    text = "\r\n".join(json.dumps(row) for row in FORMS)
    lines.write_text("\ufeff" + text + '\n{"text": "a\u2028b"}\n', encoding="utf-8")
    listed.write_text("\ufeff" + json.dumps(FORMS), encoding="utf-8")
    for file in (lines, listed):
        rows = read_rows(file)
        samples = encode_rows(rows[:4], template, 100).samples
        assert len({sample.tokens.tobytes() + sample.learn.tobytes() for sample in samples}) == 1
    assert read_rows(lines)[4].text == "a\u2028b"


BAD = [
    '{"messages": [{"role": "user", "content": "Hi"}]}',  # no answer
    "free text",
    '{"messages": 3}',
    '{"prompt": "x \\ud83d", "completion": "y"}',
    '{"text": "\\ude00"}',
    "[]",
    '{"other": 1}',
    "[" * 5000,
]


def test_bad_rows_are_named_or_skipped_with_a_count(target: Path, tmp_path: Path) -> None:
    good, template = json.dumps(FORMS[0]), Template(load_tokenizer(target))
    file = tmp_path / "rows.jsonl"
    for line in BAD:
        file.write_text("\n".join([good, "", line, good]))
        with pytest.raises(DFlashError, match=r"Line 3 of .*rows\.jsonl"):
            encode_rows(read_rows(file), template, 100)
    file.write_text("\n".join([good, *BAD, good]))
    bad = BadRows(skip=True)
    samples = encode_rows(read_rows(file, bad), template, 100, bad=bad).samples
    assert len(samples) == 2 and len(bad.reasons) == len(BAD)
    for number, _ in enumerate(BAD, 2):
        assert any(reason.startswith(f"Line {number} of") for reason in bad.reasons)
    assert bad.remark is not None and bad.remark.startswith("Skipped 8 bad rows; the first: Line 3")


def test_the_command_skips_bad_rows_and_says_so(target: Path, tmp_path: Path) -> None:
    file, made = tmp_path / "rows.jsonl", tmp_path / "made"
    file.write_text("\n".join([json.dumps(row) for row in FORMS * 2] + BAD[1:3]))
    arguments = ["train", f"--target={target}", f"--data={file}", f"-o{made}", "--steps=1"]
    arguments += ["--draft-layers=1", "--block-size=4", "--seq-length=64", "--batch-size=2"]
    assert "Line 9 of" in complaint(run(*arguments), 1) and not made.exists()
    result = run(*arguments, "--skip-bad-rows")
    assert result.exit_code == 0, result.stderr
    assert "Skipped 2 bad rows; the first: Line 9 of" in result.stderr
    file.write_text("\n".join(BAD[1:3]))
    assert "no row that can be used" in complaint(run(*arguments, "--skip-bad-rows"), 1)


def test_rows_without_answers_are_answered_when_asked_to(target: Path, tmp_path: Path) -> None:
    file, made = tmp_path / "rows.jsonl", tmp_path / "made"
    file.write_text("\n".join(json.dumps({"prompt": f"{i}?"}) for i in range(4)))
    arguments = ["train", f"--target={target}", f"--data={file}", f"-o{made}", "--steps=1"]
    arguments += ["--draft-layers=1", "--block-size=4", "--seq-length=64", "--batch-size=2"]
    assert "--regenerate N" in complaint(run(*arguments), 1)
    result = run(*arguments, "--regenerate=4")
    assert result.exit_code == 0, result.stderr


def test_an_answer_ends_with_the_stop_token_that_the_target_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of several, and not the tokenizer's own."""
    from dflash_mlx.target import TargetView
    from dflash_mlx.target_checkpoint import load_target

    folder = tiny_pair.write_pair(tmp_path, says=tiny_pair.SENTENCE, eos_token_id=[0, 2])[0]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["eos_token"] = "<|pad|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    model, tokenizer = load_target(folder)
    assert tokenizer.eos_token_id == 0 and tokenizer.eos_token_ids == {0, 2}
    prompts = [Template(tokenizer).render([{"role": "user", "content": "x" * n}]) for n in (1, 5)]
    author = Author(TargetView(model), tokenizer, None)
    with monkeypatch.context() as patch:
        patch.delattr(answers, "stream_generate")  # which writes one text alone
        written = dict(author.continuations(prompts, [40, 40]))
    together = [written[k] for k in range(2)]
    assert [text[-1] for text in together] == [2, 2]
    alone = [[r.token for r in stream_generate(model, tokenizer, p, 40)] for p in prompts]
    assert together == alone
    short = dict(author.continuations(prompts, [3, 4]))
    assert short == {0: together[0][:3], 1: together[1][:4]}
