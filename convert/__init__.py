"""Drafts in, drafts out: quantize, check, save."""

from dflash_mlx.convert.conversion import convert
from dflash_mlx.convert.report import CheckReport, LayerReport, Measured, Report

__all__ = ["CheckReport", "LayerReport", "Measured", "Report", "convert"]
