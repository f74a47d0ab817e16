"""One reward model, or one policy, trained."""
