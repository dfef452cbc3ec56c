"""A bundle at work: prompts to embeddings, noise to latents, latents to frames."""
