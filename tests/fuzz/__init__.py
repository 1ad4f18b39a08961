"""Broken inputs by the thousand: each must end in an answer or in one clear sentence.

`python -m tests.fuzz --help` runs any number of them; the tests run a fixed few.
"""
