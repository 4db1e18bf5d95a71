"""Five systems in whose neighbourhood neutral residues stand, each in modules of its own, and what they say about
extending a model; beside them studies of the extended models themselves (`gates`, `several_languages`). Nothing in the core
imports them."""
