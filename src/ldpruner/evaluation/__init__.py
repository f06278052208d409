"""How good generated samples are, by published metrics."""
