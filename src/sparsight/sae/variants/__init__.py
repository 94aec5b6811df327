"""The SAE variants: one file each, named as the variant, with one ``@variant`` class."""
