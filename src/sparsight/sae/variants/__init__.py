"""The SAE variants. Each file has the name of its variant and one ``@variant`` class."""
