"""What of a user's rows is learnt."""

import re
from pathlib import Path

import numpy as np
import pytest

from dflash_mlx import load
from dflash_mlx.conversation.template import Template
from dflash_mlx.demo import demo_paths
from dflash_mlx.demo.making.text import example
from dflash_mlx.training.data import can_teach, encode_rows, opening, read_rows
from tests.command_line import complaint, run
from tests.train.runs import OPTIONS, conversation, write_rows


def test_the_assistants_tokens_alone_are_learnt(tmp_path: Path) -> None:
    tokenizer = load(*demo_paths())[1]
    item = example("dialogue", "train", 3)
    rows = [{"messages": list(item.messages)}, {"text": "One. Two."}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    talk, text = encode_rows(read_rows(file), Template(tokenizer), 512).samples
    answers = [m["content"] for m in item.messages if m["role"] == "assistant"]
    learnt = "".join(tokenizer.decode([t]) for t in talk.tokens[talk.learn])
    assert learnt == "".join(f"{answer}<|end|>" for answer in answers)
    assert len(answers) > 1
    prompt = tokenizer.decode(talk.tokens[: opening(talk)].tolist())
    assert (
        prompt
        == "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in item.prompt) + "<|assistant|>"
    )
    assert text.learn.all()
    assert tokenizer.decode(text.tokens.tolist()) == "One. Two.<|end|>"
    assert opening(text) == len(text.tokens) // 4


REWRITING = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_what_a_template_rewrites_is_not_learnt(tmp_path: Path) -> None:
    """As templates do that drop the thinking of earlier turns."""
    tokenizer = load(*demo_paths())[1]
    tokenizer._tokenizer.chat_template = tokenizer.chat_template = REWRITING
    file = write_rows(tmp_path / "rows.jsonl", [conversation("A?", "<hm>Yes.", "B?", "<ah>No.")])
    (sample,) = encode_rows(read_rows(file), Template(tokenizer), 512).samples
    text = "[user]A?<|end|>\n[assistant]Yes.<|end|>\n[user]B?<|end|>\n[assistant]<ah>No.<|end|>"
    assert tokenizer.decode(sample.tokens.tolist()) == text
    learnt = [tokenizer.decode([token]) for token in sample.tokens[sample.learn]]
    assert "".join(learnt) == "<ah>No.<|end|>"


def test_long_texts_become_pieces_and_long_conversations_are_cut(tmp_path: Path) -> None:
    tokenizer = load(*demo_paths())[1]
    text = " ".join(f"Word number {i}." for i in range(200))
    file = tmp_path / "book.txt"
    file.write_text(text)
    pieces = encode_rows(read_rows(file), Template(tokenizer), 50)
    assert {len(sample.tokens) for sample in pieces.samples[:-1]} == {50}
    whole = np.concatenate([sample.tokens for sample in pieces.samples])
    assert tokenizer.decode(whole.tolist()) == f"{text}<|end|>"
    rows = read_rows(write_rows(tmp_path / "rows.jsonl", [conversation("Hello", text)]))
    cut = encode_rows(rows, Template(tokenizer), 50)
    assert [len(sample.tokens) for sample in cut.samples] == [50]
    assert (pieces.shortened, cut.shortened) == (0, 1)
    assert can_teach(cut.samples[0])
    rows = read_rows(write_rows(tmp_path / "rows.jsonl", [conversation(text, "Hello")]))
    assert not can_teach(encode_rows(rows, Template(tokenizer), 50).samples[0])


BAD_DATA = {
    "a missing file": (None, "There is no file .*My Data.jsonl"),
    "nothing": (b"\n\n", "holds no text"),
    "no JSON": (b'{"text": "a b c d e"}\nfree text\n', "Line 2 of .*My Data.jsonl is not JSON"),
    "no text": (b'{"prose": "a"}\n', "Line 1 of .* has no text to learn"),
    "a list": (b"[1]\n", "Line 1 of .* is no JSON object"),
    "empty text": (b'{"text": " "}\n', "Line 1 of .* has no text to learn"),
    "odd messages": (
        b'{"messages": [{"role": "user"}]}\n',
        "Line 1 of .* a message 1 without content",
    ),
    "no answer": (
        b'{"messages": [{"role": "user", "content": "Hi"}]}\n',
        "Line 1 of .* has no assistant message to learn from; --regenerate N",
    ),
    "one line": (b'{"text": "a b c d e f g"}\n', "gives 1 sequence to learn from; at least 2"),
    "another encoding": (
        '{"text": "Grüße"}\n'.encode("latin-1"),
        "is not UTF-8: line 1 has the byte 0xFC at byte 12",
    ),
}


@pytest.mark.parametrize(("content", "said"), BAD_DATA.values(), ids=BAD_DATA.keys())
def test_bad_data_is_named(target: Path, tmp_path: Path, content: bytes | None, said: str) -> None:
    file = tmp_path / "My Data.jsonl"
    if content is not None:
        file.write_bytes(content)
    made = tmp_path / "made"
    result = run("train", f"--target={target}", f"--data={file}", f"-o{made}", *OPTIONS)
    assert re.search(said, complaint(result, 1))
    assert not made.exists()
