"""Custom Metal kernels, their plain-MLX fallbacks and the choice between them."""
