"""Neutral residues: teach a pretrained language model a new domain without losing the old one (arXiv 2410.02744)."""
