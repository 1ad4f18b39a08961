"""Drafts in, drafts out: quantize, check, save."""
