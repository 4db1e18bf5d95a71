"""Five systems in whose neighbourhood neutral residues stand, each in modules of its own, and what they say about
extending a model. Nothing in the core imports them."""
