"""Latent Masked Image Modeling in JAX: pretrains Vision Transformers without labels."""
