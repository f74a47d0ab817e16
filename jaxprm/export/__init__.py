"""A reward model as a Hugging Face directory, verified against transformers."""
