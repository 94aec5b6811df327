"""The first screen: one card per question, each with a verdict on the SAE beside its strongest control."""
