"""Prompts and conversations on top of generation: templates, prefix reuse, thinking, storage."""

from dflash_mlx.conversation.positions import check_positions, max_positions
from dflash_mlx.conversation.template import Message, Template

__all__ = ["Message", "Template", "check_positions", "max_positions"]
