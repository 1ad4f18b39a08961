"""How the demo pair was made: its text, tokenizer and target. Source only; no wheel has it."""
