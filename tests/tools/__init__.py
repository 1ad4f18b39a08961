"""Programs that measure and print: docs/ has what they gave. No tests."""
