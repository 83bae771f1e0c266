"""The Logits tensor, which holds a formula instead of stored logits, and one rule per torch function."""
