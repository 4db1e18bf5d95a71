"""What the commands of `nrlib` do, one module a command; `nrlib.cli` holds their options."""
