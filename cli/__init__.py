"""The dflash-mlx command line."""
